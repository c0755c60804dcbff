"""Choose the data source if the arguments give an address but no `data=`."""

import glob
import re
from collections.abc import Sequence
from typing import Any

from trainer.cli.compose import is_sweep
from trainer.cli.overrides import evaluate_override, map_given_values, parse_override, translate_overrides
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import FUNCTION, format_argument, quote, quote_if_needed
from trainer.errors import ConfigError, DataError
from trainer.names import escape_unprintable
from trainer.storage.path import StoragePath, storage_path

_RECORDS = re.compile(r"\.tfrec(ord)?s?\b|\.tfrecord-\d", re.I)
_INFO = "dataset_info.json"  # marks a folder that TensorFlow Datasets prepared


def choose_source(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Add `data=...` if the arguments give data.root, data.name or data.pattern, but no source and no experiment.

    Returns:
        The arguments, and a log line about the choice and its reason, "" if nothing was chosen.

    Raises:
        ConfigError: the scheme of data.root is not supported, data.root refers to another key, or in a sweep its values
            have several sources.
        DataError: data.root is none of the supported sources.
    """
    given = map_given_values(arguments)
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
            change[0] if change else f"data.root={quote_if_needed(root)}"
            for change, root in zip(changes, roots, strict=True)
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
    (override,) = translate_overrides([f"data.root={text}"], sweep)
    parsed = parse_override(override)
    texts = parsed.sweep_string_iterator() if parsed.is_sweep_override() else [override.partition("=")[2]]
    try:
        return [evaluate_override(f"data.root={each}") for each in texts]
    except ConfigError:
        raise unknown from None  # a reference to another key


def _find_source_at(root: str) -> tuple[str, str, list[str]]:
    try:
        return detect_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None


def detect_source(root: str) -> tuple[str, str, list[str]]:
    """Detect the kind of data source at an address.

    Folders with images precede record files next to them; folders of the system, such as lost+found, do not count.

    Raises DataError if it is a single file or has neither folders nor records.
    """
    from trainer.data.image_folder import is_system_name  # slow: imports NumPy

    folder = storage_path(root)
    names = [info.path.name for info in folder.list(recursive=False)]
    folders = [f for f in folder.folders() if not is_system_name(f.name)]
    # Of a bucket only the first two, since each is a request; several datasets are next to one another.
    first = folders if folder.is_local else folders[:2]
    nested = [f for f in first if (f / _INFO).exists()] + [
        f for g in first[:9] for f in g.folders()[:9] if (f / _INFO).exists()
    ]
    if _INFO in names:
        return "tfds", f"{_INFO}, a prepared dataset", []
    if len(nested) == 1:
        return (
            "tfds",
            f"{_INFO} in {escape_unprintable(nested[0].name)}, a prepared dataset",
            [f"data.root={quote_if_needed(str(nested[0]))}"],
        )
    if nested:
        problem = f"has {len(nested)} prepared datasets ({', '.join(map(str, nested))})"
        raise DataError(problem, key="data.root", value=root, fix=f"set {format_argument('data.root', nested[-1])}")
    records = sorted(name for name in names if _RECORDS.search(name))
    if records and not any(map(_holds_images, folders[:9])):
        suffix = _RECORDS.search(records[0])
        pattern = f"{glob.escape(root.rstrip('/'))}/*{suffix[0] if suffix else ''}*"
        return "tfrecords", f"{len(records)} record files", [f"data.pattern={quote_if_needed(pattern)}"]
    if folders:
        return "image_folder", "class folders", []
    problem = f"has {len(names)} files and no folders" if names else "does not exist, or is empty"
    fix = (
        "give a folder with one folder per class, a dataset of TFDS, or a folder of .tfrecord files; or choose data=..."
    )
    if not names and folder.exists():
        if folder.name.lower().endswith(".csv"):
            return "csv", "a CSV file", []
        problem = "is a file"
        if _RECORDS.search(folder.name):
            fix = f"write data=tfrecords {format_argument('data.pattern', glob.escape(root))} data.class_names=[...]"
    raise DataError(problem, key="data.root", value=root, fix=fix)


def _holds_images(folder: StoragePath, depth: int = 2) -> bool:
    """Return whether a folder, or one of its first folders, has an image, as a class or a split has."""
    from trainer.data.image_files import EXTENSIONS

    if any(info.path.name.lower().endswith(EXTENSIONS) for info in folder.list(recursive=False)):
        return True
    return depth > 1 and any(_holds_images(below, depth - 1) for below in folder.folders()[:3])
