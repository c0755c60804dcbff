"""Write the tables of docs/recipes.md from docs/recipes.yaml, the registry of the published recipes:
`python scripts/recipes_page.py`. `tests/test_recipes.py` compares the registry with the presets.
"""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
REGISTRY, PAGE, PRESETS = ROOT / "docs" / "recipes.yaml", ROOT / "docs" / "recipes.md", ROOT / "conf" / "experiment"
BEGIN = "<!-- Made by `python scripts/recipes_page.py` from docs/recipes.yaml -->\n"
END = "<!-- The end of what it makes -->\n"


def read_registry() -> dict[str, dict[str, Any]]:
    """Read the registry: the recipe of each preset. Keys in `values` become dotted keys, such as `phases.head.thaw`."""
    recipes = yaml.safe_load(REGISTRY.read_text())
    del recipes["head"]  # values to which the other recipes refer by YAML aliases
    for recipe in recipes.values():
        flat: dict[str, Any] = {}
        for key, value in recipe["values"].items():
            nested = isinstance(value, dict)
            flat |= {f"{key}.{inner}": x for inner, x in value.items()} if nested else {key: value}
        recipe["values"] = flat
    return recipes


def list_values(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a preset by key: those of the published recipe, replaced by those of its departures."""
    return recipe["values"] | {row["key"]: row["here"] for row in recipe["departures"] if "key" in row}


def read_commands(name: str) -> list[str]:
    """Read the lines of the commands in the header of a preset."""
    return re.findall(r"^#   (.*)$", (PRESETS / f"{name}.yaml").read_text(), flags=re.M)


def format_value(value: Any) -> str:
    """Format a value as users write it on the command line."""
    match value:
        case bool() | None:
            return {None: "null", True: "true", False: "false"}[value]
        case float():
            return f"{value:g}"
        case list():
            return f"[{', '.join(map(str, value))}]"
    return str(value)


def format_page() -> str:
    """Format the content of docs/recipes.md, with new tables."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + format_tables(read_registry()) + END + after


def format_tables(recipes: dict[str, dict[str, Any]]) -> str:
    """Format the overview, and the values and departures of each preset."""
    lines = ["", "| preset | data | backbone, pixels | phases: epochs, trainable parameters | published |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, recipe in recipes.items():
        values = list_values(recipe)
        phases = [f"`{phase}` {values[f'phases.{phase}.epochs']}" + f", {count:,}"
                  for phase, count in recipe["trainable"].items()]  # fmt: skip
        backbone = f"{values['model.backbone']}, {values['model.image_size']}"
        lines.append(f"| `{name}` | {recipe['title']} | {backbone} | {'; '.join(phases)} | {recipe['published']} |")
    lines += ["", "Parameters are those with 5 classes where the data has no number of its own.", ""]
    for name, recipe in recipes.items():
        lines += [f"### {name}", "", "```", *read_commands(name), "```", "", "As published:", ""]
        sections: dict[str, list[str]] = {}
        for key, value in recipe["values"].items():
            depth = 2 if key.startswith("phases.") else 1
            section, inner = ".".join(key.split(".")[:depth]), ".".join(key.split(".")[depth:])
            sections.setdefault(section, []).append(f"`{inner}={format_value(value)}`")
        lines += [f"- `{section}.*`: {', '.join(values)}" for section, values in sections.items()]
        if recipe["departures"]:
            lines += ["", "Other values:", "", "| recipe | here | why |", "| --- | --- | --- |"]
            for departure in recipe["departures"]:
                key = departure.get("key")
                here = f"`{key}={format_value(departure['here'])}`" if key else departure["here"]
                lines.append(f"| {departure['recipe']} | {here} | {departure['why']} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(format_page())
