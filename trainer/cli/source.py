"""Choose the source of the data where the arguments give an address but no `data=`."""

import glob
import re
from collections.abc import Sequence
from typing import Any

from trainer.cli.compose import is_sweep
from trainer.cli.overrides import given_values, parse, typed_overrides, value_of
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import FUNCTION, argument, quote, typed
from trainer.errors import ConfigError, DataError
from trainer.storage.path import storage_path

_RECORDS = re.compile(r"\.tfrec(ord)?s?\b|\.tfrecord-\d", re.I)
_INFO = "dataset_info.json"  # the file that marks a folder prepared by TensorFlow Datasets


def choose_source(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Add `data=...` if the arguments give data.root, data.name or data.pattern, but no source and no experiment.

    Returns the arguments, and a line that states what was chosen and why; "" if nothing was.

    Raises:
        ConfigError: data.root has another scheme than gs://, refers to another key, or in a sweep has values of several
            sources.
        DataError: there is nothing at data.root that is one of the sources.
    """
    given = given_values(arguments)
    unchanged = {"data", "experiment", "data.source"} & given.keys() or {"-h", "--help", "--version"} & set(arguments)
    key = next((k for k in ("data.root", "data.name", "data.pattern") if given.get(k)), None)
    if unchanged or key is None:
        return list(arguments), ""
    if key != "data.root":
        group, reason = ("tfds", "a TensorFlow dataset") if key == "data.name" else ("tfrecords", "record files")
        return [f"data={group}", *arguments], f"{key}={given[key]}: {reason}, so data={group}"
    roots = _roots(given["data.root"], is_sweep(list(arguments)))
    if None in roots:
        return list(arguments), ""
    groups, reasons, changes = zip(*map(_find_source_at, roots), strict=True)
    if len(set(groups)) > 1:
        listed = ", ".join(f"{root}: {reason}" for root, reason in zip(roots, reasons, strict=True))
        problem = f"the values are of several sources ({listed})"
        raise ConfigError(problem, key="data.root", value=given["data.root"], fix="sweep over those of one source")
    chosen, replaced = [f"data={groups[0]}"], list(arguments)
    if any(changes):
        texts = [
            change[0] if change else f"data.root={typed(root)}" for change, root in zip(changes, roots, strict=True)
        ]
        values = [text.partition("=")[2] for text in texts]
        listed = (
            ",".join(quote(v) if "," in v and v[:1] not in "'\"" else v for v in values) if values[1:] else values[0]
        )
        chosen.append(f"{texts[0].partition('=')[0]}={listed}")
        replaced = [a for a in arguments if not re.match(r"\+*data\.root=", a)]
    note = f"data.root={','.join(roots)}: {', '.join(dict.fromkeys(reasons))}, so {' '.join(chosen)}"
    return [*chosen, *replaced], note


def _roots(text: str, sweep: bool) -> list[Any]:
    """Return the values of data.root: one, or in a sweep several; None of null."""
    function = FUNCTION.fullmatch(text)
    problem = "is known only when a run begins, so the source of the data cannot be chosen by it"
    unknown = ConfigError(problem, key="data.root", value=text, fix="add data=image_folder or data=tfds")
    if sweep and function and function[1] != "choice":
        raise unknown
    (override,) = typed_overrides([f"data.root={text}"], sweep)
    parsed = parse(override)
    texts = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [override.partition("=")[2]]
    try:
        return [value_of(f"data.root={each}") for each in texts]
    except ConfigError:
        raise unknown from None  # a reference to another key


def _find_source_at(root: str) -> tuple[str, str, list[str]]:
    try:
        return find_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None


def find_source(root: str) -> tuple[str, str, list[str]]:
    """Return the group of `data=` for what is at an address, the reason, and arguments that replace data.root.

    Raises DataError if it is a single file or has neither folders nor records.
    """
    folder = storage_path(root)
    names = [info.path.name for info in folder.list(recursive=False)]
    folders = folder.folders()
    # Of a bucket only the first two, since each is a request; several datasets are next to one another.
    first = folders if folder.is_local else folders[:2]
    nested = [f for f in first if (f / _INFO).exists()] + [
        f for g in first[:9] for f in g.folders()[:9] if (f / _INFO).exists()
    ]
    if _INFO in names:
        return "tfds", f"{_INFO}, a prepared dataset", []
    if len(nested) == 1:
        return "tfds", f"{_INFO} in {nested[0].name}, a prepared dataset", [f"data.root={typed(str(nested[0]))}"]
    if nested:
        problem = f"has {len(nested)} prepared datasets ({', '.join(map(str, nested))})"
        raise DataError(problem, key="data.root", value=root, fix=f"set {argument('data.root', nested[-1])}")
    if records := sorted(name for name in names if _RECORDS.search(name)):
        ending = _RECORDS.search(records[0])
        pattern = f"{glob.escape(root.rstrip('/'))}/*{ending[0] if ending else ''}*"
        return "tfrecords", f"{len(records)} record files", [f"data.pattern={typed(pattern)}"]
    if folders:
        return "image_folder", "class folders", []
    problem = f"has {len(names)} files and no folders" if names else "does not exist, or is empty"
    fix = (
        "give a folder with one folder per class, a dataset of TFDS, or a folder of .tfrecord files; or choose data=..."
    )
    if not names and folder.exists():
        problem = "is a file"
        if _RECORDS.search(folder.name):
            fix = f"write data=tfrecords {argument('data.pattern', glob.escape(root))} data.class_names=[...]"
    raise DataError(problem, key="data.root", value=root, fix=fix)
