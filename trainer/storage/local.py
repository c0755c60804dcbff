"""Atomic writes of local files; storage paths on the local disk."""

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
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file atomically: to a temporary file, flushed to disk, then renamed. Creates the folder if needed."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` as indented JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which is created if needed; deleted at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random number: on a disk that several pods use, process and thread ids are not unique.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.randbelow(10**15)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


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
        with self._reading(), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = self.path.stat()
            return self._info(status) if self.path.is_file() else None
        return None

    def is_folder(self) -> bool:
        with self._reading():
            return self.path.is_dir() and any(self.path.iterdir())

    def fetch(self) -> tuple[bytes, int] | None:
        with self._reading(), contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
        return None

    def read_range(self, start: int, length: int) -> bytes:
        with self._reading(), open(self.path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        with temporary_file(self.path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            return self._put(temporary, only_if)

    def list(self, recursive: bool = True) -> ObjectInfos:
        files: list[ObjectInfo] = []
        with self._reading():
            for folder, folders, names in os.walk(self.path, onerror=_raise_unless_absent):
                for name in names:
                    path = Path(folder, name)
                    if not is_unfinished(name):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            files.append(LocalPath(path)._info(path.stat()))
                if not recursive:
                    folders.clear()
        return sorted(files, key=lambda info: str(info.path).encode())

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
        info = self._existing()
        if expected is not None and expected.version != info.version:
            raise DataError(f"{self}: was replaced after it was listed", fix="start the same command again")
        with temporary_file(to) as temporary:
            with self._reading():
                source = open(self.path, "rb")  # noqa: SIM115 - closed below; errors of writing must stay OSError
            with source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, _BLOCK)
            os.replace(temporary, to)
        return info

    def upload(self, source: Path) -> int:
        with temporary_file(self.path) as temporary:
            with LocalPath(source)._reading():
                file = open(source, "rb")  # noqa: SIM115 - as above
            with file, open(temporary, "wb") as target:
                shutil.copyfileobj(file, target, _BLOCK)
            return self._put(temporary, ANY)

    def _info(self, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(self, status.st_size, status.st_mtime_ns)

    def _absent(self) -> DataError:
        return DataError(f"{self}: there is no such file", fix="check the path")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise self._absent() from error
            problem = f"{error.filename or self}: cannot be read ({error.strerror or error})"
            raise DataError(problem, fix="check the path and its permissions") from error

    def _put(self, temporary: Path, only_if: OnlyIf) -> int:
        """Rename over this file; if the write is conditional, check the version first.

        Conditional writers hold the folder's lock from the check to the rename (other writers do not take it: a marker
        must be written conditionally by all). The modification time is set explicitly, because the kernel's clock
        ticks in milliseconds and versions must not repeat.
        """
        sync(temporary)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            if only_if is not ANY:
                fcntl.flock(folder, fcntl.LOCK_EX)
            now = self.version()
            if only_if is not ANY and now != only_if:
                raise Conflict(f"{self}: changed since it was read")
            changed = max((now or 0) + 1, time.time_ns())
            os.utime(temporary, ns=(changed, changed))
            version = temporary.stat().st_mtime_ns
            os.replace(temporary, self.path)
        finally:
            os.close(folder)
        sync(self.path.parent)
        return version


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
