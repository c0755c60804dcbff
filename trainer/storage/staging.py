"""Staging: copy files from a bucket to the local disk in parallel, and reuse the copies in later starts."""

import fnmatch
import hashlib
import re
import shlex
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.errors import DataError
from trainer.names import escape_unprintable, find_path_error
from trainer.storage.base import STALE_SECONDS, ObjectInfo, Version, is_temporary_name
from trainer.storage.local import safe_join, write_json
from trainer.storage.path import SCHEMES, StoragePath, storage_path
from trainer.storage.small_files import read_json_or_default, require_json_object
from trainer.types import LogMessage

MAX_TRANSFERS = 16  # maximum number of files in transfer at the same time
REPORT_SECONDS = 5.0  # minimum time between log lines about the progress
_LIST_COMMANDS = {"gs": "gcloud storage ls", "s3": "aws s3 ls"}  # by scheme, for error messages
VERSIONS = ".versions.json"  # file in the local folder: relative name -> object version of each downloaded file


def is_remote(address: str | None) -> bool:
    """Return whether `address` is in a bucket. A local path or None is not."""
    return bool(address) and str(address).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def stage(address: str, cache_dir: Path, budget: int, note: LogMessage, check: Callable[[], None]) -> str:
    """Copy remote files to `cache_dir`, and return the local path that replaces the address.

    Objects that cannot be local files (see `divide_listing`) are logged and skipped. Files that `cache_dir` already
    contains in the same version are not downloaded again. Copies of files that are no longer in the bucket are deleted.

    Args:
        address: a file, folder or pattern such as `gs://bucket/folder/*.tfrec`. An address with wildcard characters
            that exists literally is not a pattern. A local path is returned unchanged.
        budget: maximum total size of the files, in bytes.
        note: logs what is downloaded and, every few seconds, the progress.
        check: called after each file; may raise an error to cancel.

    Raises:
        DataError: nothing matches the address, its files exceed the budget, or the bucket denies access.
        Interrupted: the bucket does not respond.
        OSError: a copy cannot be written.
    """
    if not is_remote(address):
        return address
    copy = plan_copy(address, cache_dir, budget)
    if copy.left_out:
        note(f"{address}: {describe_left_out(copy.left_out)}")
    _delete_obsolete(copy)
    download_missing_files(address, copy.entries, copy.folder, note, check)
    return copy.path


def find_copied_folders(path: str, address: str, cache_dir: Path) -> tuple[str, str]:
    """Return the local folder of staged files, and the bucket folder that they were copied from.

    `path` is the result of `stage(address, ...)`. For `gs://b/photos/*.jpg`, the bucket folder is `gs://b/photos`.
    """
    _, _, *components = Path(path).relative_to(cache_dir / "staged").parts  # of the pattern or file name
    suffix = "".join(f"/{component}" for component in components)
    return path.removesuffix(suffix), address.rstrip("/").removesuffix(suffix)


@dataclass(frozen=True)
class Copy:
    """The files in a bucket that match an address, and the local folder for their copies."""

    folder: Path  # local folder
    end: str  # last part of the address, relative to the folder: a pattern or file name; "" for the folder itself
    is_pattern: bool  # whether `end` is a pattern
    entries: dict[str, ObjectInfo]  # the matching files in the bucket, by name relative to the folder
    left_out: tuple[str, ...] = ()  # objects that cannot be local files: "ADDRESS (reason)"

    @property
    def path(self) -> str:
        """The local path or pattern that replaces the address."""
        return str(self.folder / self.end)

    def matches(self, name: str) -> bool:
        """Return whether the address includes the file `name`, which is relative to the folder."""
        return not self.end or (fnmatch.fnmatchcase(name, self.end) if self.is_pattern else name == self.end)


def divide_listing(folder: StoragePath, listed: Iterable[ObjectInfo]) -> tuple[dict[str, ObjectInfo], list[str]]:
    """Divide the objects below `folder` into those that can be local files and those that cannot.

    An object cannot be a local file if its name is invalid, such as `a//b`, or is also the name of a folder. Some tools
    mark a folder with an empty object of the same name; such objects are in neither part of the result.

    Returns:
        The infos of the files, by name relative to `folder`, and "ADDRESS (reason)" for each object that cannot be one.
    """
    entries = {str(info.path).removeprefix(f"{folder}/"): info for info in listed}
    reasons = {name: reason for name in entries if (reason := find_path_error(name))}
    folder_names = {name[:i] for name in entries.keys() - reasons.keys() for i, c in enumerate(name) if c == "/"}
    shared_names = folder_names & entries.keys()
    reasons |= {name: "there is a folder of the same name" for name in shared_names if entries[name].size}
    left_out = [f"{escape_unprintable(str(entries[name].path))} ({why})" for name, why in sorted(reasons.items())]
    return {name: info for name, info in entries.items() if name not in reasons and name not in shared_names}, left_out


def describe_left_out(left_out: Iterable[str]) -> str:
    """Format a log message about objects that cannot be files, from "ADDRESS (reason)" of each. It names three."""
    items = tuple(left_out)
    suffix = f" and {len(items) - 3} more" * (len(items) > 3)
    clause = "1 object cannot be a file and is" if len(items) == 1 else f"{len(items)} objects cannot be files and are"
    return f"{clause} left out: {', '.join(items[:3])}{suffix}"


def plan_copy(address: str, cache_dir: Path, budget: int) -> Copy:
    """List the files that match an address, and choose the local folder for their copies. Download nothing.

    The arguments have the same meaning as in `stage`, and the same DataError and Interrupted are raised.
    """
    root, end, is_pattern = _split_address(address)
    folder = find_copy_folder(root, cache_dir)
    entries, left_out = divide_listing(root, [(root / end).require_info()] if end and not is_pattern else root.list())
    copy = Copy(folder, end, is_pattern, {}, tuple(left_out))
    copy.entries.update({name: info for name, info in entries.items() if copy.matches(name) and name != VERSIONS})
    if not copy.entries:
        problem = f"nothing matches {root}/{end}" if end else f"{root} is empty or does not exist"
        problem += f"; {describe_left_out(left_out)}" if left_out else ""
        raise DataError(problem, fix=f"check the address ({_LIST_COMMANDS[str(root)[:2]]} {shlex.quote(str(root))})")
    check_budget(address, sum(info.size for info in copy.entries.values()), cache_dir, budget)
    return copy


def find_copy_folder(root: StoragePath, cache_dir: Path) -> Path:
    """Return the local folder for copies of the files below `root`, which is a folder or a bucket."""
    return cache_dir / "staged" / hashlib.sha256(str(root).encode()).hexdigest()[:16] / root.name


def check_budget(address: str, size: int, cache_dir: Path, budget: int) -> None:
    """Raise a DataError if the total `size` of the files at an address exceeds `budget` (both in bytes)."""
    if size > budget:
        problem, value = f"{address} of {size / 1e9:.1f} GB does not fit into {cache_dir}", f"{budget / 1e9:.1f}"
        fix = "raise it, or set runtime.cache_dir to a larger disk"
        raise DataError(problem, key="runtime.disk_budget_gb", value=value, fix=fix)


def find_prepared_folder(data_dir: str, name: str) -> str:
    """Return the folder of a dataset version that TensorFlow Datasets has prepared below `data_dir`.

    Args:
        data_dir: address such as gs://tfds-data/datasets.
        name: dataset name such as `beans`, `food101:2.0.0`, `dtd/config` or `dtd/config:3.0.1`. The version defaults
            to the highest one.

    Raises:
        DataError: the dataset or version does not exist, or the bucket denies access.
    """
    builder, _, version = name.partition(":")
    folder = storage_path(data_dir) / builder
    versions = [child.name for child in folder.folders() if re.fullmatch(r"\d+\.\d+\.\d+", child.name)]
    if not versions or (version and version not in versions):
        problem = f"has no {f'version {version}' if version else 'prepared dataset'} in {folder}"
        fix = "prepare it there, or give data.data_dir=gs://tfds-data/datasets for the public ones"
        raise DataError(problem, key="data.name", value=name, fix=fix)
    return str(folder / (version or max(versions, key=lambda v: [int(number) for number in v.split(".")])))


def _split_address(address: str) -> tuple[StoragePath, str, bool]:
    """Split an address into a folder and the rest of the address, and also return whether the rest is a pattern.

    The rest is a pattern, a file name, or "" if the address names a folder. A name that exists literally, such as
    `photos [2024]`, is not a pattern. If an object and a folder have the same name, the folder is used.
    """
    path = storage_path(address)
    components = str(path).split("/")
    for i in [i for i, component in enumerate(components) if has_wildcard(component)]:
        literal = storage_path("/".join(components[: i + 1]))
        if not literal.is_folder() and not (i + 1 == len(components) and literal.exists()):
            return storage_path("/".join(components[:i])), "/".join(components[i:]), True
    if path.exists() and not path.is_folder():
        return path.parent, path.name, False
    return path, "", False


def has_wildcard(text: str) -> bool:
    """Return whether a string contains a wildcard character: *, ? or [."""
    return any(character in text for character in "*?[")


def download_missing_files(
    address: str, entries: dict[str, ObjectInfo], folder: Path, note: LogMessage, check: Callable[[], None]
) -> None:
    """Download the files that a local folder does not already contain in the same version.

    Args:
        address: address of the files, for log messages.
        entries: info of each file in the bucket, by name relative to `folder`.
        folder: local folder for the copies.
        note: logs what is downloaded and, every few seconds, the progress.
        check: called after each file; may raise an error to cancel.

    Raises:
        DataError: a file was deleted or replaced after it was listed, or its name is not a valid name in the folder.
        Interrupted: the bucket does not respond.
        OSError: a copy cannot be written.
    """
    versions, missing = _read_versions(folder) or {}, select_missing(folder, entries)
    if not missing:
        note(f"{address}: all files are already in {folder}")
        return
    total_bytes, done_bytes = sum(info.size for info in missing.values()), 0
    file_count = f"{len(missing):,} file{'s' * (len(missing) != 1)}"
    note(f"{address}: fetching {file_count}, {total_bytes / 1e6:,.1f} MB, to {folder}")
    start = last_report = time.monotonic()

    def download(name: str) -> str:
        missing[name].path.download(safe_join(folder, name), expected=missing[name])
        return name

    with ThreadPoolExecutor(MAX_TRANSFERS, "staging") as pool:
        try:
            for index, future in enumerate(as_completed([pool.submit(download, name) for name in sorted(missing)]), 1):
                name = future.result()
                versions[name] = missing[name].version
                done_bytes += missing[name].size
                check()
                if time.monotonic() - last_report > REPORT_SECONDS:
                    last_report = time.monotonic()
                    rate = done_bytes / 1e6 / (last_report - start)
                    note(f"{address}: {index:,} of {len(missing):,} files, {rate:,.1f} MB/s")
                    write_json(folder / VERSIONS, versions)
        finally:
            pool.shutdown(cancel_futures=True)
            write_json(folder / VERSIONS, versions)


def select_missing(folder: Path, entries: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Return the items of `entries` (info by relative name) that a local folder lacks in this version and size."""
    versions = _read_versions(folder) or {}

    def is_cached(name: str, info: ObjectInfo) -> bool:
        try:
            return versions.get(name) == info.version and (folder / name).stat().st_size == info.size
        except OSError:
            return False

    return {name: info for name, info in entries.items() if not is_cached(name, info)}


def identify_staged_file(path: str | Path) -> str | None:
    """Return "NAME VERSION" of the object from which a local file was staged, or None if it was not staged.

    Unlike the local path and modification time, this string is the same on every machine.
    """
    path = Path(path)
    for folder in path.parents:
        if (versions := _read_versions_cached(folder)) is not None:
            name = path.relative_to(folder).as_posix()
            return f"{name} {versions[name]}" if name in versions else None
    return None


def _read_versions(folder: Path) -> dict[str, Version] | None:
    """Return the version of each staged file in a folder, by relative name; None if the folder has no staged files."""
    return read_json_or_default(folder / VERSIONS, require_json_object, None)


_read_versions_cached = cache(_read_versions)


def _delete_obsolete(copy: Copy) -> None:
    """Delete copies of files that are no longer in the bucket, old temporary files, and folders that are then empty.

    A recent temporary file may belong to another process's running download, so it is not deleted.
    """
    for file in list(copy.folder.rglob("*")):
        name = file.relative_to(copy.folder).as_posix()
        if not file.is_file() or name == VERSIONS or name in copy.entries:
            continue
        is_temporary = is_temporary_name(name)
        if is_temporary and time.time() - file.stat().st_mtime < STALE_SECONDS:
            continue
        if is_temporary or copy.matches(name):
            file.unlink(missing_ok=True)
    needed_folders = {parent for name in copy.entries for parent in (copy.folder / name).parents}
    for folder in sorted((path for path in copy.folder.rglob("*") if path.is_dir()), reverse=True):
        if folder not in needed_folders:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
