"""Local files written so that a reader, or a power cut, never sees half of one; local paths as storage paths."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError
from trainer.storage.base import (
    ANY,
    Conflict,
    ObjectInfo,
    ObjectInfos,
    OnlyIf,
    StoragePath,
    StoragePaths,
    is_unfinished,
)

_BLOCK = 1 << 22  # bytes copied at a time


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or entered into a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside, flush to disk, rename over. Makes the folder if needed."""
    with temporary_file(path) as beside:
        _write_synced(beside, content)
        os.replace(beside, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` as indented JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A path in the same folder, which is made if needed; what is left there at the end is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random number, not the thread's: on a disk that several pods use, processes and threads have the same numbers.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.randbelow(10**15)}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes | str) -> None:
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class LocalPath(StoragePath):
    """A path on disk."""

    path: Path
    is_local = True

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPath:
        return LocalPath(self.path / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPath:
        return LocalPath(self.path.parent)

    def stat(self) -> ObjectInfo | None:
        with self._reading():
            try:
                status = self.path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return self._entry(status) if self.path.is_file() else None

    def is_folder(self) -> bool:
        with self._reading():
            return self.path.is_dir() and any(self.path.iterdir())

    def fetch(self) -> tuple[bytes, int] | None:
        with self._reading():
            try:
                with open(self.path, "rb") as file:
                    return file.read(), os.fstat(file.fileno()).st_mtime_ns
            except FileNotFoundError:
                return None

    def read_range(self, start: int, length: int) -> bytes:
        with self._reading(), open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        with temporary_file(self.path) as beside:
            _write_synced(beside, content)
            return self._put(beside, only_if)

    def list(self, recursive: bool = True) -> ObjectInfos:
        entries = []
        with self._reading():
            for folder, folders, files in os.walk(self.path, onerror=_raise_unless_absent):
                for name in files:
                    path = Path(folder, name)
                    if not is_unfinished(name):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            entries.append(LocalPath(path)._entry(path.stat()))
                if not recursive:
                    folders.clear()
        return sorted(entries, key=lambda entry: str(entry.path).encode())

    def folders(self) -> StoragePaths:
        with self._reading():
            if not self.path.is_dir():
                return []
            return [self / name for name in sorted(child.name for child in self.path.iterdir() if child.is_dir())]

    def delete(self) -> None:
        with contextlib.suppress(NotADirectoryError):
            self.path.unlink(missing_ok=True)

    def delete_tree(self) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(self.path)

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        entry = self._existing()
        if expected is not None and expected.version != entry.version:
            raise DataError(f"{self}: was replaced after it was listed; list it again")
        with temporary_file(to) as beside:
            with self._reading():
                source = open(self.path, "rb")  # noqa: SIM115 - closed below; errors of writing must stay OSError
            with source, open(beside, "wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)
            os.replace(beside, to)
        return entry

    def upload(self, source: Path) -> int:
        with temporary_file(self.path) as beside:
            with LocalPath(source)._reading():
                file = open(source, "rb")  # noqa: SIM115 - as above
            with file, open(beside, "wb") as target:
                shutil.copyfileobj(file, target, _BLOCK)
                target.flush()
                os.fsync(target.fileno())
            return self._put(beside, ANY)

    def _entry(self, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(self, status.st_size, status.st_mtime_ns)

    def _absent(self) -> DataError:
        return DataError(f"{self}: there is no such file")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise self._absent() from error
            raise DataError(f"{error.filename or self}: cannot be read ({error.strerror or error})") from error

    def _put(self, beside: Path, only_if: OnlyIf) -> int:
        """Rename over, after a check of the version where the write is conditional.

        Conditional writers hold the folder's lock from the check to the rename, so that of two only one finds
        its version (other writers do not take it: a marker must be written conditionally by all). The time of
        change is set by hand: the kernel's clock ticks in milliseconds and inodes come back, versions must not.
        """
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            if only_if is not ANY:
                fcntl.flock(folder, fcntl.LOCK_EX)
            now = self.version()
            if only_if is not ANY and now != only_if:
                raise Conflict(f"{self}: changed since it was read")
            changed = max((now or 0) + 1, time.time_ns())
            os.utime(beside, ns=(changed, changed))
            version = beside.stat().st_mtime_ns
            os.replace(beside, self.path)
        finally:
            os.close(folder)
        sync(self.path.parent)
        return version


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
