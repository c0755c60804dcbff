"""The base class of configuration sections, and the translation of pydantic's errors to `ConfigError`."""

import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from trainer.config.keys import is_section, list_keys, list_union_members, suggest_key, suggest_name
from trainer.errors import ConfigError
from trainer.names import is_utf8

RENAMED_KEYS = {"runtime.max_fruitless_restarts": "runtime.max_restarts_without_progress"}  # old key -> new key


class Section(BaseModel):
    """Base class of the configuration's sections. Sections are frozen, and an unknown key is an error.

    docs/configuration.md and the JSON schema contain the docstrings of sections and fields.
    """

    # Numbers become strings if a key takes a string, because a class or run can be named 2024.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject true and false for a number, since pydantic would convert them to 1 and 0."""
        types = list_union_members(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in types and {int, float} & set(types):
            raise InvalidValue("is not a number", value=str(value).lower(), fix="use a number")
        return value

    @field_validator("*")
    @classmethod
    def _require_utf8(cls, value: Any) -> Any:
        """Reject a string that cannot be encoded as UTF-8 or has a null character."""
        if isinstance(value, str) and not is_utf8(value):
            raise InvalidValue("is not UTF-8", value=value, fix="rename it, or give a link to it with such a name")
        if isinstance(value, str) and "\0" in value:
            raise InvalidValue("has a null character", value=value, fix="write it without that character")
        return value


class InvalidValue(ConfigError, ValueError):
    """Raised by validators. `key` is relative to the validated section, or None if the validated value is invalid."""


class Duration(Section):
    """A length of training, written as "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0, le=1e12)
    """Number of units."""
    unit: Literal["epochs", "steps", "examples"]
    """Unit of `count`."""

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """Convert to optimizer steps, rounded to the nearest integer, but at least 1 unless `count` is 0.

        `batch_size` is the global batch size, in examples per step.
        """
        steps_per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * steps_per_unit), 1 if self.count > 0 else 0)


MAX_COUNT = 2**31 - 1  # largest count, such as of steps or units; TensorFlow stores many counts as int32
_DURATION = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(epoch|step|example)s?\s*")


def _parse_duration(value: Any) -> Any:
    """Convert "2 epochs", or a number of steps, to the fields of `Duration`. Return any other value unchanged."""
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


def _require_positive_duration(duration: Duration) -> Duration:
    if not duration.count:
        raise InvalidValue("is nothing", fix="use a length above 0")
    return duration


PositiveDuration = Annotated[DurationSetting, AfterValidator(_require_positive_duration)]


def check_address(text: str) -> str:
    """Return `text` unchanged if it is a local path or a gs:// or s3:// address.

    Raises InvalidValue for an address with another scheme, or without a bucket.
    """
    match = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/?.*)", text, re.S)
    if not match or re.match("(gs|s3)://[^/]", text):
        return text
    scheme, path = match[1].lower(), match[2].lstrip("/")
    if bucket_scheme := _BUCKET_SCHEMES.get(scheme):
        fix = f"write {bucket_scheme}://{path or 'bucket/folder'}"
        raise InvalidValue("is not the address of a bucket", value=text, fix=fix)
    if not match[2].startswith("/"):  # a file name with a colon
        return text
    if scheme == "file":
        raise InvalidValue("is a URL", value=text, fix=f"write the path: /{path}")
    fix = "copy it to a local disk, gs:// or s3://, and give that address"
    raise InvalidValue(f"is at {scheme}://, and only local paths, gs:// and s3:// can be read", value=text, fix=fix)


_BUCKET_SCHEMES = {"gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3", "s3n": "s3"}  # scheme in other tools -> scheme
Address = Annotated[str, AfterValidator(check_address)]


def _locate_key(root: type[BaseModel], path: tuple[Any, ...]) -> tuple[str, type[BaseModel]]:
    """Return an error's dotted key, and the section type that has the key.

    `root` is the section type that was validated. `path` is the error's location in pydantic's form, such as ("phases",
    "head", "epochs"). It can also have names of union members, such as "tuple[float,float]", which the key omits.
    """
    names = []
    section = root
    types = list_union_members(root)
    for name in path:
        type_ = next((member for member in types if is_section(member) and name in member.model_fields), types[0])
        if is_section(type_):
            section = type_
            field = type_.model_fields.get(str(name))
            types = list_union_members(field.annotation) if field else [None]
        elif len(types) > 1 and (match := re.match(r"(dict|tuple)\[", str(name))):  # pydantic's name of a union member
            types = [next(t for t in types if get_origin(t) is {"dict": dict, "tuple": tuple}[match[1]])]
            continue
        elif get_origin(type_) in (dict, tuple):
            types = list_union_members(get_args(type_)[get_origin(type_) is dict])
        else:
            break
        names.append(str(name))
    return ".".join(names), section


_FIXES = {  # error type of pydantic -> fix, because pydantic's own messages name Python types
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


def _suggest_key_of_section(key: str, value: Any, section: type[BaseModel]) -> str:
    """Return the fix if the section `key` is set to a plain value: to set a key in the section instead."""
    types_by_key = {name: list_union_members(field.annotation) for name, field in section.model_fields.items()}
    if isinstance(value, str) and "name" in types_by_key:
        return f"write {key}.name={value}"
    numeric_keys = [name for name, types in types_by_key.items() if {int, float} & set(types)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"set a key in it, such as {key}.{(numeric_keys if is_number and numeric_keys else list(types_by_key))[0]}"


def _translate(details: Any, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """Translate `details`, one entry of pydantic's `ValidationError.errors()`, to a ConfigError.

    `root` and `tree` are the section type and the nested dicts that were validated.
    """
    (key, _), error_type, path = _locate_key(root, details["loc"]), details["type"], details["loc"]
    value = None if isinstance(details["input"], dict | BaseModel) else details["input"]
    if isinstance(error := details.get("ctx", {}).get("error"), InvalidValue):
        key = ".".join(filter(None, (key, error.key)))
        value = error.value if error.key or error.value is not None else value
        return ConfigError(error.problem, key=key, value=value, fix=error.fix)
    if error_type == "extra_forbidden":
        if key in RENAMED_KEYS:
            return ConfigError("has been renamed", key=key, fix=f"use {RENAMED_KEYS[key]}")
        return ConfigError(
            "there is no such key", key=key, fix=suggest_key(key, list_keys(root, tree), details["input"])
        )
    if error_type.startswith("model_") and not isinstance(details["input"], dict):
        phases = (
            {name: phase for name, phase in tree.get("phases", {}).items() if isinstance(phase, dict)}
            if path[0] == "phases"
            else {}
        )
        fix = suggest_key(key, list_keys(root, tree | {"phases": phases})) if path[0] == "phases" else "known"
        section_fix = _suggest_key_of_section(key, value, _locate_key(root, (*path, ""))[1])
        suggests_other_key = fix.startswith("did") and f" {key}?" not in fix and f" {key}." not in fix
        return ConfigError(
            "has keys, not a value", key=key, value=value, fix=fix if suggests_other_key else section_fix
        )
    # A misspelled name makes a new phase, which has no `thaw`.
    if error_type == "missing" and len(path) == 3 and path[::2] == ("phases", "thaw"):
        other_phases = [name for name in tree["phases"] if name != path[1]]
        return ConfigError(f"there is no phase {path[1]!r}", key=key, fix=suggest_name(path[1], other_phases))
    if error_type == "missing":
        return ConfigError("is missing", key=key, fix=f"set {key}")
    if error_type in _FIXES:
        return ConfigError("is not valid", key=key, value=value, fix=_FIXES[error_type])
    match = re.match(r"\w+ should (?:be|have|match) (.+?)(?:, unable.*|, got.*| after.*)?$", details["msg"])
    if not match:
        return ConfigError(details["msg"], key=key, value=value, fix="see docs/configuration.md")
    allowed_values = re.sub(r"^(greater|less)", r"a value \1", match[1])
    return ConfigError("is not valid", key=key, value=value, fix=f"use {allowed_values}")


def _has_nested_error(path: tuple[Any, ...], error: ValidationError) -> bool:
    """Return whether `error` also has an error inside another member of the union at `path`."""
    return any(
        details["loc"][: len(path) - 1] == path[:-1] and len(details["loc"]) > len(path) for details in error.errors()
    )


def translate_validation_error(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> ConfigError:
    """Translate pydantic's errors to one ConfigError, whose `errors` are one ConfigError per key.

    Args:
        error: pydantic's exception.
        root: section type that was validated.
        tree: nested dicts that were validated.
    """
    error_by_key: dict[str | None, ConfigError] = {}
    for details in error.errors():
        if (
            details["type"] in ("literal_error", "tuple_type", "dict_type")
            and isinstance(details["input"], dict | list)
            and _has_nested_error(details["loc"], error)
        ):
            continue  # the value is meant for another member of the union, whose error is reported
        translated = _translate(details, root, tree)
        if (
            first_error := error_by_key.setdefault(translated.key, translated)
        ) is not translated:  # from another member of a union
            first_error.fix = f"{first_error.fix} or {str(translated.fix).removeprefix('use ')}"
    return ConfigError.combine(error_by_key.values())
