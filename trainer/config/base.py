"""The base class of configuration sections, and the translation of pydantic's errors to `ConfigError`."""

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from trainer.config.keys import is_section, list_keys, list_union_members, suggest_key, suggest_name
from trainer.errors import ConfigError
from trainer.names import is_utf8

RENAMED = {"runtime.max_fruitless_restarts": "runtime.max_restarts_without_progress"}  # old key -> new key


class Section(BaseModel):
    """A frozen section of the configuration, without unknown keys. docs/configuration.md prints the docstrings."""

    # Numbers are coerced to text, because a class or run can be named 2024.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject true and false for numbers, since pydantic would convert them to 1 and 0."""
        kinds = list_union_members(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise InvalidValue("is not a number", value=str(value).lower(), fix="use a number")
        return value

    @field_validator("*")
    @classmethod
    def _require_utf8(cls, value: Any) -> Any:
        if isinstance(value, str) and not is_utf8(value):
            raise InvalidValue("is not UTF-8", value=value, fix="rename it, or give a link to it with such a name")
        if isinstance(value, str) and "\0" in value:
            raise InvalidValue("has a null character", value=value, fix="write it without that character")
        return value


class InvalidValue(ConfigError, ValueError):
    """An error of a validator. Its `key` is relative to the validated section; None is the section itself."""


class Duration(Section):
    """A length of training, written as "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0, le=1e12)
    """Number of units."""
    unit: Literal["epochs", "steps", "examples"]
    """Unit of `count`."""

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """Convert to optimizer steps, rounded to the nearest integer; at least 1 unless `count` is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


MAX_COUNT = 2**31 - 1  # of steps and sizes, many of which TensorFlow stores with 32 bits
_DURATION = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(epoch|step|example)s?\s*")


def _parse_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            raise InvalidValue("is not a duration", fix='write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


_DurationInput = Annotated[str, Field(pattern=f"^{_DURATION.pattern}$")] | float | Duration  # for the JSON schema
DurationSetting = Annotated[Duration, BeforeValidator(_parse_duration, json_schema_input_type=_DurationInput)]


def _require_some(duration: Duration) -> Duration:
    if not duration.count:
        raise InvalidValue("is nothing", fix="use a length above 0")
    return duration


PositiveDuration = Annotated[DurationSetting, AfterValidator(_require_some)]


def check_address(text: str) -> str:
    """Return a local path or the address of a bucket unchanged; raise an InvalidValue for any other scheme."""
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/?.*)", text, re.S)
    if not scheme or re.match("(gs|s3)://[^/]", text):
        return text
    name, rest = scheme[1].lower(), scheme[2].lstrip("/")
    if bucket := _BUCKET_SCHEMES.get(name):
        fix = f"write {bucket}://{rest or 'bucket/folder'}"
        raise InvalidValue("is not the address of a bucket", value=text, fix=fix)
    if not scheme[2].startswith("/"):  # a file name with a colon
        return text
    if name == "file":
        raise InvalidValue("is a URL", value=text, fix=f"write the path: /{rest}")
    fix = "copy it to a local disk, gs:// or s3://, and give that address"
    raise InvalidValue(f"is at {name}://, and only local paths, gs:// and s3:// can be read", value=text, fix=fix)


_BUCKET_SCHEMES = {"gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3", "s3n": "s3"}  # as people write them
Address = Annotated[str, AfterValidator(check_address)]


def _locate(root: type[BaseModel], path: tuple[Any, ...]) -> tuple[str, type[BaseModel]]:
    """Return the key at pydantic's `path`, without its names of union members, and the section that holds the key."""
    names, section, kinds = [], root, list_union_members(root)
    for name in path:
        kind = next((k for k in kinds if is_section(k) and name in k.model_fields), kinds[0])
        if is_section(kind):
            section = kind
            field = kind.model_fields.get(str(name))
            kinds = list_union_members(field.annotation) if field else [None]
        elif len(kinds) > 1 and (member := re.match(r"(dict|tuple)\[", str(name))):  # pydantic's name of a union member
            kinds = [next(k for k in kinds if get_origin(k) is {"dict": dict, "tuple": tuple}[member[1]])]
            continue
        elif get_origin(kind) in (dict, tuple):
            kinds = list_union_members(get_args(kind)[get_origin(kind) is dict])
        else:
            break
        names.append(str(name))
    return ".".join(names), section


_FIXES = {  # error type of pydantic -> fix, since its own messages name Python types
    "string_type": "use a text",
    "tuple_type": "use a list, such as [a,b]",
    "dict_type": "use a value for each name, such as {a: 1, b: 2}",
    "bool_type": "use true or false",
    "bool_parsing": "use true or false",
    "int_from_float": "use a whole number",
    "int_type": "use a whole number",
    "int_parsing": "use a whole number",
    "int_parsing_size": "use a smaller number",
    "float_type": "use a number",
    "float_parsing": "use a number",
    "finite_number": "use a finite number",
}


def _key_of_value(key: str, value: Any, section: type[BaseModel]) -> str:
    """Return the fix for a section that was given a value: the key in it that has a value of this kind."""
    kinds = {name: list_union_members(field.annotation) for name, field in section.model_fields.items()}
    if isinstance(value, str) and "name" in kinds:
        return f"write {key}.name={value}"
    numbers = [name for name, members in kinds.items() if {int, float} & set(members)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"set a key in it, such as {key}.{(numbers if is_number and numbers else list(kinds))[0]}"


def _translate(details: Any, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """Translate one entry of `ValidationError.errors()` for the validated `tree`."""
    (key, _), kind, path = _locate(root, details["loc"]), details["type"], details["loc"]
    value = None if isinstance(details["input"], dict | BaseModel) else details["input"]
    if isinstance(error := details.get("ctx", {}).get("error"), InvalidValue):
        key = ".".join(filter(None, (key, error.key)))
        value = error.value if error.key or error.value is not None else value
        return ConfigError(error.problem, key=key, value=value, fix=error.fix)
    if kind == "extra_forbidden":
        if key in RENAMED:
            return ConfigError("has been renamed", key=key, fix=f"use {RENAMED[key]}")
        return ConfigError(
            "there is no such key", key=key, fix=suggest_key(key, list_keys(root, tree), details["input"])
        )
    if kind.startswith("model_") and not isinstance(details["input"], dict):
        rest = {n: v for n, v in tree.get("phases", {}).items() if isinstance(v, dict)} if path[0] == "phases" else {}
        fix = suggest_key(key, list_keys(root, tree | {"phases": rest})) if path[0] == "phases" else "known"
        inside = _key_of_value(key, value, _locate(root, (*path, ""))[1])
        is_other = fix.startswith("did") and f" {key}?" not in fix and f" {key}." not in fix
        return ConfigError("has keys, not a value", key=key, value=value, fix=fix if is_other else inside)
    if kind == "missing" and len(path) == 3 and path[::2] == ("phases", "thaw"):  # a mistyped name makes a new phase
        others = [name for name in tree["phases"] if name != path[1]]
        return ConfigError(f"there is no phase {path[1]!r}", key=key, fix=suggest_name(path[1], others))
    if kind == "missing":
        return ConfigError("is missing", key=key, fix=f"set {key}")
    if kind in _FIXES:
        return ConfigError("is not valid", key=key, value=value, fix=_FIXES[kind])
    match = re.match(r"\w+ should (?:be|have|match) (.+?)(?:, unable.*|, got.*| after.*)?$", details["msg"])
    if not match:
        return ConfigError(details["msg"], key=key, value=value, fix="see docs/configuration.md")
    allowed = re.sub(r"^(greater|less)", r"a value \1", match[1])
    return ConfigError("is not valid", key=key, value=value, fix=f"use {allowed}")


def _has_nested_error(path: tuple[Any, ...], error: ValidationError) -> bool:
    """Return whether another member of the union at `path` has an error at a nested key."""
    return any(d["loc"][: len(path) - 1] == path[:-1] and len(d["loc"]) > len(path) for d in error.errors())


def translate_validation_error(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """Translate pydantic's errors for `tree` into one error, with one of its `faults` per key."""
    faults: dict[str | None, ConfigError] = {}
    for details in error.errors():
        if (
            details["type"] in ("literal_error", "tuple_type", "dict_type")
            and isinstance(details["input"], dict | list)
            and _has_nested_error(details["loc"], error)
        ):
            continue  # the value belongs to another member of the union, which has the fault
        fault = _translate(details, root, tree)
        if (other := faults.setdefault(fault.key, fault)) is not fault:  # from another member of a union
            other.fix = f"{other.fix} or {str(fault.fix).removeprefix('use ')}"
    return ConfigError.of_faults(faults.values())
