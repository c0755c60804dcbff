"""Write the model card from a template, and format labels.txt."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from trainer.storage.local import write_whole

TEMPLATE = Path(__file__).parent / "model_card.md.j2"


def label_lines(class_names: Sequence[str]) -> str:
    """Return labels.txt: a class name per line, in the order of the probabilities, with spaces for its line breaks."""
    return "".join(" ".join(name.splitlines()) + "\n" for name in class_names)


def write_model_card(path: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the model card in Markdown from the content of report.json and the resolved configuration."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, config=config)
    write_whole(path, re.sub(r"\n{3,}", "\n\n", card).strip() + "\n")
