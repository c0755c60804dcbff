"""The base of every section of the configuration, and validation errors with key, value, problem and fix."""

import difflib
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError

RENAMED = {"runtime.max_fruitless_restarts": "runtime.max_restarts_without_progress"}  # old key -> new key


class Section(BaseModel):
    """A frozen section of the configuration that refuses unknown keys. The docstring of a field is its meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class InvalidValue(ConfigError, ValueError):
    """An error that a validator raises; its `key` is relative to the section that is validated."""


class Duration(Section):
    """A length of training, written "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0)
    """Number of units."""
    unit: Literal["epochs", "steps", "examples"]
    """Unit of `count`."""

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """The number of optimizer steps, rounded to the nearest; at least 1 unless the count is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


DURATION = re.compile(r"\s*([0-9.eE+]+)\s*(epoch|step|example)s?\s*")


def _read_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = DURATION.fullmatch(value)
        if not match:
            raise InvalidValue("is not a duration", fix='write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


_Written = Annotated[str, Field(pattern=f"^{DURATION.pattern}$")] | float | Duration  # for the JSON schema
SomeDuration = Annotated[Duration, BeforeValidator(_read_duration, json_schema_input_type=_Written)]


def branches(annotation: Any) -> list[Any]:
    """The types of a union except None; any other type as it is."""
    union = get_origin(annotation) in (Union, UnionType)
    return [kind for kind in get_args(annotation) if kind is not type(None)] if union else [annotation]


def is_section(annotation: Any) -> bool:
    """True if a type is a section of the configuration."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def closest(name: str, known: list[str]) -> str:
    """The fix for an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _locate(root: type[BaseModel], path: tuple[Any, ...]) -> tuple[str, type[BaseModel]]:
    """The key of a fault as the user wrote it, without the names of union branches, and the section that holds it."""
    parts, section, kinds = [], root, branches(root)
    for part in path:
        kind = next((k for k in kinds if is_section(k) and part in k.model_fields), kinds[0])
        if is_section(kind):
            section = kind
            field = kind.model_fields.get(str(part))
            kinds = branches(field.annotation) if field else [None]
        elif get_origin(kind) in (dict, tuple):
            kinds = branches(get_args(kind)[get_origin(kind) is dict])
        else:
            break
        parts.append(str(part))
    return ".".join(parts), section


def _fault(fault: Any, root: type[BaseModel], phases: list[str]) -> ConfigError:
    (key, section), kind, path = _locate(root, fault["loc"]), fault["type"], fault["loc"]
    value = None if isinstance(fault["input"], dict | BaseModel) else fault["input"]
    if isinstance(error := fault.get("ctx", {}).get("error"), InvalidValue):
        key = ".".join(filter(None, (key, error.key)))
        value = error.value if error.key or error.value is not None else value
        return ConfigError(error.problem, key=key, value=value, fix=error.fix)
    if kind == "extra_forbidden":
        if key in RENAMED:
            return ConfigError("is renamed", key=key, fix=f"use {RENAMED[key]}")
        return ConfigError("there is no such key", key=key, fix=closest(str(path[-1]), list(section.model_fields)))
    if kind == "missing" and len(path) == 3 and path[::2] == ("phases", "thaw"):  # a mistyped name makes a new phase
        others = [name for name in phases if name != path[1]]
        return ConfigError(f"there is no phase {path[1]!r}", key=key, fix=closest(path[1], others))
    if kind == "missing":
        return ConfigError("is missing", key=key, fix=f"set {key}")
    match = re.match(r"\w+ should (?:be|have|match) (.+?)(?:, unable.*|, got.*| after.*)?$", fault["msg"])
    if not match:
        return ConfigError(fault["msg"], key=key, value=value, fix="see docs/configuration.md")
    allowed = re.sub(r"^(greater|less)", r"a value \1", match[1])
    return ConfigError("is not valid", key=key, value=value, fix=f"use {allowed}")


def config_error(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """The error whose `faults` are those that pydantic lists for `tree`, one per key."""
    phases = list(tree["phases"]) if isinstance(tree.get("phases"), dict) else []
    faults: dict[str | None, ConfigError] = {}
    for fault in (_fault(fault, root, phases) for fault in error.errors()):
        if (first := faults.setdefault(fault.key, fault)) is not fault:  # of another branch of a union
            first.fix = f"{first.fix} or {str(fault.fix).removeprefix('use ')}"
    return ConfigError.of_faults(faults.values())
