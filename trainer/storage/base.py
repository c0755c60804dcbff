"""Storage paths on disk or in a bucket: their common operations, without the slow import of Google's client."""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from trainer.errors import TrainerError


class Conflict(TrainerError):
    """A conditional write did not match the current version; nothing was written."""


class _Any(Enum):
    ANY = "any"


ANY = _Any.ANY
OnlyIf = int | None | Literal[_Any.ANY]
ObjectInfos = list["ObjectInfo"]  # inside a StoragePath, `list` is its method
StoragePaths = list["StoragePath"]

# `.name.<digits>-<digits>` next to a local file, `.parts-<token>` next to a large object.
_UNFINISHED = re.compile(r"(^|/)(\.[^/]+\.\d+-\d+$|[^/]+\.parts-[0-9a-f]{32}/)")


def is_unfinished(name: str) -> bool:
    """Return whether a name belongs to a transfer in progress, or to one whose process was killed."""
    return bool(_UNFINISHED.search(name))


@dataclass(frozen=True)
class ObjectInfo:
    """One file or object: `size` in bytes, `version` as `StoragePath.version`, `crc32c` (None for local files)."""

    path: StoragePath
    size: int
    version: int
    crc32c: int | None = None


class StoragePath(ABC):
    """A file or folder, local or in a bucket. Equal addresses are equal values; `str` returns the address as written.

    Writing creates missing parent folders. Every operation raises `DataError` for a permanent error (absent, no such
    bucket, no permission, no credentials) and `Interrupted` if a bucket does not respond in time. Local writes raise
    `OSError`, so that callers can handle a full disk.
    """

    is_local: bool

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """The last component of the path; the bucket's name for the bucket itself."""

    @property
    @abstractmethod
    def parent(self) -> StoragePath: ...

    @abstractmethod
    def stat(self) -> ObjectInfo | None:
        """Size and version of the file; None if it does not exist or is a folder."""

    @abstractmethod
    def fetch(self) -> tuple[bytes, int] | None:
        """The whole content, verified, and its version; None if there is no such file."""

    @abstractmethod
    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the file."""

    @abstractmethod
    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        """Write atomically and return the new version. `only_if=None` creates, `only_if=version` replaces that one.

        Raises `Conflict` if the current version is another one. A retry after a lost response recognizes its own
        earlier write, which is no conflict.
        """

    @abstractmethod
    def list(self, recursive: bool = True) -> ObjectInfos:
        """The files in this folder (and below it), sorted by name; empty if there is no such folder."""

    @abstractmethod
    def folders(self) -> StoragePaths:
        """The folders directly in this one, sorted by name."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file if it exists."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete everything below this folder, including unfinished transfers."""

    @abstractmethod
    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        """Copy to a local file: to a temporary file next to it, which is verified, then renamed.

        `expected`, an item of `list`, saves the request for size and version, and pins the version that is copied.
        The disk is not flushed: after a power failure the file may have to be downloaded again.
        """

    @abstractmethod
    def upload(self, source: Path) -> int:
        """Copy a local file to this path atomically and return the new version."""

    def read(self) -> bytes:
        """The whole content, verified."""
        content = self.fetch()
        if content is None:
            raise self._absent()
        return content[0]

    def read_text(self) -> str:
        """The content as UTF-8."""
        return self.read().decode()

    def size(self) -> int:
        """Size in bytes."""
        return self._existing().size

    def exists(self) -> bool:
        """Return whether there is a file at this path (for folders: `is_folder`)."""
        return self.stat() is not None

    def version(self) -> int | None:
        """A number that differs for each write to this path (in a bucket, the generation); None if absent."""
        info = self.stat()
        return None if info is None else info.version

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether there is any file below this path."""

    def _existing(self) -> ObjectInfo:
        info = self.stat()
        if info is None:
            raise self._absent()
        return info

    @abstractmethod
    def _absent(self) -> TrainerError: ...


deadline: ContextVar[float | None] = ContextVar("deadline", default=None)  # seconds, as set by `within`


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Replace `gcs_client.DEADLINE` for the operations of this thread inside the block."""
    token = deadline.set(seconds)
    try:
        yield
    finally:
        deadline.reset(token)
