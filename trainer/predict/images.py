"""List the images of a folder, a pattern or a CSV file, local or in a bucket, and read them."""

import csv
import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trainer.config.base import InvalidValue, check_address
from trainer.data.image_folder import EXTENSIONS, find_image_files, is_system_name
from trainer.data.splits import find_matching_files
from trainer.errors import DataError, Interrupted
from trainer.names import decode_cell, escape_unprintable, find_path_fault
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.storage.staging import is_remote, plan_copy

MAX_FILE_BYTES = 256 * 2**20  # a larger file is not read
LIST_COLUMN = "file"  # of a CSV list
_FIX = "give a folder of images, a pattern such as photos/*.jpg, or a .csv file with a column file"


class ImageFile(NamedTuple):
    """An image to predict."""

    name: str  # in the column `file`: its path, or what the list has, escaped for display
    address: str  # local path or gs:// address; "" if there is none
    version: str = ""  # changes with the content: size and time of the last change, generation or ETag; "" if unknown
    fault: str = ""  # why it has no address


def list_images(address: str) -> list[ImageFile]:
    """List the images at an address, sorted by path; those of a CSV file in its order.

    Args:
        address: a folder (all files below it with the extension of an image, except hidden ones), a pattern or a file,
            or a .csv file whose column `file` has paths relative to it. Local or gs://.

    Raises:
        DataError: there is no image, or the CSV file has no column `file` or is corrupt.
    """
    path = storage_path(address)
    if address.lower().endswith(".csv") and path.exists():
        images = _list_csv(address, path)
    elif is_remote(address):
        images = _list_bucket(address)
    else:
        images = _list_local(os.path.expanduser(address))
    if not images:
        raise DataError("has no image", key="images", value=address, fix=_FIX)
    return images


def list_paths(paths: Iterable[str | Path]) -> list[ImageFile]:
    """List given paths or gs:// addresses, which need not exist, in their order."""
    return [_locate(str(path)) for path in paths]


def _list_local(address: str) -> list[ImageFile]:
    if os.path.isdir(address):
        try:
            files = find_image_files(address, EXTENSIONS, Counter(), Counter())
        except OSError as error:
            problem = f"{error.strerror}: {escape_unprintable(str(error.filename))}"
            raise DataError(problem, key="images", value=address, fix="check its permissions") from None
    else:
        files = find_matching_files(address)
        if not files:
            problem = f"matches no file or folder (searched from {os.getcwd()})"
            raise DataError(problem, key="images", value=address, fix=_FIX)
    return [_locate(file) for file in files]


def _list_bucket(address: str) -> list[ImageFile]:
    # The folder for local copies is not used: images are read from the bucket one at a time.
    copy = plan_copy(address, Path("/"), 2**63)
    listed = (
        ImageFile(escape_unprintable(str(info.path)), str(info.path), f"{info.size} {info.version}")
        for name, info in copy.entries.items()
        if copy.end or _is_image(name)
    )
    return sorted(listed, key=lambda image: image.address)


def _is_image(name: str) -> bool:
    """Return whether a relative path has the extension of an image and no hidden component."""
    return name.lower().endswith(EXTENSIONS) and not any(map(is_system_name, PurePosixPath(name).parts))


def _list_csv(address: str, path: StoragePath) -> list[ImageFile]:
    try:
        text = path.read_text().removeprefix("\ufeff")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        header = next(csv.reader(io.StringIO(text, newline="")), [])
    except (csv.Error, *CONTENT_ERRORS) as error:
        raise DataError(f"is not a CSV file ({error})", key="images", value=address, fix=_FIX) from None
    if LIST_COLUMN not in header:
        columns = ", ".join(map(escape_unprintable, header[:5])) or "nothing"
        problem = f"has no column {LIST_COLUMN} in its first line ({columns})"
        raise DataError(problem, key="images", value=address, fix=f"name the column of the paths {LIST_COLUMN}")
    return [_locate_in_list(path, decode_cell(row[LIST_COLUMN] or "")) for row in rows]


def _locate_in_list(path: StoragePath, cell: str) -> ImageFile:
    """Locate a file of a list. A list in a bucket has files next to it, or in a bucket by address."""
    name = escape_unprintable(cell)
    if not cell:
        return ImageFile("", "", fault="the list has no file name in this row")
    if "://" in cell:
        try:
            check_address(cell)
        except InvalidValue as error:
            return ImageFile(name, "", fault=f"{error.problem}; {error.fix}")
        return ImageFile(name, cell)
    if not path.is_local:
        if fault := find_path_fault(cell):
            return ImageFile(name, "", fault=fault)
        return ImageFile(name, str(path.parent / cell))
    if "\0" in cell:
        return ImageFile(name, "", fault="it has a null character")
    located = _locate(os.path.join(os.path.dirname(str(path)), os.path.expanduser(cell)))
    return ImageFile(name, located.address, located.version, located.fault)


def _locate(file: str) -> ImageFile:
    """Locate a local file or an object, with the version of a local file."""
    version = ""
    if not is_remote(file):
        try:
            status = os.stat(file)
            version = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            version = "absent"
    return ImageFile(escape_unprintable(file), file, version)


def read_image(image: ImageFile) -> bytes | str:
    """Read an image; return its encoded bytes, or why it cannot be read.

    Raises Interrupted if the bucket does not respond.
    """
    if image.fault:
        return image.fault
    try:
        if is_remote(image.address):
            content = storage_path(image.address).fetch()
            return "there is no such object" if content is None else content[0] or "is empty"
        return _read_local(image.address)
    except Interrupted:
        raise
    except DataError as error:
        return error.problem
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()


def _read_local(path: str) -> bytes | str:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        return "is not a file"
    if status.st_size > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES // 2**20} MiB"
    return Path(path).read_bytes() or "is empty"


def describe_versions(images: Sequence[ImageFile]) -> list[list[str]]:
    """Describe what the predictions depend on: names, addresses and versions of the images."""
    return [[image.name, escape_unprintable(image.address), image.version, image.fault] for image in images]
