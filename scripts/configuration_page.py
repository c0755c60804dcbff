"""Write docs/configuration.md and conf/config.schema.json from the models in `trainer/config/`:
`python scripts/configuration_page.py`.
"""

import inspect
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer.config.base import Duration, Section
from trainer.config.keys import is_section, list_union_members
from trainer.config.model import Model
from trainer.config.phases import AutoPhases
from trainer.config.schema import RequestedConfig

ROOT = Path(__file__).parent.parent
PAGE, SCHEMA = ROOT / "docs" / "configuration.md", ROOT / "conf" / "config.schema.json"
INTRODUCTION = """# Configuration

Made by `python scripts/configuration_page.py` from `trainer/config/`; a test fails when it is stale.

Hydra composes the files under `conf/`, arguments of the command line override them, and the result is validated
before TensorFlow is imported: all errors are listed at once, an unknown key with the most similar known one. An
experiment chooses its data, model and augmentation by their groups, so that `data=image_folder` after `experiment=...`
replaces all settings of the data. With neither an experiment nor data, the run is the quickstart.

A duration is written "500 steps", "2 epochs" or "10000 examples"; a phase has exactly one of `epochs`, `steps`,
`examples`. `null` unsets a value. Three values can be `auto`, chosen once the training images have been counted:
`model.backbone`, `training.batch_size` and `phases` ([phases.md](phases.md#auto)).

`conf/config.yaml`, `conf/runtime/default.yaml` and `conf/debug/none.yaml` repeat the defaults of the most common keys,
so that `python -m trainer --cfg job` prints them; a test holds both equal.

`conf/config.schema.json` is the JSON schema of the configuration, made by the same script. An editor with the YAML
language server completes and checks the keys of a file in `conf/experiment/` that begins with

```yaml
# yaml-language-server: $schema=../config.schema.json
```

A renamed key is rejected with its new name; config.yaml files of earlier runs can have either name.
"""


def describe_type(annotation: Any) -> str:
    """Describe a field's type for users, such as "list of text"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Duration:
        return "duration"
    if origin is typing.Annotated:
        return describe_type(arguments[0]) + format_bounds(getattr(annotation.__metadata__[0], "metadata", ()))
    if origin is typing.Literal:
        return " ".join(f"`{a}`" for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe_type(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return "list of " + describe_type(arguments[0])
    if origin is dict:
        return "mapping of " + describe_type(arguments[1])
    if annotation in (Model, AutoPhases):
        return {Model: "the keys of `model`", AutoPhases: "`auto`"}[annotation]
    if is_section(annotation):
        return f"`{annotation.__name__.lower()}s`"
    return {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}[annotation.__name__]


def format_bounds(metadata: typing.Iterable[Any]) -> str:
    """Format the bounds of a number, such as " (>= 0, < 1)"; "" if there are none.

    `metadata` are the constraints of a pydantic field.
    """
    symbols = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    texts = [f"{sign} {getattr(m, k)}" for m in metadata for k, sign in symbols.items() if hasattr(m, k)]
    return f" ({', '.join(texts)})" if texts else ""


def format_default(value: Any) -> str:
    """Format a default as users write it."""
    match value:
        case Duration():
            return f"{value.count:g} {value.unit}"
        case tuple():
            return ", ".join(map(str, value)) or "none"
        case bool() | None:
            return {None: "null", True: "true", False: "false"}[value]
        case float():
            return f"{value:g}"
    return "must be given" if value is PydanticUndefined else str(value)


def list_sections(
    section: type[Section] = RequestedConfig, prefix: str = ""
) -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
    """List a section and its subsections as (prefix of the keys, meaning, fields by key), depth first.

    In prefixes, NAME is a substitute for the name of a phase. Fields that are sections are not among the fields.
    """
    own_fields, subsections = {}, []
    for name, field in section.model_fields.items():
        first, *others = list_union_members(field.annotation)
        has_phase_names = typing.get_origin(first) is dict and section is RequestedConfig
        section_type = typing.get_args(first)[1] if has_phase_names else first
        if (
            is_section(section_type)
            and section_type is not Duration
            and not (section_type is Model and section is not RequestedConfig)
        ):
            subsections.append((section_type, f"{prefix}{name}." + "NAME." * has_phase_names, field))
            subsections += [(other, f"{prefix}{name}.", field) for other in others if is_section(other)]
        else:
            own_fields[f"{prefix}{name}"] = field
    if section is not AutoPhases:
        yield prefix, inspect.getdoc(section) or "", own_fields
    for section_type, path, field in subsections:
        for section_prefix, text, fields in list_sections(section_type, path):
            yield (
                section_prefix,
                text + " Null by default." * (section_prefix == path and field.default is None),
                fields,
            )


def format_page() -> str:
    """Format the content of docs/configuration.md."""
    lines = [INTRODUCTION]
    for prefix, meaning, fields in list_sections():
        lines += [f"## {prefix}*\n", f"{meaning}\n"] if prefix else []
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in fields.items():
            text = " ".join((field.description or "").split())
            type_text = describe_type(field.annotation) + format_bounds(field.metadata)
            lines.append(f"| `{key}` | {type_text} | {format_default(field.default)} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def format_schema() -> str:
    """Format the content of conf/config.schema.json. No key is required there, because groups set the other keys."""
    tree = RequestedConfig.model_json_schema()
    for definition in (tree, *tree["$defs"].values()):
        definition.pop("required", None)
        definition.pop("title")
        for field in definition["properties"].values():
            field.pop("title", None)
    tree["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **tree,
        "title": "kubetune configuration",
    }
    return json.dumps(document, indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(format_page())
    SCHEMA.write_text(format_schema())
