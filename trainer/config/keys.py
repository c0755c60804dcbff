"""The keys of the configuration: what kind of value each has, and which ones are similar to a mistyped one."""

import difflib
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

# Names that other tools have for a key.
_ALIASES = {"lr": "learning_rate", "batch": "batch_size", "bs": "batch_size", "gpus": "replicas", "epoch": "epochs",
            "num_epochs": "epochs", "img_size": "image_size", "size": "image_size", "input_size": "image_size",
            "output": "output_dir", "run_name": "experiment_name", "num_workers": "data_threads", "path": "root",
            "gpu": "replicas", "out": "output_dir", "folder": "root", "scheduler": "schedule",
            "model.name": "model.backbone", "wd": "weight_decay", "classes": "class_names", "pretrained": "weights",
            "val_split": "validation_fraction", "val_fraction": "validation_fraction"}  # fmt: skip
_MAX_SUGGESTED = 3
Kind = Literal["text", "texts", "weights", "other"]


def union_members(annotation: Any) -> list[Any]:
    """List the types of a union except None, without their constraints; any other type is returned as the only one."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if union else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]


def is_section(annotation: Any) -> bool:
    """Return whether a type is a section of the configuration."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def suggest_name(name: str, known: list[str]) -> str:
    """Return the fix for an unknown name: a known one that is similar, or else all of them."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def keys_of(root: type[BaseModel], tree: Any = None) -> list[str]:
    """List the keys below a section, depth first; those of named phases for the names in `tree`."""
    keys = []
    for name, field in root.model_fields.items():
        branch = (tree.get(name) if isinstance(tree, dict) else None) or {}
        section, named = _sections(field.annotation, branch)
        if named:
            keys += [f"{name}.{phase}.{key}" for phase in branch for key in keys_of(named, branch[phase])]
        else:
            keys += [f"{name}.{key}" for key in keys_of(section, branch)] if section else [name]
    return keys


def with_defaults(root: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Return a composed tree with the default of each key that it lacks, in the order of the schema."""
    values: dict[str, Any] = {}
    for name, field in root.model_fields.items():
        value = tree.get(name, field.default)
        section, named = _sections(field.annotation, value)
        if isinstance(value, BaseModel):
            value = _as_typed(value.model_dump(mode="json"))
        elif named and isinstance(value, dict):
            value = {n: with_defaults(named, v) if isinstance(v, dict) else v for n, v in value.items()}
        elif section and isinstance(value, dict):
            value = with_defaults(section, value)
        if name in tree or not field.is_required():
            values[name] = list(value) if isinstance(value, tuple) else value
    return values | {name: value for name, value in tree.items() if name not in values}


def _as_typed(value: Any) -> Any:
    """Write each length of training in a dumped section as it is typed: {count: 2, unit: epochs} -> "2 epochs"."""
    if isinstance(value, dict) and value.keys() == {"count", "unit"}:
        return f"{value['count']:g} {value['unit']}"
    return {key: _as_typed(each) for key, each in value.items()} if isinstance(value, dict) else value


def _sections(annotation: Any, tree: Any) -> tuple[type[BaseModel] | None, type[BaseModel] | None]:
    """Return the section of a key's type, and the section of each name if it is a dict of them, as `tree` chooses."""
    members = union_members(annotation)
    section = next((kind for kind in members if is_section(kind) and "unit" not in kind.model_fields), None)
    named = next((get_args(k)[1] for k in members if get_origin(k) is dict and is_section(get_args(k)[1])), None)
    if named and section and isinstance(tree, dict) and section.model_fields.keys() & tree.keys():
        named = None
    return section, named


def kind_of(root: type[BaseModel], key: str) -> Kind:
    """Return the kind of value of a key: text, a list of texts, weights by class name, or other."""
    kinds: list[Any] = [root]
    for part in key.split("."):
        section = next((k for k in kinds if is_section(k) and part in k.model_fields), None)
        named = next((k for k in kinds if get_origin(k) is dict and is_section(get_args(k)[1])), None)
        if section:
            kinds = union_members(section.model_fields[part].annotation)
        elif named:
            kinds = [get_args(named)[1]]
        else:
            return "other"
    if str in kinds and not {int, float} & set(kinds):
        return "text"
    if any(
        get_origin(kind) is dict and get_args(kind)[0] is str and not is_section(get_args(kind)[1]) for kind in kinds
    ):
        return "weights"
    items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    return "texts" if any(item is str or get_origin(item) is Literal for item in items) else "other"


def suggest_key(key: str, known: list[str], tree: Any = None) -> str:
    """Return the fix for an unknown key: similar keys anywhere in the tree, or else those of its section.

    `tree` is its value: of `head: {epochs: 3}` the key that is meant is one that ends with `head.epochs`.
    """
    if isinstance(tree, dict) and tree:
        if near := _with_parts(f"{key}.{first_path(tree)}", known):
            return _did_you_mean(near)
        name, branch = next(iter(tree.items()))
        below = suggest_key(f"{key}.{name}", [k for k in known if f".{k}".endswith(f".{key}.{name}")], branch)
        here = suggest_key(key, known)
        if below.startswith("did") or here.startswith("did"):
            return below if below.startswith("did") else here
        return suggest_key(f"{key}.{name}", known, branch)
    section, _, name = key.rpartition(".")
    prefix = section + "." * bool(section)
    siblings = list(dict.fromkeys(prefix + k.removeprefix(prefix).split(".")[0] for k in known if k.startswith(prefix)))
    wanted = _ALIASES.get(name, name)
    near = (
        [k for k in known if k == _ALIASES.get(key)]
        or _close(key, siblings, prefix, 0.75)
        or [k for k in known if f".{k}".endswith(f".{key}")]
        or _named(wanted, [k for k in known if k.startswith(prefix)])
        or _named(wanted, known)
        or _close(key, siblings, prefix, 0.5)
        or [k for last in difflib.get_close_matches(wanted, {k.rpartition(".")[2] for k in known}, 1, 0.7)
            for k in _named(last, known)]
    )  # fmt: skip
    if not near and key != key.lower():
        return suggest_key(key.lower(), known)
    if not near:
        names = [k.removeprefix(prefix) for k in siblings] or list(dict.fromkeys(k.split(".")[0] for k in known))
        return f"known: {', '.join(names)}"
    return _did_you_mean(near)


def _did_you_mean(keys: list[str]) -> str:
    *others, last = keys[:_MAX_SUGGESTED]
    return f"did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def first_path(tree: dict[str, Any]) -> str:
    """Return the key of the first value in a tree: {"head": {"epochs": 3}} -> "head.epochs"."""
    name, branch = next(iter(tree.items()))
    return f"{name}.{first_path(branch)}" if isinstance(branch, dict) and branch else str(name)


def _with_parts(key: str, known: list[str]) -> list[str]:
    """Return the known keys that have all parts of a key, in its order, and the same last part."""
    *path, name = key.split(".")
    wanted, matching = _ALIASES.get(name, name), []
    for candidate in known:
        *parents, last = candidate.split(".")
        rest = iter(parents)
        if last == wanted and all(part in rest for part in path):
            matching.append(candidate)
    return matching


def _named(name: str, keys: list[str]) -> list[str]:
    """Return the keys with this last part, or else the first one in each section of this name."""
    same = [key for key in keys if key.rpartition(".")[2] == name]
    inside = {f"{key}.".partition(f"{name}.")[0]: key for key in reversed(keys) if f".{name}." in f".{key}"}
    return same or list(reversed(inside.values()))


def _close(key: str, siblings: list[str], prefix: str, cutoff: float) -> list[str]:
    names = [sibling.removeprefix(prefix) for sibling in siblings]
    return [prefix + name for name in difflib.get_close_matches(key.removeprefix(prefix), names, 1, cutoff)]
