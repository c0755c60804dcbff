"""Open a dataset of image files that a CSV file lists with their labels, and optionally with splits and groups."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, normpath

from trainer.config.schema import Data
from trainer.data.image_files import SPLIT_NAMES, ImageFile, ListedImages, build_raw_data
from trainer.data.records import MAX_GROUPS, join_first
from trainer.data.splits import SPLITS, RawData
from trainer.data.table import Row, Table, read_table
from trainer.errors import DataError, format_count
from trainer.monitoring.health import health
from trainer.names import escape_unprintable, find_path_error, normalize_class_name
from trainer.storage.base import ObjectInfo
from trainer.storage.path import storage_path
from trainer.storage.staging import MAX_TRANSFERS, check_budget, get_staging_folder, is_remote
from trainer.types import Purpose

REQUIRED_COLUMNS = ("file", "label")
OPTIONAL_COLUMNS = ("split", "group")  # data.group_field sets the real name of "group"
_EMPTY_CLASS_NAME = normalize_class_name("")


def open_csv(data: Data, cache_dir: Path, purpose: Purpose = "train") -> RawData:
    """Open the images that the CSV file data.root lists, one image per row.

    The columns are `file` (an absolute path, a path relative to the CSV file's folder, or a gs:// address), `label`
    (the class name), optionally `split`, and the column that data.group_field names if it is set. Files in a bucket
    are read from their copies in `cache_dir`, which `plan_copies` lists and the caller must have made.

    Without a column `split`, all images are in train. Missing splits are divided off as for an image folder
    (`build_raw_data`), so a CSV file that lists a folder's images by relative paths gives the folder's splits.

    Raises:
        DataError: the CSV file cannot be read (`read_table`); a row has no file, label, split or group, an unknown
            split, an invalid gs:// address, or the file of an earlier row; no row is in train; data.group_field is not
            a column, or has more than `MAX_GROUPS` values; a split has no readable file; with on_error="fail", a file
            cannot be read or is not an image.
    """
    root = os.path.expanduser(data.root or "")
    table = _read_csv(root)
    group_column = _find_group_column(data, root, table)
    class_names = sorted({_read_label(root, row) for row in table.rows})
    labels = {name: label for label, name in enumerate(class_names)}
    images: dict[str, list[ImageFile]] = {}  # by split
    first_rows: dict[str, int] = {}  # path -> number of the first row that lists it
    for row in table.rows:
        path = _find_local_path(root, row, cache_dir)
        if (first_row := first_rows.setdefault(os.path.normpath(path), row.number)) != row.number:
            problem = f"names the file of row {first_row} again: {escape_unprintable(row['file'])}"
            raise _make_row_error(root, row, problem, "list each file once")
        group = _read_group(root, row, group_column) if group_column else None
        image = ImageFile(path, row["file"], labels[_read_label(root, row)], row.number, group)
        images.setdefault(_read_split(root, row, table), []).append(image)
    if "train" not in images:
        splits = join_first(list(images))
        problem = f"has no row of the split train, only of {splits}" if images else "has no rows below its header"
        raise DataError(problem, key="data.root", value=root, fix="list the training images")
    if group_column:
        _check_groups(data, [image.group or "" for members in images.values() for image in members])
    images_by_split = {name: images[name] for name in SPLITS if name in images}
    split_descriptions = {
        name: f"{format_count(len(members), 'row')} of {escape_unprintable(root)}"
        for name, members in images_by_split.items()
    }
    unread_columns = [name for name in table.columns if name not in (*REQUIRED_COLUMNS, "split", group_column)]
    names = join_first([escape_unprintable(name) for name in unread_columns if name])
    notes = [f"columns that are not read: {names}; data.group_field=COLUMN reports scores by one"] if names else []
    return build_raw_data(
        ListedImages(Path(root).stem, tuple(class_names), images_by_split, split_descriptions, notes), data, purpose
    )


def _read_csv(root: str) -> Table:
    """Read the CSV file at a storage path, the value of data.root."""
    return read_table(root, "data.root", REQUIRED_COLUMNS, OPTIONAL_COLUMNS)


def _make_row_error(root: str, row: Row, problem: str, fix: str) -> DataError:
    """Build the error for a row of the CSV file `root`. `problem` continues the message "row N"."""
    return DataError(f"row {row.number} {problem}", key="data.root", value=root, fix=fix)


def _read_file(root: str, row: Row) -> str:
    """Return the row's cell in the column `file`, or raise a DataError if it is blank."""
    if not row["file"].strip():
        raise _make_row_error(root, row, "has no file", "write its path, or remove the row")
    return row["file"]


def _read_label(root: str, row: Row) -> str:
    """Return the row's normalized class name, or raise a DataError if it is blank."""
    if (name := normalize_class_name(row["label"])) == _EMPTY_CLASS_NAME:
        file = escape_unprintable(_read_file(root, row))
        raise _make_row_error(root, row, f"has no label: {file}", "write the name of its class, or remove the row")
    return name


def _read_split(root: str, row: Row, table: Table) -> str:
    """Return the row's split, or "train" if the table has no column `split`. Raise a DataError if it is unknown."""
    if "split" not in table.columns:
        return "train"
    cell = row["split"].strip()
    if split := SPLIT_NAMES.get(cell.lower()):
        return split
    problem = f"has an unknown split, {escape_unprintable(cell)}" if cell else "has no split"
    fix = "write train, validation (or val, valid) or test in each row, or remove the column"
    raise _make_row_error(root, row, problem, fix)


def _find_group_column(data: Data, root: str, table: Table) -> str | None:
    """Return data.group_field in lower case, or None if it is not set. Raise a DataError if it is not a column."""
    column = (data.group_field or "").strip().lower()
    if column and column not in table.columns:
        candidates = join_first([escape_unprintable(name) for name in table.columns if name not in ("file", "split")])
        problem = f"is not a column of {escape_unprintable(root)}"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=f"set one of {candidates}")
    return column or None


def _read_group(root: str, row: Row, column: str) -> str:
    """Return the row's group, the cell in `column`, or raise a DataError if it is blank."""
    if not (group := escape_unprintable(row[column].strip())):
        problem, fix = f"has no {escape_unprintable(column)} (data.group_field)", "write one, such as unknown"
        raise _make_row_error(root, row, problem, fix)
    return group


def _check_groups(data: Data, groups: list[str]) -> None:
    """Raise a DataError if there are more than `MAX_GROUPS` distinct groups."""
    unique_groups = set(groups)
    if len(unique_groups) > MAX_GROUPS:
        problem = f"has {len(unique_groups):,} different values in {len(groups):,} rows, such as {min(unique_groups)!r}"
        fix = f"set a column of at most {MAX_GROUPS} different values"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=fix)


def _find_local_path(root: str, row: Row, cache_dir: Path) -> str:
    """Return the path of the row's file, or of its copy in `cache_dir` if the file is in a bucket."""
    file = _read_file(root, row)
    if is_remote(file):
        bucket, key = _split_address(root, row, file)
        return str(get_staging_folder(storage_path(bucket), cache_dir) / key)
    return os.path.join(os.path.dirname(root), file)


def _split_address(root: str, row: Row, address: str) -> tuple[str, str]:
    """Split gs://BUCKET/KEY into gs://BUCKET and KEY. Raise a DataError if KEY cannot be the path of a local copy."""
    bucket, _, key = address.removeprefix("gs://").partition("/")
    if reason := find_path_error(key) if bucket else "it names no bucket":
        problem = f"names {escape_unprintable(address)}, which cannot be a file ({reason})"
        raise _make_row_error(root, row, problem, "write gs://BUCKET/FOLDER/FILE, or a name relative to the CSV file")
    return f"gs://{bucket}", key


@dataclass(frozen=True)
class BucketFiles:
    """The files in one bucket that a CSV file lists, and the folder for their copies."""

    bucket: str  # address of the bucket
    folder: Path
    objects: dict[str, ObjectInfo]  # by object name, which is also the path of the copy relative to `folder`
    absent: frozenset[str]  # object names that the CSV file lists but the bucket does not have

    def delete_stale_copies(self) -> None:
        """Delete the copies of files that are no longer in the bucket."""
        for name in self.absent:
            (self.folder / name).unlink(missing_ok=True)


def plan_copies(data: Data, cache_dir: Path, budget: int) -> tuple[Data, list[BucketFiles]]:
    """List the files that must be copied from buckets before `open_csv` opens a dataset.

    Args:
        budget: maximum size of all copies, in bytes.

    Returns:
        `data`, whose root is replaced by the path of the local copy if the CSV file is in a bucket; and the files to
        copy from each bucket, including the CSV file.

    Raises:
        DataError: the CSV file cannot be read, a row has no file or names an object that cannot be a local file, the
            files exceed the budget, or a bucket cannot be listed.
        Interrupted: a bucket does not respond.
    """
    root = str(data.root)
    objects = list(_list_objects(root))
    if not objects:
        return data, []
    names_by_bucket: dict[str, set[str]] = {}
    for bucket, key in objects:
        names_by_bucket.setdefault(bucket, set()).add(key)
    copies = [_list_bucket(bucket, names, cache_dir) for bucket, names in names_by_bucket.items()]
    size = sum(info.size for files in copies for info in files.objects.values())
    check_budget(root, size, cache_dir, budget)
    if is_remote(root):
        bucket, _, key = root.removeprefix("gs://").partition("/")
        local_root = get_staging_folder(storage_path(f"gs://{bucket}"), cache_dir) / key
        data = data.model_copy(update={"root": str(local_root)})
    return data, copies


def _list_objects(root: str) -> Iterator[tuple[str, str]]:
    """Yield the bucket address and the object name of the CSV file and each listed file, if they are in a bucket."""
    table = _read_csv(root)
    bucket, _, key = root.removeprefix("gs://").partition("/")
    if is_remote(root):
        yield f"gs://{bucket}", key
    for row in table.rows:
        file = _read_file(root, row)
        if is_remote(file):
            yield _split_address(root, row, file)
        elif is_remote(root) and not os.path.isabs(file):
            yield _split_address(root, row, f"gs://{bucket}/{normpath(f'{dirname(key)}/{file}'.lstrip('/'))}")


def _list_bucket(bucket: str, names: set[str], cache_dir: Path) -> BucketFiles:
    """List the objects `names` in a bucket, with one request per 1,000 objects in each of their folders."""

    def list_folder(folder: str) -> dict[str, ObjectInfo]:
        health.record_progress()
        bucket_folder = storage_path(f"{bucket}/{folder}")
        infos = bucket_folder.list(recursive=False)
        return {str(info.path).removeprefix(f"{bucket}/"): info for info in infos}

    folders = sorted({name.rpartition("/")[0] for name in names})
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        listings = list(pool.map(list_folder, folders))
    objects = {name: info for listing in listings for name, info in listing.items() if name in names}
    folder = get_staging_folder(storage_path(bucket), cache_dir)
    return BucketFiles(bucket, folder, objects, frozenset(names - objects.keys()))
