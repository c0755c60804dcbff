"""The configuration keys: their kinds of values, and suggestions for mistyped ones."""

import difflib
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

# Name in other tools -> key.
_ALIASES = {"lr": "learning_rate", "batch": "batch_size", "bs": "batch_size", "gpus": "replicas", "epoch": "epochs",
            "num_epochs": "epochs", "img_size": "image_size", "size": "image_size", "input_size": "image_size",
            "output": "output_dir", "run_name": "experiment_name", "num_workers": "data_threads", "path": "root",
            "gpu": "replicas", "out": "output_dir", "folder": "root", "scheduler": "schedule",
            "model.name": "model.backbone", "wd": "weight_decay", "classes": "class_names", "pretrained": "weights",
            "val_split": "validation_fraction", "val_fraction": "validation_fraction"}  # fmt: skip
_MAX_SUGGESTED = 3
Kind = Literal["text", "texts", "weights", "names", "other"]


def list_union_members(annotation: Any) -> list[Any]:
    """List the types of a union except None, or the only type otherwise, without constraints (`Annotated`)."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if union else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]


def is_section(annotation: Any) -> bool:
    """Return whether a type is a configuration section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def suggest_name(name: str, known: list[str]) -> str:
    """Suggest a similar known name, or list all known names."""
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def list_keys(root: type[BaseModel], tree: Any = None, inside: bool = False) -> list[str]:
    """List the keys below a section, depth first. Keys of phases are listed for the phase names in `tree`.

    A section that is null within another one (`inside`), such as the model of a teacher, is one key.
    """
    keys = []
    for name, field in root.model_fields.items():
        branch = (tree.get(name) if isinstance(tree, dict) else None) or {}
        section, named = _sections(field.annotation, branch)
        if inside and (named or section) and field.default is None and not branch:
            keys.append(name)
        elif named:
            keys += [f"{name}.{phase}.{key}" for phase in branch for key in list_keys(named, branch[phase], True)]
        else:
            keys += [f"{name}.{key}" for key in list_keys(section, branch, True)] if section else [name]
    return keys


def add_defaults(root: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of missing keys to a composed tree, in the order of the schema."""
    values: dict[str, Any] = {}
    for name, field in root.model_fields.items():
        value = tree.get(name, field.default)
        section, named = _sections(field.annotation, value)
        if isinstance(value, BaseModel):
            value = _as_typed(value.model_dump(mode="json"))
        elif named and isinstance(value, dict):
            value = {n: add_defaults(named, v) if isinstance(v, dict) else v for n, v in value.items()}
        elif section and isinstance(value, dict):
            value = add_defaults(section, value)
        if name in tree or not field.is_required():
            values[name] = list(value) if isinstance(value, tuple) else value
    return values | {name: value for name, value in tree.items() if name not in values}


def _as_typed(value: Any) -> Any:
    """Write each length of training in a dumped section as it is typed: {count: 2, unit: epochs} -> "2 epochs"."""
    if isinstance(value, dict) and value.keys() == {"count", "unit"}:
        return f"{value['count']:g} {value['unit']}"
    return {key: _as_typed(each) for key, each in value.items()} if isinstance(value, dict) else value


def _sections(annotation: Any, tree: Any) -> tuple[type[BaseModel] | None, type[BaseModel] | None]:
    """Return the section in a key's type, and the section that is the value type of a dict in it; None for none.

    If there are both, the keys of `tree` decide which one is used.
    """
    members = list_union_members(annotation)
    section = next((kind for kind in members if is_section(kind) and "unit" not in kind.model_fields), None)
    named = next((get_args(k)[1] for k in members if get_origin(k) is dict and is_section(get_args(k)[1])), None)
    if named and section and isinstance(tree, dict) and section.model_fields.keys() & tree.keys():
        named = None
    return section, named


def classify_key(root: type[BaseModel], key: str) -> Kind:
    """Classify the value of a key: text, list of texts, weights by class name, list or mapping of names, or other."""
    kinds = _types_of(root, key)
    if any(get_origin(kind) is dict and get_args(kind) == (str, str) for kind in kinds):
        return "names"
    if str in kinds and not {int, float} & set(kinds):
        return "text"
    if any(
        get_origin(kind) is dict and get_args(kind)[0] is str and not is_section(get_args(kind)[1]) for kind in kinds
    ):
        return "weights"
    items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    return "texts" if any(item is str or get_origin(item) is Literal for item in items) else "other"


def takes_list(root: type[BaseModel], key: str) -> bool:
    """Return whether the value of a key may be a list, or the key is not known."""
    kinds = _types_of(root, key)
    return not kinds or any(get_origin(kind) is tuple for kind in kinds)


def how_to_write(root: type[BaseModel], key: str) -> str:
    """Return how the value of a key is written, such as "use a whole number"; "" if any text may be meant."""
    kinds, kind = _types_of(root, key), classify_key(root, key)
    if kind == "weights":
        return "write {cat: 1, dog: 2}"
    if kind == "names":
        return "write a list, such as [a,b], or the names that are shown, such as {a: cat, b: dog}"
    if kind == "texts":
        return "write a list, such as [a,b]"
    if any(is_section(k) and "unit" in k.model_fields for k in kinds):
        return 'write "500 steps", "2 epochs" or "10000 examples"'
    numbers = {int: "use a whole number", float: "use a number", bool: "use true or false"}
    listed = "write a list, such as [1,2]" if any(get_origin(k) is tuple for k in kinds) else ""
    return next((fix for number, fix in numbers.items() if number in kinds), listed)


def _types_of(root: type[BaseModel], key: str) -> list[Any]:
    """Return the types that the value of a key may have; [] for a key that does not exist."""
    kinds: list[Any] = [root]
    for name in key.split("."):
        section = next((k for k in kinds if is_section(k) and name in k.model_fields), None)
        named = next((k for k in kinds if get_origin(k) is dict and is_section(get_args(k)[1])), None)
        if section:
            kinds = list_union_members(section.model_fields[name].annotation)
        elif named:
            kinds = [get_args(named)[1]]
        else:
            return []
    return kinds


def suggest_key(key: str, known: list[str], tree: Any = None) -> str:
    """Suggest similar keys anywhere in the configuration for an unknown one, or list the keys of its section.

    `tree` is the value of the key. For `head: {epochs: 3}`, keys that end with `head.epochs` are suggested.
    """
    if isinstance(tree, dict) and tree:
        if near := _match_components(f"{key}.{first_path(tree)}", known):
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
        or _match_similar(key, siblings, prefix, 0.75)
        or [k for k in known if f".{k}".endswith(f".{key}")]
        or _match_names(wanted, [k for k in known if k.startswith(prefix)])
        or _match_names(wanted, known)
        or _match_similar(key, siblings, prefix, 0.5)
        or [k for last in difflib.get_close_matches(wanted, {k.rpartition(".")[2] for k in known}, 1, 0.7)
            for k in _match_names(last, known)]
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


def _match_components(key: str, known: list[str]) -> list[str]:
    """Return the known keys that have all components of a key, in its order, and the same last component."""
    *path, name = key.split(".")
    wanted, matching = _ALIASES.get(name, name), []
    for candidate in known:
        *parents, last = candidate.split(".")
        rest = iter(parents)
        if last == wanted and all(part in rest for part in path):
            matching.append(candidate)
    return matching


def _match_names(name: str, keys: list[str]) -> list[str]:
    """Return the keys with this last component, or else the first key in each section with this name."""
    same = [key for key in keys if key.rpartition(".")[2] == name]
    inside = {f"{key}.".partition(f"{name}.")[0]: key for key in reversed(keys) if f".{name}." in f".{key}"}
    return same or list(reversed(inside.values()))


def _match_similar(key: str, siblings: list[str], prefix: str, cutoff: float) -> list[str]:
    names = [sibling.removeprefix(prefix) for sibling in siblings]
    return [prefix + name for name in difflib.get_close_matches(key.removeprefix(prefix), names, 1, cutoff)]
