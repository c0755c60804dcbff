"""List the keys of the configuration, describe the values that they take, and suggest corrections of misspelled keys.

All of it is derived from the schema, the pydantic models in `trainer.config`.
"""

import difflib
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

# Name in other tools, or a likely guess -> last component of the key in this package; "model.name" -> complete key.
_ALIASES = {"lr": "learning_rate", "batch": "batch_size", "bs": "batch_size", "gpus": "replicas", "epoch": "epochs",
            "num_epochs": "epochs", "img_size": "image_size", "size": "image_size", "input_size": "image_size",
            "output": "output_dir", "run_name": "experiment_name", "num_workers": "data_threads", "path": "root",
            "gpu": "replicas", "out": "output_dir", "folder": "root", "scheduler": "schedule",
            "model.name": "model.backbone", "wd": "weight_decay", "classes": "class_names", "pretrained": "weights",
            "val_split": "validation_fraction", "val_fraction": "validation_fraction"}  # fmt: skip
_MAX_SUGGESTED = 3  # keys in one "did you mean"
ValueType = Literal["text", "texts", "weights", "names", "other"]  # see `classify_key`


def list_union_members(annotation: Any) -> list[Any]:
    """List the types in a union except None, or the type itself if it is not a union. `Annotated[T, ...]` becomes T."""
    is_union = get_origin(annotation) in (Union, UnionType)
    members = [member for member in get_args(annotation) if member is not type(None)] if is_union else [annotation]
    return [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]


def is_section(annotation: Any) -> bool:
    """Return whether a type is a section of the configuration, which is a pydantic model."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def suggest_name(name: str, known_names: list[str]) -> str:
    """Return "did you mean NAME?" for the known name most similar to `name`, or "known: ..." if none is similar."""
    matches = difflib.get_close_matches(name, known_names, 1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known: {', '.join(known_names)}"


def list_keys(root: type[BaseModel], tree: Any = None, is_nested: bool = False) -> list[str]:
    """List the dotted keys in a section, depth first.

    Args:
        root: type of the section.
        tree: the section's values as nested dicts. It supplies the names in a dict of sections, such as
            `phases.head.epochs`. Without `tree`, a dict of sections has no keys.
        is_nested: whether `root` is within another section. If so, an optional section in `root`, such as the teacher's
            model, is listed as a single key if it is null by default and has no value in `tree`.
    """
    keys = []
    for name, field in root.model_fields.items():
        content = (tree.get(name) if isinstance(tree, dict) else None) or {}
        section, named_section = _find_section_types(field.annotation, content)
        if is_nested and (named_section or section) and field.default is None and not content:
            keys.append(name)
        elif named_section:
            keys += [
                f"{name}.{phase}.{key}"
                for phase in content
                for key in list_keys(named_section, content[phase], is_nested=True)
            ]
        else:
            keys += [f"{name}.{key}" for key in list_keys(section, content, is_nested=True)] if section else [name]
    return keys


def add_defaults(root: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values in `tree`, the nested dicts of a section, and the default of each missing key.

    `root` is the section's type. Keys are in the order of its fields, followed by unknown keys.
    """
    values: dict[str, Any] = {}
    for name, field in root.model_fields.items():
        value = tree.get(name, field.default)
        section, named_section = _find_section_types(field.annotation, value)
        if isinstance(value, BaseModel):
            value = _format_durations(value.model_dump(mode="json"))
        elif named_section and isinstance(value, dict):
            value = {
                key: add_defaults(named_section, child) if isinstance(child, dict) else child
                for key, child in value.items()
            }
        elif section and isinstance(value, dict):
            value = add_defaults(section, value)
        if name in tree or not field.is_required():
            values[name] = list(value) if isinstance(value, tuple) else value
    return values | {name: value for name, value in tree.items() if name not in values}


def _format_durations(value: Any) -> Any:
    """Replace each duration in a dumped section by its text form: {"count": 2, "unit": "epochs"} -> "2 epochs"."""
    if isinstance(value, dict) and value.keys() == {"count", "unit"}:
        return f"{value['count']:g} {value['unit']}"
    return {key: _format_durations(child) for key, child in value.items()} if isinstance(value, dict) else value


def _find_section_types(annotation: Any, tree: Any) -> tuple[type[BaseModel] | None, type[BaseModel] | None]:
    """Return the section type that a key accepts, and S if it accepts a `dict[str, S]` of sections; None if neither.

    A `Duration`, which has a field `unit`, does not count as a section, because users write it as one value. If a key
    accepts both types and `tree` has a key of the section, S is None: phases={auto: ...} has no phase named `auto`.
    """
    members = list_union_members(annotation)
    section = next((member for member in members if is_section(member) and "unit" not in member.model_fields), None)
    named_section = next(
        (get_args(member)[1] for member in members if get_origin(member) is dict and is_section(get_args(member)[1])),
        None,
    )
    if named_section and section and isinstance(tree, dict) and section.model_fields.keys() & tree.keys():
        named_section = None
    return section, named_section


def classify_key(root: type[BaseModel], key: str) -> ValueType:
    """Classify the values that a key takes.

    Returns:
        "text" for a string, "texts" for a list of strings, "weights" for numbers by class name, "names" for class names
        (a list, or a mapping to display names), or "other" for any other value or an unknown key.
    """
    types = _resolve_types(root, key)
    if any(get_origin(type_) is dict and get_args(type_) == (str, str) for type_ in types):
        return "names"
    if str in types and not {int, float} & set(types):
        return "text"
    if any(
        get_origin(type_) is dict and get_args(type_)[0] is str and not is_section(get_args(type_)[1])
        for type_ in types
    ):
        return "weights"
    item_types = [get_args(type_)[0] for type_ in types if get_origin(type_) is tuple]
    return "texts" if any(item_type is str or get_origin(item_type) is Literal for item_type in item_types) else "other"


def accepts_list(root: type[BaseModel], key: str) -> bool:
    """Return whether a key accepts a list; True for an unknown key."""
    types = _resolve_types(root, key)
    return not types or any(get_origin(type_) is tuple for type_ in types)


def describe_syntax(root: type[BaseModel], key: str) -> str:
    """Return a hint on the syntax of a key's value, such as "use a whole number"; "" if any string is valid."""
    types, value_type = _resolve_types(root, key), classify_key(root, key)
    if value_type == "weights":
        return "write {cat: 1, dog: 2}"
    if value_type == "names":
        return "write a list, such as [a,b], or the names that are shown, such as {a: cat, b: dog}"
    if value_type == "texts":
        return "write a list, such as [a,b]"
    if any(is_section(type_) and "unit" in type_.model_fields for type_ in types):
        return 'write "500 steps", "2 epochs" or "10000 examples"'
    scalar_hints = {int: "use a whole number", float: "use a number", bool: "use true or false"}
    list_hint = "write a list, such as [1,2]" if any(get_origin(type_) is tuple for type_ in types) else ""
    return next((hint for type_, hint in scalar_hints.items() if type_ in types), list_hint)


def _resolve_types(root: type[BaseModel], key: str) -> list[Any]:
    """Return the types that a dotted key below `root` accepts; [] for an unknown key."""
    types: list[Any] = [root]
    for name in key.split("."):
        section = next((type_ for type_ in types if is_section(type_) and name in type_.model_fields), None)
        dict_type = next(
            (type_ for type_ in types if get_origin(type_) is dict and is_section(get_args(type_)[1])), None
        )
        if section:
            types = list_union_members(section.model_fields[name].annotation)
        elif dict_type:
            types = [get_args(dict_type)[1]]
        else:
            return []
    return types


def suggest_key(key: str, known_keys: list[str], tree: Any = None) -> str:
    """Return "did you mean KEY?" for an unknown key, or "known: ..." with its section's keys if no key is similar.

    Args:
        key: dotted key that is not in `known_keys`.
        known_keys: dotted keys of the configuration. Similar keys are searched in all sections.
        tree: value of the key. If it is a dict, its first key is also matched: `head: {epochs: 3}` suggests keys that
            end with `head.epochs`, such as `phases.head.epochs`.
    """
    if isinstance(tree, dict) and tree:
        if matches := _match_components(f"{key}.{find_first_leaf_key(tree)}", known_keys):
            return _did_you_mean(matches)
        name, value = next(iter(tree.items()))
        child_suggestion = suggest_key(
            f"{key}.{name}", [k for k in known_keys if f".{k}".endswith(f".{key}.{name}")], value
        )
        key_suggestion = suggest_key(key, known_keys)
        if child_suggestion.startswith("did") or key_suggestion.startswith("did"):
            return child_suggestion if child_suggestion.startswith("did") else key_suggestion
        return suggest_key(f"{key}.{name}", known_keys, value)
    section, _, name = key.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = list(
        dict.fromkeys(prefix + k.removeprefix(prefix).split(".")[0] for k in known_keys if k.startswith(prefix))
    )
    canonical_name = _ALIASES.get(name, name)
    # In order of decreasing confidence: an alias of the key; a slightly misspelled key of this section; the key in
    # another section; the name in this section; the name in any section; a badly misspelled key of this section; a
    # misspelled name in any section.
    matches = (
        [k for k in known_keys if k == _ALIASES.get(key)]
        or _match_similar(key, siblings, prefix, cutoff=0.75)
        or [k for k in known_keys if f".{k}".endswith(f".{key}")]
        or _match_names(canonical_name, [k for k in known_keys if k.startswith(prefix)])
        or _match_names(canonical_name, known_keys)
        or _match_similar(key, siblings, prefix, cutoff=0.5)
        or [k for match in difflib.get_close_matches(canonical_name, {k.rpartition(".")[2] for k in known_keys}, 1, 0.7)
            for k in _match_names(match, known_keys)]
    )  # fmt: skip
    if not matches and key != key.lower():
        return suggest_key(key.lower(), known_keys)
    if not matches:
        names = [k.removeprefix(prefix) for k in siblings] or list(dict.fromkeys(k.split(".")[0] for k in known_keys))
        return f"known: {', '.join(names)}"
    return _did_you_mean(matches)


def _did_you_mean(keys: list[str]) -> str:
    *first_keys, last_key = keys[:_MAX_SUGGESTED]
    return f"did you mean {', '.join(first_keys)}{' or ' * bool(first_keys)}{last_key}?"


def find_first_leaf_key(tree: dict[str, Any]) -> str:
    """Return the dotted key of the first leaf in nested dicts: {"head": {"epochs": 3}} -> "head.epochs"."""
    name, value = next(iter(tree.items()))
    return f"{name}.{find_first_leaf_key(value)}" if isinstance(value, dict) and value else str(name)


def _match_components(key: str, known_keys: list[str]) -> list[str]:
    """Return the known keys that end with the last component of `key` and have its other components in the same order.

    `head.epochs` matches `phases.head.epochs`. An alias such as `lr` counts as the name that it represents.
    """
    *key_parents, name = key.split(".")
    canonical_name, matches = _ALIASES.get(name, name), []
    for candidate in known_keys:
        *parents, candidate_name = candidate.split(".")
        remaining_parents = iter(parents)
        if candidate_name == canonical_name and all(parent in remaining_parents for parent in key_parents):
            matches.append(candidate)
    return matches


def _match_names(name: str, keys: list[str]) -> list[str]:
    """Return the keys whose last component is `name`, or else the first key in each section with that name."""
    matches = [key for key in keys if key.rpartition(".")[2] == name]
    first_keys = {f"{key}.".partition(f"{name}.")[0]: key for key in reversed(keys) if f".{name}." in f".{key}"}
    return matches or list(reversed(first_keys.values()))


def _match_similar(key: str, siblings: list[str], prefix: str, cutoff: float) -> list[str]:
    names = [sibling.removeprefix(prefix) for sibling in siblings]
    return [prefix + name for name in difflib.get_close_matches(key.removeprefix(prefix), names, 1, cutoff)]
