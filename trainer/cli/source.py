"""Choose the source of the data where the arguments give an address but no `data=`."""

import glob
import re
from collections.abc import Sequence

from trainer.cli.overrides import given_values, typed_value
from trainer.config.base import InvalidValue, check_address
from trainer.config.typed import typed
from trainer.errors import ConfigError, DataError
from trainer.names import printable
from trainer.storage.path import StoragePath, storage_path

_RECORDS = re.compile(r"\.tfrec(ord)?s?\b|\.tfrecord-\d", re.I)
_INFO = "dataset_info.json"  # the file that marks a folder prepared by TensorFlow Datasets


def choose_source(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Add `data=...` if the arguments give data.root, data.name or data.pattern, but no source and no experiment.

    Returns the arguments, and a line that states what was chosen and why; "" if nothing was.

    Raises:
        ConfigError: data.root has another scheme than gs://.
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
    root = typed_value(f"data.root={given['data.root']}")
    if root is None:
        return list(arguments), ""
    try:
        group, reason, changes = find_source(check_address(root))
    except InvalidValue as error:
        raise ConfigError(error.problem, key="data.root", value=root, fix=error.fix) from None
    replaced = [a for a in arguments if not (changes and re.match(r"\+*data\.root=", a))]
    return [
        f"data={group}",
        *changes,
        *replaced,
    ], f"data.root={root}: {reason}, so {' '.join([f'data={group}', *changes])}"


def find_source(root: str) -> tuple[str, str, list[str]]:
    """Return the group of `data=` for what is at an address, the reason, and arguments that replace data.root.

    Folders with images precede record files next to them; folders of the system, such as lost+found, do not count.

    Raises DataError if it is a single file or has neither folders nor records.
    """
    from trainer.data.image_folder import is_system  # slow: imports NumPy

    folder = storage_path(root)
    names = [info.path.name for info in folder.list(recursive=False)]
    folders = [f for f in folder.folders() if not is_system(f.name)]
    nested = [f for f in folders if (f / _INFO).exists()] + [
        f for g in folders[:9] for f in g.folders() if (f / _INFO).exists()
    ]
    if _INFO in names:
        return "tfds", f"{_INFO}, a prepared dataset", []
    if len(nested) == 1:
        return (
            "tfds",
            f"{_INFO} in {printable(nested[0].name)}, a prepared dataset",
            [f"data.root={typed(str(nested[0]))}"],
        )
    records = sorted(name for name in names if _RECORDS.search(name))
    if records and not any(map(_holds_images, folders[:9])):
        ending = _RECORDS.search(records[0])
        pattern = f"{glob.escape(root.rstrip('/'))}/*{ending[0] if ending else ''}*"
        return "tfrecords", f"{len(records)} record files", [f"data.pattern={typed(pattern)}"]
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
