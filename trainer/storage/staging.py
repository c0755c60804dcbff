"""Staging: download files from a bucket in parallel, and cache them for later starts on this machine."""

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
from trainer.names import escape_unprintable, find_path_fault
from trainer.storage.base import ABANDONED_SECONDS, ObjectInfo, Version, is_unfinished
from trainer.storage.local import join_inside, write_json
from trainer.storage.path import SCHEMES, StoragePath, storage_path
from trainer.storage.small_files import read_json_or_default, require_json_object
from trainer.types import LogMessage

MAX_TRANSFERS = 16  # concurrent files
REPORT_SECONDS = 5.0  # between log lines about the progress
_LIST_COMMANDS = {"gs": "gcloud storage ls", "s3": "aws s3 ls"}  # by scheme
VERSIONS = ".versions.json"  # in the local folder: name -> object version of each downloaded file


def is_remote(address: str | None) -> bool:
    """Return whether the address is in a bucket."""
    return bool(address) and str(address).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def stage(address: str, cache_dir: Path, budget: int, note: LogMessage, check: Callable[[], None]) -> str:
    """Download a file, folder or pattern (`gs://bucket/folder/*.tfrec`) and return the local path that replaces it.

    A local address is returned unchanged. An address that exists literally is not a pattern. Objects that cannot be
    local files (`divide_listing`) are logged and skipped. Files cached in the same version are not downloaded again.
    Local files that the bucket no longer has are deleted.

    Args:
        budget: maximum bytes on disk for this address.
        note: logs what is downloaded and, every few seconds, the progress.
        check: is called after each file, and raises to cancel.

    Raises:
        DataError: nothing matches the address, or its files exceed the budget.
    """
    if not is_remote(address):
        return address
    copy = plan_copy(address, cache_dir, budget)
    if copy.left_out:
        note(f"{address}: {describe_left_out(copy.left_out)}")
    _delete_obsolete(copy)
    fetch_missing(address, copy.entries, copy.folder, note, check)
    return copy.path


def copied_folder(path: str, address: str, cache_dir: Path) -> tuple[str, str]:
    """Return the local folder and the bucket folder of all files of `address`, for which `stage` returned `path`."""
    _, _, *end = Path(path).relative_to(cache_dir / "staged").parts  # a pattern or the name of a single file
    suffix = "".join(f"/{part}" for part in end)
    return path.removesuffix(suffix), address.rstrip("/").removesuffix(suffix)


@dataclass(frozen=True)
class Copy:
    """The files in a bucket that match an address, and the local folder for their copies."""

    folder: Path
    end: str  # the address below the folder: a pattern or a file name, "" for the folder itself
    is_pattern: bool
    entries: dict[str, ObjectInfo]  # files in the bucket, by name relative to the folder
    left_out: tuple[str, ...] = ()  # objects that cannot be local files, each with the reason

    @property
    def path(self) -> str:
        """The local path or pattern that replaces the address."""
        return str(self.folder / self.end)

    def matches(self, name: str) -> bool:
        """Return whether the address includes the file of this relative name."""
        return not self.end or (fnmatch.fnmatchcase(name, self.end) if self.is_pattern else name == self.end)


def divide_listing(folder: StoragePath, listed: Iterable[ObjectInfo]) -> tuple[dict[str, ObjectInfo], list[str]]:
    """Divide a listing into files by name relative to the folder, and objects that cannot be local files.

    The latter are described with the reason. Empty objects with the name of a folder are in neither: some tools write
    them to mark the folder.
    """
    entries = {str(info.path).removeprefix(f"{folder}/"): info for info in listed}
    faults = {name: fault for name in entries if (fault := find_path_fault(name))}
    folders = {name[:i] for name in entries.keys() - faults.keys() for i, c in enumerate(name) if c == "/"}
    same = folders & entries.keys()
    faults |= {name: "there is a folder of the same name" for name in same if entries[name].size}
    left_out = [f"{escape_unprintable(str(entries[name].path))} ({fault})" for name, fault in sorted(faults.items())]
    return {name: info for name, info in entries.items() if name not in faults and name not in same}, left_out


def describe_left_out(left_out: Iterable[str]) -> str:
    """Describe the objects that `divide_listing` left out, the first three by name."""
    names = tuple(left_out)
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    objects = "1 object cannot be a file and is" if len(names) == 1 else f"{len(names)} objects cannot be files and are"
    return f"{objects} left out: {', '.join(names[:3])}{more}"


def plan_copy(address: str, cache_dir: Path, budget: int) -> Copy:
    """List the files that `stage` would download, and choose their local folder. Raises the errors of `stage`."""
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
    """Return the local folder for copies of the files below a folder or bucket."""
    return cache_dir / "staged" / hashlib.sha256(str(root).encode()).hexdigest()[:16] / root.name


def check_budget(address: str, size: int, cache_dir: Path, budget: int) -> None:
    """Raise a DataError if the files of an address, in total `size` bytes, exceed the `budget` on disk in bytes."""
    if size > budget:
        problem, value = f"{address} of {size / 1e9:.1f} GB does not fit into {cache_dir}", f"{budget / 1e9:.1f}"
        fix = "raise it, or set runtime.cache_dir to a larger disk"
        raise DataError(problem, key="runtime.disk_budget_gb", value=value, fix=fix)


def find_prepared_folder(data_dir: str, name: str) -> str:
    """Return the folder of a dataset that TensorFlow Datasets prepared in `data_dir`, such as gs://tfds-data/datasets.

    `name` is `beans`, `food101:2.0.0`, `dtd/config` or `dtd/config:3.0.1`. The default version is the newest one.
    Raises DataError if the dataset or version does not exist.
    """
    builder, _, version = name.partition(":")
    folder = storage_path(data_dir) / builder
    versions = [f.name for f in folder.folders() if re.fullmatch(r"\d+\.\d+\.\d+", f.name)]
    if not versions or (version and version not in versions):
        problem = f"has no {f'version {version}' if version else 'prepared dataset'} in {folder}"
        fix = "prepare it there, or give data.data_dir=gs://tfds-data/datasets for the public ones"
        raise DataError(problem, key="data.name", value=name, fix=fix)
    return str(folder / (version or max(versions, key=lambda v: [int(number) for number in v.split(".")])))


def _split_address(address: str) -> tuple[StoragePath, str, bool]:
    """Split an address into a folder and the rest below it, and return also whether the rest is a pattern.

    The rest is a pattern, a file name, or "" for the folder itself. A name that exists literally, such as
    `photos [2024]`, is not a pattern. If an object and a folder have the same name, the folder is used.
    """
    whole = storage_path(address)
    components = str(whole).split("/")
    for i in [i for i, component in enumerate(components) if has_wildcard(component)]:
        literal = storage_path("/".join(components[: i + 1]))
        if not literal.is_folder() and not (i + 1 == len(components) and literal.exists()):
            return storage_path("/".join(components[:i])), "/".join(components[i:]), True
    if whole.exists() and not whole.is_folder():
        return whole.parent, whole.name, False
    return whole, "", False


def has_wildcard(text: str) -> bool:
    """Return whether a text has a character of a pattern: *, ? or [."""
    return any(character in text for character in "*?[")


def fetch_missing(
    address: str, entries: dict[str, ObjectInfo], folder: Path, note: LogMessage, check: Callable[[], None]
) -> None:
    """Download the entries (by relative name) that the local folder does not have in the same version."""
    versions, missing = _read_versions(folder) or {}, select_missing(folder, entries)
    if not missing:
        note(f"{address}: all files are already in {folder}")
        return
    size, done = sum(info.size for info in missing.values()), 0
    files = f"{len(missing):,} file{'s' * (len(missing) != 1)}"
    note(f"{address}: fetching {files}, {size / 1e6:,.1f} MB, to {folder}")
    began = reported = time.monotonic()

    def download(name: str) -> str:
        missing[name].path.download(join_inside(folder, name), expected=missing[name])
        return name

    with ThreadPoolExecutor(MAX_TRANSFERS, "staging") as pool:
        try:
            for count, future in enumerate(as_completed([pool.submit(download, name) for name in sorted(missing)]), 1):
                name = future.result()
                versions[name] = missing[name].version
                done += missing[name].size
                check()
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    rate = done / 1e6 / (reported - began)
                    note(f"{address}: {count:,} of {len(missing):,} files, {rate:,.1f} MB/s")
                    write_json(folder / VERSIONS, versions)
        finally:
            pool.shutdown(cancel_futures=True)
            write_json(folder / VERSIONS, versions)


def select_missing(folder: Path, entries: dict[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """Return the entries that a local folder does not have in the same version and size."""
    versions = _read_versions(folder) or {}

    def is_cached(name: str, info: ObjectInfo) -> bool:
        try:
            return versions.get(name) == info.version and (folder / name).stat().st_size == info.size
        except OSError:
            return False

    return {name: info for name, info in entries.items() if not is_cached(name, info)}


def identify_staged_file(path: str | Path) -> str | None:
    """Return the name and version of a staged file in the bucket, equal on every machine; None for other files."""
    path = Path(path)
    for folder in path.parents:
        if (versions := _read_versions_cached(folder)) is not None:
            name = path.relative_to(folder).as_posix()
            return f"{name} {versions[name]}" if name in versions else None
    return None


def _read_versions(folder: Path) -> dict[str, Version] | None:
    """Read the versions of the staged files in a folder, by name; None if nothing was staged there."""
    return read_json_or_default(folder / VERSIONS, require_json_object, None)


_read_versions_cached = cache(_read_versions)


def _delete_obsolete(copy: Copy) -> None:
    """Delete files that the bucket no longer has, and temporary files that are too old for a running download."""
    for file in list(copy.folder.rglob("*")):
        name = file.relative_to(copy.folder).as_posix()
        if not file.is_file() or name == VERSIONS or name in copy.entries:
            continue
        unfinished = is_unfinished(name)
        if unfinished and time.time() - file.stat().st_mtime < ABANDONED_SECONDS:
            continue
        if unfinished or copy.matches(name):
            file.unlink(missing_ok=True)
    current = {parent for name in copy.entries for parent in (copy.folder / name).parents}
    for folder in sorted((path for path in copy.folder.rglob("*") if path.is_dir()), reverse=True):
        if folder not in current:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
