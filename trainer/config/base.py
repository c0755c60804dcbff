"""The base class of the sections of the configuration, and the translation of pydantic's errors to `ConfigError`."""

import difflib
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError

RENAMED = {"runtime.max_fruitless_restarts": "runtime.max_restarts_without_progress"}  # old key -> new key


class Section(BaseModel):
    """A frozen section of the configuration, without unknown keys; docs/configuration.md prints its docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class InvalidValue(ConfigError, ValueError):
    """An error raised by a validator; its `key` is relative to the validated section, and None means the section."""


class Duration(Section):
    """A length of training, written as "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0)
    """Number of units."""
    unit: Literal["epochs", "steps", "examples"]
    """Unit of `count`."""

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """Convert to optimizer steps, rounded to the nearest integer; at least 1 unless `count` is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


_DURATION = re.compile(r"\s*([0-9.eE+]+)\s*(epoch|step|example)s?\s*")


def _read_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            raise InvalidValue("is not a duration", fix='write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


_DurationInput = Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")] | float | Duration  # for the JSON schema
DurationSetting = Annotated[Duration, BeforeValidator(_read_duration, json_schema_input_type=_DurationInput)]


def union_members(annotation: Any) -> list[Any]:
    """List the types of a union except None; any other type is returned as the only one."""
    union = get_origin(annotation) in (Union, UnionType)
    return [kind for kind in get_args(annotation) if kind is not type(None)] if union else [annotation]


def is_section(annotation: Any) -> bool:
    """Return whether a type is a section of the configuration."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def suggest_name(name: str, known: list[str]) -> str:
    """Return the fix for an unknown name: a known one that is similar, or else all of them."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _locate(root: type[BaseModel], path: tuple[Any, ...]) -> tuple[str, type[BaseModel]]:
    """Return the key at pydantic's `path`, without its names of union members, and the section that holds the key."""
    parts, section, kinds = [], root, union_members(root)
    for part in path:
        kind = next((k for k in kinds if is_section(k) and part in k.model_fields), kinds[0])
        if is_section(kind):
            section = kind
            field = kind.model_fields.get(str(part))
            kinds = union_members(field.annotation) if field else [None]
        elif get_origin(kind) in (dict, tuple):
            kinds = union_members(get_args(kind)[get_origin(kind) is dict])
        else:
            break
        parts.append(str(part))
    return ".".join(parts), section


def _translate(details: Any, root: type[BaseModel], phases: list[str]) -> ConfigError:
    """Translate one entry of `ValidationError.errors()`; `phases` are the names of the configured phases."""
    (key, section), kind, path = _locate(root, details["loc"]), details["type"], details["loc"]
    value = None if isinstance(details["input"], dict | BaseModel) else details["input"]
    if isinstance(error := details.get("ctx", {}).get("error"), InvalidValue):
        key = ".".join(filter(None, (key, error.key)))
        value = error.value if error.key or error.value is not None else value
        return ConfigError(error.problem, key=key, value=value, fix=error.fix)
    if kind == "extra_forbidden":
        if key in RENAMED:
            return ConfigError("has been renamed", key=key, fix=f"use {RENAMED[key]}")
        return ConfigError("there is no such key", key=key, fix=suggest_name(str(path[-1]), list(section.model_fields)))
    if kind == "missing" and len(path) == 3 and path[::2] == ("phases", "thaw"):  # a mistyped name makes a new phase
        others = [name for name in phases if name != path[1]]
        return ConfigError(f"there is no phase {path[1]!r}", key=key, fix=suggest_name(path[1], others))
    if kind == "missing":
        return ConfigError("is missing", key=key, fix=f"set {key}")
    match = re.match(r"\w+ should (?:be|have|match) (.+?)(?:, unable.*|, got.*| after.*)?$", details["msg"])
    if not match:
        return ConfigError(details["msg"], key=key, value=value, fix="see docs/configuration.md")
    allowed = re.sub(r"^(greater|less)", r"a value \1", match[1])
    return ConfigError("is not valid", key=key, value=value, fix=f"use {allowed}")


def config_error(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """Translate the errors that pydantic lists for `tree` into one error, whose `faults` are one per key."""
    phases = list(tree["phases"]) if isinstance(tree.get("phases"), dict) else []
    faults: dict[str | None, ConfigError] = {}
    for fault in (_translate(details, root, phases) for details in error.errors()):
        if (first := faults.setdefault(fault.key, fault)) is not fault:  # from another member of a union
            first.fix = f"{first.fix} or {str(fault.fix).removeprefix('use ')}"
    return ConfigError.of_faults(faults.values())
