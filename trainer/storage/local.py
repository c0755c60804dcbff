"""Atomic writes of local files, temporary files and their cleanup, and `LocalPath`, the local `StoragePath`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from trainer.errors import DataError
from trainer.names import MAX_COMPONENT_BYTES, encode_file_name, encode_utf8, escape_unprintable, find_path_error
from trainer.storage.base import (
    ANY,
    STALE_SECONDS,
    TEMPORARY_NAME_DIGITS,
    ConflictError,
    ObjectInfo,
    StoragePath,
    Version,
    encode_json,
    is_temporary_name,
)
from trainer.storage.scratch import is_running

_BLOCK_BYTES = 1 << 22  # bytes per read when a file is copied or its checksum is computed
_MACHINE_DIGITS = 5  # digits of a temporary name that identify the machine, before the random ones
_NOT_FOUND_ERRORS = (FileNotFoundError, NotADirectoryError)


def compute_file_crc32c(path: Path, on_block: Callable[[], None] = lambda: None) -> int:
    """Return a file's CRC32C. `on_block` is called after each block of up to 4 MiB; it may raise an error to cancel."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = google_crc32c.extend(crc, block)
            on_block()
    return crc


def sync(path: Path) -> None:
    """Flush a file to disk (fsync), or flush a folder so that a created or renamed entry survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file atomically and flush it to disk. Create its parent folder if needed. Text is encoded as UTF-8."""
    with temporary_file(path) as temporary_path:
        temporary_path.write_bytes(encode_utf8(content))
        sync(temporary_path)
        os.replace(temporary_path, path)
    sync(path.parent)


def safe_join(folder: Path, name: str) -> Path:
    """Join a folder and an untrusted "/"-separated name, such as the name of an object in a bucket.

    Raises:
        DataError: the joined path would be outside the folder, or `name` is not a valid file name.
    """
    if reason := find_path_error(name):
        problem = (
            f"{escape_unprintable(name)}: cannot be the name of a file in {escape_unprintable(str(folder))} ({reason})"
        )
        raise DataError(problem, fix="rename or remove it where it comes from")
    return folder / name


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and flushed to disk."""
    write_atomically(path, encode_json(value))


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield an unused path next to `path`, for a temporary file that the block can create and rename to `path`.

    The parent folder is created if needed. If the block does not rename the file, it is deleted at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = make_temporary_path(path)
    try:
        with add_path_to_errors(path):
            yield temporary_path
    finally:
        with contextlib.suppress(OSError):  # must not hide the block's error
            temporary_path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create and yield a temporary folder next to `path`, and delete it at the end unless the block has renamed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = make_temporary_path(path)
    temporary_path.mkdir()
    try:
        with add_path_to_errors(path):
            yield temporary_path
    finally:
        shutil.rmtree(temporary_path, ignore_errors=True)


def make_temporary_path(path: Path) -> Path:
    """Return the unused path `.NAME.PID-DIGITS` next to `path`. NAME is truncated if the result would be too long."""
    suffix = make_temporary_suffix(os.getpid())
    return path.with_name("." + os.fsdecode(os.fsencode(path.name)[: MAX_COMPONENT_BYTES - 1 - len(suffix)]) + suffix)


def make_temporary_suffix(process: int) -> str:
    """Return `.PID-DIGITS` for a temporary name of a local process: digits of the machine, then random digits."""
    num_random = TEMPORARY_NAME_DIGITS - _MACHINE_DIGITS
    return f".{process}-{_compute_machine_digits()}{secrets.randbelow(10**num_random):0{num_random}d}"


@cache
def _compute_machine_digits() -> str:
    """Hash what process IDs are unique in: the machine and its PID namespace, of which each container has one."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {namespace}'.encode()) % 10**_MACHINE_DIGITS:0{_MACHINE_DIGITS}d}"


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add `path` to any OSError in this block that has no file name, such as an error from writing to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def delete_temporary_files(folder: Path, age: float = 0.0, recursive: bool = True) -> None:
    """Delete the temporary files and folders below `folder` that were last modified at least `age` seconds ago.

    If `age` is 0, the caller must ensure that no other process is writing to `folder`.

    Args:
        recursive: include subfolders; if False, only files and folders directly in `folder` are deleted.
    """
    for dirpath, dirnames, filenames in os.walk(folder):
        for name in filter(is_temporary_name, [*filenames, *dirnames]):
            path = Path(dirpath, name)
            with contextlib.suppress(OSError):  # another process has deleted it
                if time.time() - path.lstat().st_mtime >= age:
                    path.unlink() if name in filenames else shutil.rmtree(path)
        dirnames[:] = [name for name in dirnames if recursive and not is_temporary_name(name)]


def delete_stale_temporary_files(folder: Path, name: str = "") -> None:
    """Delete the temporary files and folders directly in `folder` that killed processes have left.

    A temporary file is deleted if its process ran on this machine and has ended, or if it is older than `STALE_SECONDS`
    (an hour). A younger file of another machine or container may be in use. If `name` is not empty, delete only the
    temporary files of the file with this name, which must be too short to be truncated.
    """
    with contextlib.suppress(OSError):  # the folder does not exist
        for path in filter(lambda path: is_temporary_name(path.name), list(folder.iterdir())):
            stem, _, suffix = path.name.removeprefix(".").rpartition(".")
            if name in ("", stem):
                with contextlib.suppress(OSError):  # another process has deleted it
                    process, _, digits = suffix.partition("-")
                    is_old = time.time() - path.lstat().st_mtime >= STALE_SECONDS
                    is_local = digits.startswith(_compute_machine_digits())
                    if is_old or (is_local and not is_running(process)):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class LocalPath(StoragePath):
    """The path of a local file or folder. The version of a file is its modification time in ns."""

    path: Path
    is_local = True

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPath:
        return LocalPath(safe_join(self.path, name))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPath:
        return LocalPath(self.path.parent)

    def stat(self) -> ObjectInfo | None:
        with self._translate_read_errors(), contextlib.suppress(*_NOT_FOUND_ERRORS):
            file_stat = self.path.stat()
            return self._make_info(file_stat) if self.path.is_file() else None
        return None

    def is_folder(self) -> bool:
        with self._translate_read_errors():
            return self.path.is_dir() and any(self.path.iterdir())

    def fetch(self) -> tuple[bytes, int] | None:
        with self._translate_read_errors(), contextlib.suppress(*_NOT_FOUND_ERRORS), open(self.path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
        return None

    def read_range(self, start: int, length: int) -> bytes:
        with self._translate_read_errors(), open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, content: bytes | str, *, only_if: Version | None = ANY) -> Version:
        with temporary_file(self.path) as temporary_path:
            temporary_path.write_bytes(encode_utf8(content))
            return self._commit(temporary_path, only_if)

    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        infos: list[ObjectInfo] = []
        with self._translate_read_errors():
            for dirpath, dirnames, filenames in os.walk(self.path, onerror=_raise_unless_not_found):
                for name in filenames:
                    path = Path(dirpath, name)
                    if not is_temporary_name(name):
                        with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                            infos.append(LocalPath(path)._make_info(path.stat()))
                dirnames[:] = [name for name in dirnames if recursive and not is_temporary_name(name)]
        return sorted(infos, key=lambda info: encode_file_name(str(info.path)))

    def folders(self) -> Sequence[StoragePath]:
        with self._translate_read_errors():
            if not self.path.is_dir():
                return []
            return [self / name for name in sorted(child.name for child in self.path.iterdir() if child.is_dir())]

    def delete(self) -> None:
        with contextlib.suppress(*_NOT_FOUND_ERRORS):
            self.path.unlink()

    def delete_tree(self) -> None:
        with contextlib.suppress(*_NOT_FOUND_ERRORS):
            shutil.rmtree(self.path)

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        info = self.require_info()
        if expected is not None and expected.version != info.version:
            raise DataError(f"{self}: was replaced after it was listed", fix="start the same command again")
        with temporary_file(to) as temporary_path:
            self._copy(temporary_path)
            os.replace(temporary_path, to)
        return info

    def upload(self, source: Path) -> int:
        with temporary_file(self.path) as temporary_path:
            LocalPath(source)._copy(temporary_path)
            return self._commit(temporary_path, ANY)

    def open(self) -> BinaryIO:
        """Open the file for reading bytes; raise a DataError if it cannot be opened. Later errors are OSErrors."""
        with self._translate_read_errors():
            return open(self.path, "rb")

    def _copy(self, to: Path) -> None:
        with self.open() as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK_BYTES)

    def _make_info(self, file_stat: os.stat_result) -> ObjectInfo:
        return ObjectInfo(self, file_stat.st_size, file_stat.st_mtime_ns)

    def _make_not_found_error(self) -> DataError:
        return DataError(f"{self}: there is no such file", fix="check the path")

    @contextlib.contextmanager
    def _translate_read_errors(self) -> Iterator[None]:
        """Translate an OSError in this block to a DataError."""
        try:
            yield
        except OSError as error:
            if isinstance(error, _NOT_FOUND_ERRORS):
                raise self._make_not_found_error() from error
            problem = f"{error.filename or self}: cannot be read ({error.strerror or error})"
            raise DataError(problem, fix="check the path and its permissions") from error

    def _commit(self, temporary_path: Path, only_if: Version | None) -> int:
        """Rename a temporary file to this path if the condition `only_if` holds, and return the new version.

        A conditional write locks the folder from checking the condition until the rename. An unconditional write does
        not, so the condition is reliable only if all writes to the file are conditional. The modification time is set
        explicitly, because versions must be unique and file timestamps advance only every few milliseconds.

        Raises:
            ConflictError: the condition does not hold.
        """
        sync(temporary_path)
        folder_descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            if only_if != ANY:
                fcntl.flock(folder_descriptor, fcntl.LOCK_EX)
            info = self.stat()
            current_version = None if info is None else int(info.version)
            if only_if != ANY and current_version != only_if:
                raise ConflictError(f"{self}: changed since it was read")
            mtime_ns = max((current_version or 0) + 1, time.time_ns())
            os.utime(temporary_path, ns=(mtime_ns, mtime_ns))
            version = temporary_path.stat().st_mtime_ns  # as the file system rounds it
            os.replace(temporary_path, self.path)
        finally:
            os.close(folder_descriptor)
        sync(self.path.parent)
        return version


def _raise_unless_not_found(error: OSError) -> None:
    if not isinstance(error, _NOT_FOUND_ERRORS):
        raise error
