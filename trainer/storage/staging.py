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

from trainer.errors import DataError, format_count
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


def stage(
    address: str, cache_dir: Path, budget: int, log_message: LogMessage, check_cancelled: Callable[[], None]
) -> str:
    """Copy remote files to `cache_dir`, and return the local path that replaces the address.

    Objects that cannot be local files (see `separate_invalid_objects`) are logged and skipped. Files that `cache_dir`
    already contains in the same version are not downloaded again. Copies of files that are no longer in the bucket are
    deleted.

    Args:
        address: a file, folder or pattern such as `gs://bucket/folder/*.tfrec`. An address with wildcard characters
            that exists literally is not a pattern. A local path is returned unchanged.
        budget: maximum total size of the files, in bytes.
        log_message: logs what is downloaded and, every few seconds, the progress.
        check_cancelled: called after each file; may raise an error to cancel.

    Raises:
        DataError: nothing matches the address, its files exceed the budget, or the bucket denies access.
        Interrupted: the bucket does not respond.
        OSError: a copy cannot be written.
    """
    if not is_remote(address):
        return address
    plan = make_staging_plan(address, cache_dir, budget)
    if plan.skipped_objects:
        log_message(f"{address}: {describe_skipped_objects(plan.skipped_objects)}")
    _delete_obsolete(plan)
    download_missing_files(address, plan.infos, plan.folder, log_message, check_cancelled)
    return plan.path


def get_staged_and_source_folder(path: str, address: str, cache_dir: Path) -> tuple[str, str]:
    """Return the local folder of staged files, and the bucket folder that they were copied from.

    `path` is the result of `stage(address, ...)`. For `gs://b/photos/*.jpg`, the bucket folder is `gs://b/photos`.
    """
    _, _, *components = Path(path).relative_to(cache_dir / "staged").parts  # of the pattern or file name
    suffix = "".join(f"/{component}" for component in components)
    return path.removesuffix(suffix), address.rstrip("/").removesuffix(suffix)


@dataclass(frozen=True)
class StagingPlan:
    """The files in a bucket that match an address, and the local folder for their copies."""

    folder: Path  # local folder
    pattern_or_file: str  # last part of the address, relative to the folder; "" if the address is that of the folder
    has_pattern: bool  # whether `pattern_or_file` is a pattern
    infos: dict[str, ObjectInfo]  # the matching files in the bucket, by name relative to the folder
    skipped_objects: tuple[str, ...] = ()  # objects that cannot be local files: "ADDRESS (reason)"

    @property
    def path(self) -> str:
        """The local path or pattern that replaces the address."""
        return str(self.folder / self.pattern_or_file)

    def matches(self, name: str) -> bool:
        """Return whether the address includes the file `name`, which is relative to the folder."""
        return not self.pattern_or_file or (
            fnmatch.fnmatchcase(name, self.pattern_or_file) if self.has_pattern else name == self.pattern_or_file
        )


def separate_invalid_objects(
    folder: StoragePath, objects: Iterable[ObjectInfo]
) -> tuple[dict[str, ObjectInfo], list[str]]:
    """Divide the objects below `folder` into those that can be local files and those that cannot.

    An object cannot be a local file if its name is invalid, such as `a//b`, or is also the name of a folder. Some tools
    mark a folder with an empty object of the same name; such objects are in neither part of the result.

    Returns:
        The infos of the files, by name relative to `folder`, and "ADDRESS (reason)" for each object that cannot be one.
    """
    infos = {str(info.path).removeprefix(f"{folder}/"): info for info in objects}
    invalid_names = {name: reason for name in infos if (reason := find_path_error(name))}
    folder_names = {name[:i] for name in infos.keys() - invalid_names.keys() for i, c in enumerate(name) if c == "/"}
    shared_names = folder_names & infos.keys()
    invalid_names |= {name: "there is a folder of the same name" for name in shared_names if infos[name].size}
    skipped_objects = [
        f"{escape_unprintable(str(infos[name].path))} ({reason})" for name, reason in sorted(invalid_names.items())
    ]
    return {
        name: info for name, info in infos.items() if name not in invalid_names and name not in shared_names
    }, skipped_objects


def describe_skipped_objects(skipped_objects: Iterable[str]) -> str:
    """Format a log message about objects that cannot be files, from "ADDRESS (reason)" of each. It names three."""
    items = tuple(skipped_objects)
    suffix = f" and {len(items) - 3} more" if len(items) > 3 else ""
    clause = "1 object cannot be a file and is" if len(items) == 1 else f"{len(items)} objects cannot be files and are"
    return f"{clause} left out: {', '.join(items[:3])}{suffix}"


def make_staging_plan(address: str, cache_dir: Path, budget: int) -> StagingPlan:
    """List the files that match an address, and choose the local folder for their copies. Download nothing.

    The arguments have the same meaning as in `stage`, and the same DataError and Interrupted are raised.
    """
    root, pattern_or_file, has_pattern = _split_address(address)
    folder = get_staging_folder(root, cache_dir)
    infos, skipped_objects = separate_invalid_objects(
        root, [(root / pattern_or_file).require_info()] if pattern_or_file and not has_pattern else root.list()
    )
    plan = StagingPlan(folder, pattern_or_file, has_pattern, {}, tuple(skipped_objects))
    plan.infos.update({name: info for name, info in infos.items() if plan.matches(name) and name != VERSIONS})
    if not plan.infos:
        problem = (
            f"nothing matches {root}/{pattern_or_file}" if pattern_or_file else f"{root} is empty or does not exist"
        )
        problem += f"; {describe_skipped_objects(skipped_objects)}" if skipped_objects else ""
        raise DataError(problem, fix=f"check the address ({_LIST_COMMANDS[str(root)[:2]]} {shlex.quote(str(root))})")
    check_budget(address, sum(info.size for info in plan.infos.values()), cache_dir, budget)
    return plan


def get_staging_folder(root: StoragePath, cache_dir: Path) -> Path:
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
    address: str,
    infos: dict[str, ObjectInfo],
    folder: Path,
    log_message: LogMessage,
    check_cancelled: Callable[[], None],
) -> None:
    """Download the files that a local folder does not already contain in the same version.

    Args:
        address: address of the files, for log messages.
        infos: info of each file in the bucket, by name relative to `folder`.
        folder: local folder for the copies.
        log_message: logs what is downloaded and, every few seconds, the progress.
        check_cancelled: called after each file; may raise an error to cancel.

    Raises:
        DataError: a file was deleted or replaced after it was listed, or its name is not a valid name in the folder.
        Interrupted: the bucket does not respond.
        OSError: a copy cannot be written.
    """
    versions = _read_versions(folder) or {}
    missing = select_missing(folder, infos)
    if not missing:
        log_message(f"{address}: all files are already in {folder}")
        return
    total_bytes, done_bytes = sum(info.size for info in missing.values()), 0
    file_count = format_count(len(missing), "file")
    log_message(f"{address}: fetching {file_count}, {total_bytes / 1e6:,.1f} MB, to {folder}")
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
                check_cancelled()
                if time.monotonic() - last_report > REPORT_SECONDS:
                    last_report = time.monotonic()
                    rate = done_bytes / 1e6 / (last_report - start)
                    log_message(f"{address}: {index:,} of {len(missing):,} files, {rate:,.1f} MB/s")
                    write_json(folder / VERSIONS, versions)
        finally:
            pool.shutdown(cancel_futures=True)
            write_json(folder / VERSIONS, versions)


def select_missing(folder: Path, infos: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Return the items of `infos` (info by relative name) that a local folder lacks in this version and size."""
    versions = _read_versions(folder) or {}

    def is_cached(name: str, info: ObjectInfo) -> bool:
        try:
            return versions.get(name) == info.version and (folder / name).stat().st_size == info.size
        except OSError:
            return False

    return {name: info for name, info in infos.items() if not is_cached(name, info)}


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
    return read_json_or_default(folder / VERSIONS, require_json_object, default=None)


_read_versions_cached = cache(_read_versions)


def _delete_obsolete(plan: StagingPlan) -> None:
    """Delete copies of files that are no longer in the bucket, old temporary files, and folders that are then empty.

    A recent temporary file may belong to another process's running download, so it is not deleted.
    """
    for file in list(plan.folder.rglob("*")):
        name = file.relative_to(plan.folder).as_posix()
        if not file.is_file() or name == VERSIONS or name in plan.infos:
            continue
        is_temporary = is_temporary_name(name)
        if is_temporary and time.time() - file.stat().st_mtime < STALE_SECONDS:
            continue
        if is_temporary or plan.matches(name):
            file.unlink(missing_ok=True)
    needed_folders = {parent for name in plan.infos for parent in (plan.folder / name).parents}
    for folder in sorted((path for path in plan.folder.rglob("*") if path.is_dir()), reverse=True):
        if folder not in needed_folders:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
