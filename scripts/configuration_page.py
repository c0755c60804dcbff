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
before TensorFlow is imported: all faults are listed at once, an unknown key with the nearest known one. An experiment
chooses its data, model and augmentation by their groups, so that `data=image_folder` after `experiment=...` replaces
the data as a whole. With neither an experiment nor data, the run is the quickstart.

A duration is written "500 steps", "2 epochs" or "10000 examples"; a phase has exactly one of `epochs`, `steps`,
`examples`. `null` unsets a value. Three values can be `auto`, chosen once the training images have been counted:
`model.backbone`, `training.batch_size` and `phases` ([phases.md](phases.md#auto)).

`conf/config.yaml`, `conf/runtime/default.yaml` and `conf/debug/none.yaml` repeat the defaults of the most common keys,
so that `python -m trainer --cfg job` prints them; a test holds both equal.

`conf/config.schema.json` is the JSON schema of the whole, made by the same script. An editor with the YAML language
server completes and checks the keys of a file in `conf/experiment/` that begins with

```yaml
# yaml-language-server: $schema=../config.schema.json
```

A renamed key is refused with its new name; config.yaml files of earlier runs are read with either.
"""


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Duration:
        return "duration"
    if origin is typing.Annotated:
        return kind(arguments[0]) + bounds(getattr(annotation.__metadata__[0], "metadata", ()))
    if origin is typing.Literal:
        return " ".join(f"`{a}`" for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return "list of " + kind(arguments[0])
    if origin is dict:
        return "mapping of " + kind(arguments[1])
    if annotation in (Model, AutoPhases):
        return {Model: "the keys of `model`", AutoPhases: "`auto`"}[annotation]
    if is_section(annotation):
        return f"`{annotation.__name__.lower()}s`"
    return {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}[annotation.__name__]


def bounds(metadata: typing.Iterable[Any]) -> str:
    """The bounds of a number as text."""
    symbols = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    texts = [f"{sign} {getattr(m, k)}" for m in metadata for k, sign in symbols.items() if hasattr(m, k)]
    return f" ({', '.join(texts)})" if texts else ""


def default(value: Any) -> str:
    """A default as it is written."""
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


def sections(
    section: type[Section] = RequestedConfig, prefix: str = ""
) -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
    """Prefix, meaning and plain fields of a section and of those below it; NAME is the name of any phase."""
    plain, below = {}, []
    for name, field in section.model_fields.items():
        first, *others = list_union_members(field.annotation)
        whole = typing.get_origin(first) is dict and section is RequestedConfig
        inner = typing.get_args(first)[1] if whole else first
        if is_section(inner) and inner is not Duration and not (inner is Model and section is not RequestedConfig):
            below.append((inner, f"{prefix}{name}." + "NAME." * whole, field))
            below += [(other, f"{prefix}{name}.", field) for other in others if is_section(other)]
        else:
            plain[f"{prefix}{name}"] = field
    if section is not AutoPhases:
        yield prefix, inspect.getdoc(section) or "", plain
    for inner, path, field in below:
        for at, text, fields in sections(inner, path):
            yield at, text + " Null by default." * (at == path and field.default is None), fields


def page() -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for prefix, meaning, fields in sections():
        lines += [f"## {prefix}*\n", f"{meaning}\n"] if prefix else []
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in fields.items():
            text = " ".join((field.description or "").split())
            lines.append(
                f"| `{key}` | {kind(field.annotation)}{bounds(field.metadata)} | {default(field.default)} | {text} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def schema() -> str:
    """The text of conf/config.schema.json, in which no key is required (groups set the others)."""
    tree = RequestedConfig.model_json_schema()
    for part in (tree, *tree["$defs"].values()):
        part.pop("required", None)
        part.pop("title")
        for field in part["properties"].values():
            field.pop("title", None)
    tree["properties"] |= {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "kubetune configuration"}
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    SCHEMA.write_text(schema())
