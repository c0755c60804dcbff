"""Write docs/configuration.md from the validated tree itself: `python scripts/configuration_page.py`."""

import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer.config import schema as config
from trainer.config.base import Duration, without_none

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

Made by `python scripts/configuration_page.py` from `trainer/config/`; a test fails when it is stale.

Hydra composes the files under `conf/`, the command line has the last word, and the result is checked before TensorFlow
is imported: every fault is listed at once, an unknown key with the nearest known one. An experiment chooses its data,
model and augmentation by their groups, so that `data=image_folder` after `experiment=...` replaces the data as a whole.
With neither an experiment nor data chosen, the run is the quickstart.

Durations are written "500 steps", "2 epochs" or "10000 examples"; a phase takes exactly one of `epochs`, `steps`,
`examples`. `null` unsets a value.
"""


def _kind(annotation: Any) -> str:
    """A type in words."""
    if annotation is Duration or "Duration" in str(annotation):
        return "list of durations" if "tuple" in str(annotation) else "duration"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " ".join(f"`{a}`" for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return "list of " + _kind(arguments[0])
    if origin is dict:
        return "mapping of " + _kind(arguments[1])
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}.get(
        annotation.__name__, annotation.__name__
    )


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {getattr(m, k)}" for m in metadata for k, sign in signs.items() if hasattr(m, k))


def _comments(section: type[BaseModel]) -> dict[str, str]:
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(section), re.M)
    return dict(found)


def _default(value: Any) -> str:
    """A default as one would write it."""
    match value:
        case Duration():
            return f"{value.count:g} {value.unit}"
        case tuple():
            return ", ".join(map(str, value)) or "none"
        case bool() | None:
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return f"{value:g}"
    return "must be given" if value is PydanticUndefined else str(value)


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    comments, rows, later = _comments(section), [], []
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        annotation = field.annotation
        whole = typing.get_origin(annotation) is dict
        inner = typing.get_args(annotation)[1] if whole else without_none(annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Duration:
            branch = f"{prefix}{name}." + ("NAME." if whole else "")
            null = " Null by default." if inner is not annotation and not whole else ""
            later += ["", f"## {branch}*", "", (inspect.getdoc(inner) or "") + null, "", *_rows(inner, branch)]
            continue
        bounds = _bounds(field.metadata)
        takes = _kind(annotation) + (f" ({bounds})" if bounds else "")
        comment = comments.get(name, "").replace("|", "or")
        rows.append(f"| `{prefix}{name}` | {takes} | {_default(field.default)} | {comment} |")
    head = ["| key | takes | default | |", "| --- | --- | --- | --- |"] if rows else []
    return [*head, *rows, *later]


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "\n" + "\n".join(_rows(config.RunConfig, "")) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
