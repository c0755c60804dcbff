"""Atomic writes of local files, and `LocalPath`, the storage path of a local file or folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from trainer.errors import DataError
from trainer.names import MAX_COMPONENT_BYTES, encode_file_name, encode_utf8, escape_unprintable, find_path_error
from trainer.storage.base import (
    ABANDONED_SECONDS,
    ANY,
    UNFINISHED_DIGITS,
    ConflictError,
    ObjectInfo,
    StoragePath,
    Version,
    is_unfinished,
)
from trainer.storage.scratch import is_running

_COPY_BYTES = 1 << 22  # bytes that are read at once
_ABSENT_ERRORS = (FileNotFoundError, NotADirectoryError)


def compute_file_crc32c(path: Path, on_block: Callable[[], None] = lambda: None) -> int:
    """Return the CRC32C of a file. `on_block` is called after every 4 MiB, and can raise to stop."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_COPY_BYTES):
            crc = google_crc32c.extend(crc, block)
            on_block()
    return crc


def sync(path: Path) -> None:
    """Flush a file to disk, or the names in a folder after one of them was created or renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file atomically and flush it to disk. Create its folder if needed. Text is encoded as UTF-8."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(encode_utf8(content))
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def join_inside(folder: Path, name: str) -> Path:
    """Join a folder and a "/"-separated name that comes from elsewhere, such as that of an object in a bucket.

    Raises:
        DataError: the name leads out of the folder, or is not a possible file name.
    """
    if fault := find_path_error(name):
        problem = (
            f"{escape_unprintable(name)}: cannot be the name of a file in {escape_unprintable(str(folder))} ({fault})"
        )
        raise DataError(problem, fix="rename or remove it where it comes from")
    return folder / name


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically and flush it to disk."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield an unused temporary path next to `path`, and delete the file at the end unless the block has renamed it.

    The folder is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary_name(path)
    try:
        with add_path_to_errors(path):
            yield temporary
    finally:
        with contextlib.suppress(OSError):  # must not hide the error of the block
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create and yield a temporary folder next to `path`, and delete it at the end unless the block has renamed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary_name(path)
    temporary.mkdir()
    try:
        with add_path_to_errors(path):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_temporary_name(path: Path) -> Path:
    """Return a temporary path next to `path`, which `is_unfinished` recognizes. Create nothing."""
    # Random, since process IDs are not unique on a disk that several pods use.
    suffix = f".{os.getpid()}-{secrets.randbelow(10**UNFINISHED_DIGITS):0{UNFINISHED_DIGITS}d}"
    return path.with_name("." + os.fsdecode(os.fsencode(path.name)[: MAX_COMPONENT_BYTES - 1 - len(suffix)]) + suffix)


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError in this block that has no file name, such as one from writing to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def delete_unfinished(folder: Path, age: float = 0.0, recursive: bool = True) -> None:
    """Delete the temporary files and folders below `folder` that were not modified for `age` seconds.

    With an `age` of 0, no other process may write to the folder.

    Args:
        recursive: include subfolders; if False, only files and folders directly in `folder` are deleted.
    """
    for parent, folders, names in os.walk(folder):
        for name in filter(is_unfinished, [*names, *folders]):
            path = Path(parent, name)
            with contextlib.suppress(OSError):  # deleted meanwhile
                if time.time() - path.lstat().st_mtime >= age:
                    path.unlink() if name in names else shutil.rmtree(path)
        folders[:] = [name for name in folders if recursive and not is_unfinished(name)]


def delete_abandoned(folder: Path, name: str = "") -> None:
    """Delete the temporary files directly in `folder` that no other running process of this machine has written.

    Delete also those older than `ABANDONED_SECONDS`, since a process ID can be used again. If `name` is not empty,
    delete only the temporary files of the file of this name.
    """
    with contextlib.suppress(OSError):  # there is no folder
        for path in filter(lambda path: is_unfinished(path.name), list(folder.iterdir())):
            stem, _, suffix = path.name.removeprefix(".").rpartition(".")
            if name in ("", stem):
                with contextlib.suppress(OSError):  # deleted meanwhile
                    is_old = time.time() - path.lstat().st_mtime >= ABANDONED_SECONDS
                    if is_old or not is_running(suffix.partition("-")[0]):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class LocalPath(StoragePath):
    """The path of a local file or folder."""

    path: Path
    is_local = True

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPath:
        return LocalPath(join_inside(self.path, name))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPath:
        return LocalPath(self.path.parent)

    def stat(self) -> ObjectInfo | None:
        with self._reading(), contextlib.suppress(*_ABSENT_ERRORS):
            file_stat = self.path.stat()
            return self._info(file_stat) if self.path.is_file() else None
        return None

    def is_folder(self) -> bool:
        with self._reading():
            return self.path.is_dir() and any(self.path.iterdir())

    def fetch(self) -> tuple[bytes, int] | None:
        with self._reading(), contextlib.suppress(*_ABSENT_ERRORS), open(self.path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
        return None

    def read_range(self, start: int, length: int) -> bytes:
        with self._reading(), open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, content: bytes | str, *, only_if: Version | None = ANY) -> Version:
        with temporary_file(self.path) as temporary:
            temporary.write_bytes(encode_utf8(content))
            return self._commit(temporary, only_if)

    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        infos: list[ObjectInfo] = []
        with self._reading():
            for folder, folders, names in os.walk(self.path, onerror=_raise_unless_absent):
                for name in names:
                    path = Path(folder, name)
                    if not is_unfinished(name):
                        with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                            infos.append(LocalPath(path)._info(path.stat()))
                folders[:] = [name for name in folders if recursive and not is_unfinished(name)]
        return sorted(infos, key=lambda info: encode_file_name(str(info.path)))

    def folders(self) -> Sequence[StoragePath]:
        with self._reading():
            if not self.path.is_dir():
                return []
            return [self / name for name in sorted(child.name for child in self.path.iterdir() if child.is_dir())]

    def delete(self) -> None:
        with contextlib.suppress(*_ABSENT_ERRORS):
            self.path.unlink()

    def delete_tree(self) -> None:
        with contextlib.suppress(*_ABSENT_ERRORS):
            shutil.rmtree(self.path)

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        info = self.require_info()
        if expected is not None and expected.version != info.version:
            raise DataError(f"{self}: was replaced after it was listed", fix="start the same command again")
        with temporary_file(to) as temporary:
            self._copy(temporary)
            os.replace(temporary, to)
        return info

    def upload(self, source: Path) -> int:
        with temporary_file(self.path) as temporary:
            LocalPath(source)._copy(temporary)
            return self._commit(temporary, ANY)

    def open(self) -> BinaryIO:
        """Open the file for reading. Raise a DataError if it cannot be opened; later errors are OSErrors."""
        with self._reading():
            return open(self.path, "rb")

    def _copy(self, to: Path) -> None:
        with self.open() as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    def _info(self, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(self, status.st_size, status.st_mtime_ns)

    def _absent(self) -> DataError:
        return DataError(f"{self}: there is no such file", fix="check the path")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Translate an OSError in this block to a DataError."""
        try:
            yield
        except OSError as error:
            if isinstance(error, _ABSENT_ERRORS):
                raise self._absent() from error
            problem = f"{error.filename or self}: cannot be read ({error.strerror or error})"
            raise DataError(problem, fix="check the path and its permissions") from error

    def _commit(self, temporary: Path, only_if: Version | None) -> int:
        """Rename a temporary file to this path if the condition `only_if` holds, and return the new version.

        A conditional write locks the folder from the check of the condition to the rename. An unconditional write does
        not, so the condition is reliable only if all writes to the file are conditional. The modification time is set
        explicitly, because the kernel's clock ticks in milliseconds and versions must be unique.

        Raises:
            ConflictError: the condition does not hold.
        """
        sync(temporary)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            if only_if != ANY:
                fcntl.flock(folder, fcntl.LOCK_EX)
            info = self.stat()
            current = None if info is None else int(info.version)
            if only_if != ANY and current != only_if:
                raise ConflictError(f"{self}: changed since it was read")
            modified = max((current or 0) + 1, time.time_ns())
            os.utime(temporary, ns=(modified, modified))
            version = temporary.stat().st_mtime_ns  # as the file system rounds it
            os.replace(temporary, self.path)
        finally:
            os.close(folder)
        sync(self.path.parent)
        return version


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, _ABSENT_ERRORS):
        raise error
