"""Choose the data source if the arguments give an address but no `data=`."""

import glob
import re
from collections.abc import Sequence

from trainer.cli.overrides import map_given_values, parse_value
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import quote_if_needed
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
        ConfigError: the scheme of data.root is not supported.
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
    root = parse_value(f"data.root={given['data.root']}")
    if root is None:
        return list(arguments), ""
    try:
        group, reason, changes = detect_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None
    replaced = [a for a in arguments if not (changes and re.match(r"\+*data\.root=", a))]
    return [
        f"data={group}",
        *changes,
        *replaced,
    ], f"data.root={root}: {reason}, so {' '.join([f'data={group}', *changes])}"


def detect_source(root: str) -> tuple[str, str, list[str]]:
    """Detect the kind of data source at an address.

    Folders with images precede record files next to them; folders of the system, such as lost+found, do not count.

    Raises DataError if it is a single file or has neither folders nor records.
    """
    from trainer.data.image_folder import is_system_name  # slow: imports NumPy

    folder = storage_path(root)
    names = [info.path.name for info in folder.list(recursive=False)]
    folders = [f for f in folder.folders() if not is_system_name(f.name)]
    nested = [f for f in folders if (f / _INFO).exists()] + [
        f for g in folders[:9] for f in g.folders() if (f / _INFO).exists()
    ]
    if _INFO in names:
        return "tfds", f"{_INFO}, a prepared dataset", []
    if len(nested) == 1:
        return (
            "tfds",
            f"{_INFO} in {escape_unprintable(nested[0].name)}, a prepared dataset",
            [f"data.root={quote_if_needed(str(nested[0]))}"],
        )
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
    raise DataError(problem, key="data.root", value=root, fix=fix)


def _holds_images(folder: StoragePath, depth: int = 2) -> bool:
    """Return whether a folder, or one of its first folders, has an image, as a class or a split has."""
    from trainer.data.image_folder import EXTENSIONS

    if any(info.path.name.lower().endswith(EXTENSIONS) for info in folder.list(recursive=False)):
        return True
    return depth > 1 and any(_holds_images(below, depth - 1) for below in folder.folders()[:3])
