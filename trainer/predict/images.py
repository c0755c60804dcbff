"""List the images to predict (a folder, glob pattern or CSV list; local or in a bucket), and read their bytes."""

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
from trainer.names import decode_cell, escape_unprintable, find_path_error
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.storage.staging import is_remote, make_staging_plan

MAX_FILE_BYTES = 256 * 2**20  # larger local files are not read; objects in a bucket have no limit
PATH_COLUMN = "file"  # the column with the paths in a CSV list
_INPUT_FIX = "give a folder of images, a pattern such as photos/*.jpg, or a .csv file with a column file"


class ImageFile(NamedTuple):
    """An image to predict, or a row of a CSV list that does not refer to an image."""

    name: str  # the path, or the cell of the CSV list, escaped for display; in the output's column "file"
    address: str  # local path or gs:// address; "" if `error` is set
    # Changes with the content. Local file: size and time of the last change, or "absent" if it cannot be accessed.
    # Object: size and generation or ETag, or "" if the bucket was not listed.
    version: str = ""
    error: str = ""  # reason why the row of the CSV list is invalid; "" if there is an address


def list_images(address: str) -> list[ImageFile]:
    """List the images at an address, sorted by path. Images in a CSV list retain the order of its rows.

    Args:
        address: a folder, a glob pattern, an image or a .csv list, local or gs://. In a folder and its subfolders, all
            files with an image extension are listed, except hidden ones. The column "file" of a .csv list has gs://
            addresses, or paths that are absolute or relative to the list's folder.

    Raises:
        DataError: there is no image, a folder cannot be read, or the CSV list is corrupt or has no column "file".
        Interrupted: a bucket does not respond.
    """
    path = storage_path(address)
    if address.lower().endswith(".csv") and path.exists():
        images = _list_csv(address, path)
    elif is_remote(address):
        images = _list_bucket(address)
    else:
        images = _list_local(os.path.expanduser(address))
    if not images:
        raise DataError("has no image", key="images", value=address, fix=_INPUT_FIX)
    return images


def list_images_of_paths(paths: Iterable[str | Path]) -> list[ImageFile]:
    """Return an `ImageFile` for each local path or gs:// address, in the same order. The files need not exist."""
    return [_image_from_path(str(path)) for path in paths]


def _list_local(address: str) -> list[ImageFile]:
    """List the local images of a folder, a glob pattern or a path. Raise a DataError if nothing matches."""
    if os.path.isdir(address):
        try:  # the two counters receive files that are not images, which are not reported
            files = find_image_files(address, EXTENSIONS, Counter(), Counter())
        except OSError as error:
            problem = f"{error.strerror}: {escape_unprintable(str(error.filename))}"
            raise DataError(problem, key="images", value=address, fix="check its permissions") from None
    else:
        files = find_matching_files(address)
        if not files:
            problem = f"matches no file or folder (searched from {os.getcwd()})"
            raise DataError(problem, key="images", value=address, fix=_INPUT_FIX)
    return [_image_from_path(file) for file in files]


def _list_bucket(address: str) -> list[ImageFile]:
    """List the images of a folder, a glob pattern or an object in a bucket, sorted by address."""
    # `make_staging_plan` lists the objects. Nothing is copied, so the folder and the limit of bytes have no effect.
    plan = make_staging_plan(address, Path("/"), 2**63)
    images = (
        ImageFile(escape_unprintable(str(info.path)), str(info.path), f"{info.size} {info.version}")
        for name, info in plan.infos.items()
        if plan.pattern_or_file or _is_visible_image(name)
    )
    return sorted(images, key=lambda image: image.address)


def _is_visible_image(name: str) -> bool:
    """Return whether a relative path has an image extension and no hidden component, such as `.cache`."""
    return name.lower().endswith(EXTENSIONS) and not any(map(is_system_name, PurePosixPath(name).parts))


def _list_csv(address: str, path: StoragePath) -> list[ImageFile]:
    """List the images in the column `file` of a CSV list. Raise a DataError if it is not such a list."""
    try:
        csv_text = path.read_text().removeprefix("\ufeff")
        rows = list(csv.DictReader(io.StringIO(csv_text, newline="")))
        header = next(csv.reader(io.StringIO(csv_text, newline="")), [])
    except (csv.Error, *CONTENT_ERRORS) as error:
        raise DataError(f"is not a CSV file ({error})", key="images", value=address, fix=_INPUT_FIX) from None
    if PATH_COLUMN not in header:
        columns = ", ".join(map(escape_unprintable, header[:5])) or "nothing"
        problem = f"has no column {PATH_COLUMN} in its first line ({columns})"
        raise DataError(problem, key="images", value=address, fix=f"name the column of the paths {PATH_COLUMN}")
    return [_image_from_cell(path, decode_cell(row[PATH_COLUMN] or "")) for row in rows]


def _image_from_cell(path: StoragePath, cell: str) -> ImageFile:
    """Return the `ImageFile` for a cell of the CSV list at `path`: an address, or a path relative to the list.

    If the cell is not valid, `ImageFile.error` has the reason. A list in a bucket cannot refer to local files.
    """
    name = escape_unprintable(cell)
    if not cell:
        return ImageFile("", "", error="the list has no file name in this row")
    if "://" in cell:
        try:
            check_address(cell)
        except InvalidValue as error:
            return ImageFile(name, "", error=f"{error.problem}; {error.fix}")
        return ImageFile(name, cell)
    if not path.is_local:
        if reason := find_path_error(cell):
            return ImageFile(name, "", error=reason)
        return ImageFile(name, str(path.parent / cell))
    if "\0" in cell:
        return ImageFile(name, "", error="it has a null character")
    image = _image_from_path(os.path.join(os.path.dirname(str(path)), os.path.expanduser(cell)))
    return ImageFile(name, image.address, image.version, image.error)


def _image_from_path(file: str) -> ImageFile:
    """Return the `ImageFile` for a local path or an address. An object in a bucket gets no version."""
    version = ""
    if not is_remote(file):
        try:
            file_stat = os.stat(file)
            version = f"{file_stat.st_size} {file_stat.st_mtime_ns}"
        except (OSError, ValueError):
            version = "absent"
    return ImageFile(escape_unprintable(file), file, version)


def read_image(image: ImageFile) -> bytes | str:
    """Return the encoded bytes of an image, or the reason (a str) why it cannot be read.

    Raises:
        Interrupted: the bucket does not respond.
    """
    if image.error:
        return image.error
    try:
        if is_remote(image.address):
            content_and_version = storage_path(image.address).fetch()
            return "there is no such object" if content_and_version is None else content_and_version[0] or "is empty"
        return _read_local_file(image.address)
    except Interrupted:
        raise
    except DataError as error:
        return error.problem
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()


def _read_local_file(path: str) -> bytes | str:
    """Return the content of a regular file of at most `MAX_FILE_BYTES`, or the reason why it is not read."""
    file_stat = os.stat(path)
    if not stat.S_ISREG(file_stat.st_mode):  # opening a pipe would block until a process writes to it
        return "is not a file"
    if file_stat.st_size > MAX_FILE_BYTES:
        return f"is larger than {MAX_FILE_BYTES // 2**20} MiB"
    return Path(path).read_bytes() or "is empty"


def describe_versions(images: Sequence[ImageFile]) -> list[list[str]]:
    """Return each image's name, address, version and error, on which its prediction depends."""
    return [[image.name, escape_unprintable(image.address), image.version, image.error] for image in images]
