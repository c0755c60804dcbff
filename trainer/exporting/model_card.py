"""Write the model card, a Markdown file rendered from a Jinja template, and format labels.txt."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from trainer.names import escape_unprintable, normalize_class_name
from trainer.storage.local import write_atomically

TEMPLATE = Path(__file__).parent / "model_card.md.j2"


def format_labels(class_names: Sequence[str]) -> str:
    """Format labels.txt: one class name per line, in the order of the probabilities."""
    return "".join(normalize_class_name(name) + "\n" for name in class_names)


def escape_markdown(name: object) -> str:
    """Escape a name for a Markdown line or table cell, so that it is displayed literally."""
    text = re.sub(r"[\\`*\[\]<>&|~#$!]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", escape_unprintable(str(name)))
    return re.sub(r"^(\s*\d*)([-+=.)])", r"\1\\\2", text)  # unescaped, it would begin a list or heading


def format_code_span(name: object) -> str:
    """Format a name as a Markdown code span. In a table, the caller must escape vertical bars in the result."""
    text = escape_unprintable(str(name))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if fence != "`" or text.startswith(" ") or text.endswith(" ") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def write_model_card(path: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card.

    Args:
        report: content of report.json.
        config: the resolved configuration, as JSON values.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": escape_markdown, "code": format_code_span}
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, config=config)
    write_atomically(path, re.sub(r"\n{3,}", "\n\n", card).strip() + "\n")
