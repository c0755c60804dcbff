"""Write the model card from a template, and format labels.txt."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from trainer.names import escape_unprintable, normalize_class_name
from trainer.storage.local import write_atomically

TEMPLATE = Path(__file__).parent / "model_card.md.j2"


def label_lines(class_names: Sequence[str]) -> str:
    """Return labels.txt: a class name per line, in the order of the probabilities, as `normalize_class_name` has it."""
    return "".join(normalize_class_name(name) + "\n" for name in class_names)


def as_text(name: object) -> str:
    """Escape a name for a line or a table cell of Markdown, in which none of its characters is markup."""
    text = re.sub(r"[\\`*\[\]<>&|~#$!]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", escape_unprintable(str(name)))
    return re.sub(r"^(\s*\d*)([-+=.)])", r"\1\\\2", text)  # of a list or a heading, if it begins a line


def as_code(name: object) -> str:
    """Return a name as a code span of Markdown; in a table, its vertical bars need a backslash as well."""
    text = escape_unprintable(str(name))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if fence != "`" or text.startswith(" ") or text.endswith(" ") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def write_model_card(path: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card in Markdown from the content of report.json and the resolved configuration."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": as_text, "code": as_code}
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, config=config)
    write_atomically(path, re.sub(r"\n{3,}", "\n\n", card).strip() + "\n")
