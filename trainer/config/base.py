"""The base of every section of the configuration, and validation errors as sentences."""

import difflib
import re
from types import UnionType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

AUTO = "(auto)"  # where `phases.auto_apart` moves what is auto; no key that a user could write


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Duration(Section):
    """A length of training: `count` of `unit`. Written "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0)
    unit: Literal["epochs", "steps", "examples"]

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """The number of optimizer steps, rounded to the nearest; at least 1 unless the count is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


def _read_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(epoch|step|example)s?\s*", value)
        if not match:
            raise ValueError('write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


SomeDuration = Annotated[Duration, BeforeValidator(_read_duration)]


def without_none(annotation: Any) -> Any:
    """`Section | None` -> `Section`."""
    kinds = [kind for kind in getattr(annotation, "__args__", ()) if kind is not type(None)]
    return kinds[0] if isinstance(annotation, UnionType) and len(kinds) == 1 else annotation


def _section_at(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section at a path of keys, also through `dict[str, Section]` and `Section | None`."""
    here: Any = model
    for key in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get("auto" if key == AUTO else str(key))
            here = without_none(field.annotation) if field else None
        elif getattr(here, "__origin__", None) is dict:
            here = here.__args__[1]
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _key(path: tuple[Any, ...]) -> str:
    """The key as the user wrote it; `auto_apart` moves what is `auto`."""
    if path[:2] == (AUTO, "phases"):
        path = ("phases", "auto", *path[2:])
    return ".".join(str(part) for part in path) or "the configuration"


def nearest(name: str, known: list[str]) -> str:
    """' Did you mean X?' or ''."""
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _sentence(fault: Any, root: type[BaseModel], siblings: list[str]) -> str:
    path, kind, value = fault["loc"], fault["type"], fault["input"]
    if kind == "extra_forbidden":
        section = _section_at(root, path[:-1])
        known = [name for name, field in section.model_fields.items() if not field.exclude] if section else []
        return f"{_key(path)}: there is no such key.{nearest(str(path[-1]), known) or ' Known: ' + ', '.join(known)}"
    if kind == "missing":
        if len(path) == 3 and path[0] == "phases":  # a phase that only an override speaks of is a typing error
            others = [name for name in siblings if name != path[1]]
            return f"{_key(path)}: the phase {path[1]!r} does not say what trains.{nearest(path[1], others)}"
        return f"{_key(path)}: must be given"
    text = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | BaseModel) else f" (is {value!r})"
    return f"{_key(path)}: {text[0].lower() + text[1:]}{shown}"


def describe_faults(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> str:
    """One sentence for each fault that pydantic found in `tree`, which a user can act on, one line each."""
    phases = tree.get("phases")
    lines = [_sentence(fault, root, list(phases) if isinstance(phases, dict) else []) for fault in error.errors()]
    return f"the configuration has {len(lines)} fault{'s' * (len(lines) > 1)}:\n" + "\n".join(f"  {x}" for x in lines)
