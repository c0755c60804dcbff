"""Open a dataset of image files that a CSV file lists, with their labels, and optionally their splits and groups."""

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
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import escape_unprintable, find_path_fault, normalize_class_name
from trainer.storage.base import ObjectInfo
from trainer.storage.path import storage_path
from trainer.storage.staging import MAX_TRANSFERS, check_budget, find_copy_folder, is_remote
from trainer.types import Purpose

REQUIRED, OPTIONAL = ("file", "label"), ("split", "group")
_EMPTY = normalize_class_name("")


def open_csv(data: Data, cache_dir: Path, purpose: Purpose = "train") -> RawData:
    """Open the images that the CSV file data.root lists, one row each.

    The columns are `file` (relative to the folder of the CSV file, absolute, or gs://), `label` (the name of the
    class), optionally `split`, and optionally the one that data.group_field names. Files in a bucket are read from
    their copies in `cache_dir` (`plan_copies`). Without a column `split` all images are in train; splits are divided
    as those of an image folder, also by the same hash, so that a CSV file of a folder gives the splits of the folder.

    Raises:
        DataError: the CSV file cannot be read (`read_table`); a row has no file, label, split or group, an unknown
            split, or the file of an earlier row; no row is in train; data.group_field is no column, or has more than
            `MAX_GROUPS` values; with on_error="fail", a file cannot be read or is not an image.
    """
    root = os.path.expanduser(data.root or "")
    table = _read(root)
    group_column = _find_group_column(data, root, table)
    class_names = sorted({_read_label(root, row) for row in table.rows})
    index = {name: label for label, name in enumerate(class_names)}
    images: dict[str, list[ImageFile]] = {}
    first_rows: dict[str, int] = {}
    for row in table.rows:
        path = _find_local_path(root, row, cache_dir)
        if (first := first_rows.setdefault(os.path.normpath(path), row.number)) != row.number:
            problem = f"names the file of row {first} again: {escape_unprintable(row['file'])}"
            raise _row_error(root, row, problem, "list each file once")
        group = _read_group(root, row, group_column) if group_column else None
        image = ImageFile(path, row["file"], index[_read_label(root, row)], row.number, group)
        images.setdefault(_read_split(root, row, table), []).append(image)
    if "train" not in images:
        splits = join_first(list(images))
        problem = f"has no row of the split train, only of {splits}" if images else "has no rows below its header"
        raise DataError(problem, key="data.root", value=root, fix="list the training images")
    if group_column:
        _check_groups(data, [image.group or "" for members in images.values() for image in members])
    by_split = {name: images[name] for name in SPLITS if name in images}
    contents = {name: f"{len(members)} rows of {escape_unprintable(root)}" for name, members in by_split.items()}
    unread = [name for name in table.columns if name not in (*REQUIRED, "split", group_column)]
    listed = join_first([escape_unprintable(name) for name in unread if name])
    notes = [f"columns that are not read: {listed}; data.group_field=COLUMN reports scores by one"] if listed else []
    return build_raw_data(ListedImages(Path(root).stem, tuple(class_names), by_split, contents, notes), data, purpose)


def _read(root: str) -> Table:
    return read_table(root, "data.root", REQUIRED, OPTIONAL)


def _row_error(root: str, row: Row, problem: str, fix: str) -> DataError:
    return DataError(f"row {row.number} {problem}", key="data.root", value=root, fix=fix)


def _read_file(root: str, row: Row) -> str:
    """Return the cell with the file."""
    if not row["file"].strip():
        raise _row_error(root, row, "has no file", "write its path, or remove the row")
    return row["file"]


def _read_label(root: str, row: Row) -> str:
    """Return the name of the class."""
    if (name := normalize_class_name(row["label"])) == _EMPTY:
        file = escape_unprintable(_read_file(root, row))
        raise _row_error(root, row, f"has no label: {file}", "write the name of its class, or remove the row")
    return name


def _read_split(root: str, row: Row, table: Table) -> str:
    if "split" not in table.columns:
        return "train"
    word = row["split"].strip()
    if split := SPLIT_NAMES.get(word.lower()):
        return split
    problem = f"has an unknown split, {escape_unprintable(word)}" if word else "has no split"
    fix = "write train, validation (or val, valid) or test in each row, or remove the column"
    raise _row_error(root, row, problem, fix)


def _find_group_column(data: Data, root: str, table: Table) -> str | None:
    """Return the column that data.group_field names; None if it is not set."""
    column = (data.group_field or "").strip().lower()
    if column and column not in table.columns:
        listed = join_first([escape_unprintable(name) for name in table.columns if name not in ("file", "split")])
        problem = f"is not a column of {escape_unprintable(root)}"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=f"set one of {listed}")
    return column or None


def _read_group(root: str, row: Row, column: str) -> str:
    if not (group := escape_unprintable(row[column].strip())):
        problem, fix = f"has no {escape_unprintable(column)} (data.group_field)", "write one, such as unknown"
        raise _row_error(root, row, problem, fix)
    return group


def _check_groups(data: Data, groups: list[str]) -> None:
    distinct = set(groups)
    if len(distinct) > MAX_GROUPS:
        problem = f"has {len(distinct):,} different values in {len(groups):,} rows, such as {min(distinct)!r}"
        fix = f"set a column of at most {MAX_GROUPS} different values"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=fix)


def _find_local_path(root: str, row: Row, cache_dir: Path) -> str:
    """Return the path of the file, or of its copy in `cache_dir` if it is in a bucket."""
    file = _read_file(root, row)
    if is_remote(file):
        bucket, key = _split_address(root, row, file)
        return str(find_copy_folder(storage_path(bucket), cache_dir) / key)
    return os.path.join(os.path.dirname(root), file)


def _split_address(root: str, row: Row, address: str) -> tuple[str, str]:
    """Return the address of the bucket, and the name of the object."""
    bucket, _, key = address.removeprefix("gs://").partition("/")
    if fault := find_path_fault(key) if bucket else "it names no bucket":
        problem = f"names {escape_unprintable(address)}, which cannot be a file ({fault})"
        raise _row_error(root, row, problem, "write gs://BUCKET/FOLDER/FILE, or a name relative to the CSV file")
    return f"gs://{bucket}", key


@dataclass(frozen=True)
class BucketFiles:
    """The files in one bucket that a CSV file lists, and the folder for their copies."""

    bucket: str  # its address
    folder: Path
    entries: dict[str, ObjectInfo]  # by name in the bucket, and in the folder
    absent: frozenset[str]  # names that the bucket does not have

    def delete_absent(self) -> None:
        """Delete the copies of files that the bucket had when they were made."""
        for name in self.absent:
            (self.folder / name).unlink(missing_ok=True)


def plan_copies(data: Data, cache_dir: Path, budget: int) -> tuple[Data, list[BucketFiles]]:
    """List the files of data.source=csv that must be copied from buckets before the source is opened.

    Returns:
        The settings with the local path of the CSV file, and the files of each bucket, the CSV file among them.

    Raises:
        DataError: the CSV file cannot be read, a row names an object that cannot be a file, the files exceed `budget`
            bytes, or a bucket cannot be listed.
    """
    root = str(data.root)
    addresses = list(_list_addresses(root))
    if not addresses:
        return data, []
    names: dict[str, set[str]] = {}
    for bucket, key in addresses:
        names.setdefault(bucket, set()).add(key)
    copies = [_list_bucket(bucket, wanted, cache_dir) for bucket, wanted in names.items()]
    size = sum(info.size for copy in copies for info in copy.entries.values())
    check_budget(root, size, cache_dir, budget)
    if is_remote(root):
        bucket, _, key = root.removeprefix("gs://").partition("/")
        local = find_copy_folder(storage_path(f"gs://{bucket}"), cache_dir) / key
        data = data.model_copy(update={"root": str(local)})
    return data, copies


def _list_addresses(root: str) -> Iterator[tuple[str, str]]:
    """Yield the bucket and the name of each listed file that is in a bucket, and of the CSV file if it is."""
    table = _read(root)
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
    """List the folders that have files of these names, each with one request per 1,000 objects."""

    def list_folder(folder: str) -> dict[str, ObjectInfo]:
        health.record_progress()
        home = storage_path(f"{bucket}/{folder}")
        infos = home.list(recursive=False)
        return {str(info.path).removeprefix(f"{bucket}/"): info for info in infos}

    folders = sorted({name.rpartition("/")[0] for name in names})
    with ThreadPoolExecutor(MAX_TRANSFERS) as pool:
        listings = list(pool.map(list_folder, folders))
    entries = {name: info for listing in listings for name, info in listing.items() if name in names}
    folder = find_copy_folder(storage_path(bucket), cache_dir)
    return BucketFiles(bucket, folder, entries, frozenset(names - entries.keys()))
