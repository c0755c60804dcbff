"""The interface that local paths and `gs://` addresses have in common; imports no Google client, which is slow."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DataError, TrainerError


class Conflict(TrainerError):
    """The file no longer has the version that a conditional write replaces; nothing was written."""


ANY = -1  # for an unconditional write; no file has this version

UNFINISHED_DIGITS = 15  # many, so that no file of a user has such a name: a date and time have at most 14
# `.name.<process>-<15 digits>` is a temporary local file or folder; `name.parts-<token>/` has the parts of an object.
_UNFINISHED = re.compile(
    rf"(^|/)(\.[^/]+\.\d{{1,7}}-\d{{{UNFINISHED_DIGITS}}}$|[^/]+\.parts-[0-9a-f]{{32}}/)", re.ASCII
)


def is_unfinished(name: str) -> bool:
    """Return whether this is the name of a temporary file or part, of a transfer that is in progress or was killed."""
    return bool(_UNFINISHED.search(name))


@dataclass(frozen=True)
class ObjectInfo:
    """A file or object as it was listed."""

    path: StoragePath
    size: int  # in bytes
    version: int  # differs for each write: the modification time in ns of a file, the generation of an object
    crc32c: int | None = None  # None for local files


class StoragePath(ABC):
    """A file or folder, local or in a bucket. Equal addresses are equal values; `str` returns the address as written.

    Writing creates missing parent folders. Every operation raises `DataError` for a permanent error (no such bucket, no
    permission, no credentials) and `Interrupted` if a bucket does not respond in time. Writing and deleting local files
    raises `OSError`, so that callers can handle a full disk. `read`, `read_text`, `size` and `download` also raise
    `DataError` if there is no such file.
    """

    is_local: bool

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """The last component of the path; of a bucket itself, its name."""

    @property
    @abstractmethod
    def parent(self) -> StoragePath: ...

    @abstractmethod
    def stat(self) -> ObjectInfo | None:
        """Return size and version of the file; None if it does not exist or is a folder."""

    @abstractmethod
    def fetch(self) -> tuple[bytes, int] | None:
        """Read the content (of an object, verified by its CRC32C) and its version; None if there is no such file."""

    @abstractmethod
    def read_range(self, start: int, length: int) -> bytes:
        """Read `length` bytes from `start`, fewer at the end of the file."""

    @abstractmethod
    def write(self, content: bytes | str, *, only_if: int | None = ANY) -> int:
        """Write atomically and return the new version; `only_if`: None to create the file, or the version to replace.

        Raises Conflict if the file exists or has another version. If the response to a write was lost, its retry
        recognizes the version as its own and succeeds.
        """

    @abstractmethod
    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        """List the files below this folder, or only directly in it, by path; empty if there is no such folder."""

    @abstractmethod
    def folders(self) -> Sequence[StoragePath]:
        """List the folders directly in this one, sorted by name."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file if it exists."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete everything below this folder, including temporary files and parts."""

    @abstractmethod
    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        """Copy to a local file atomically and return the size and version that were copied.

        An object is verified by its CRC32C. The copy is not flushed to disk: a power failure may lose it. If an item of
        `list` is `expected`, only this version is copied, and a bucket is not queried for it again.
        """

    @abstractmethod
    def upload(self, source: Path) -> int:
        """Copy a local file to this path atomically and return the new version."""

    def read(self) -> bytes:
        """Read the content (of an object, verified by its CRC32C)."""
        content = self.fetch()
        if content is None:
            raise self._absent()
        return content[0]

    def read_text(self) -> str:
        """Read the content as UTF-8; raise a DataError if it is not."""
        try:
            return self.read().decode()
        except UnicodeDecodeError as error:
            problem = f"{self}: is not UTF-8 text ({error.reason} at byte {error.start})"
            raise DataError(problem, fix="restore or rewrite the file") from None

    def size(self) -> int:
        """Return the size in bytes."""
        return self.require_info().size

    def exists(self) -> bool:
        """Return whether there is a file, not a folder, at this path."""
        return self.stat() is not None

    def version(self) -> int | None:
        """Return a number that differs for each write to this path; None if there is no such file."""
        info = self.stat()
        return None if info is None else info.version

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether there is anything below this path."""

    def require_info(self) -> ObjectInfo:
        """Return size and version of the file; raise a DataError if there is none."""
        info = self.stat()
        if info is None:
            raise self._absent()
        return info

    @abstractmethod
    def _absent(self) -> TrainerError:
        """Return the error for a path without a file."""


deadline_seconds: ContextVar[float | None] = ContextVar("deadline_seconds", default=None)  # set by `within`


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limit each request to a bucket in the block to `seconds`, its retries included, instead of the default."""
    token = deadline_seconds.set(seconds)
    try:
        yield
    finally:
        deadline_seconds.reset(token)
