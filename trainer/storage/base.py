"""Paths on disk or in a bucket: the operations that both have, without Google's client, which takes long to import."""

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
    """The version is not the one that a conditional write was to replace; nothing was written."""


class _Any(Enum):
    ANY = "any"


ANY = _Any.ANY
OnlyIf = int | None | Literal[_Any.ANY]
ObjectInfos = list["ObjectInfo"]  # by these names: inside a StoragePath, `list` is its method
StoragePaths = list["StoragePath"]

# `.name.<digits>-<digits>` beside a local file, `.parts-<token>` beside a large object.
_UNFINISHED = re.compile(r"(^|/)(\.[^/]+\.\d+-\d+$|[^/]+\.parts-[0-9a-f]{32}/)")


def is_unfinished(name: str) -> bool:
    """Whether a name belongs to a transfer that has not ended (or never will: its process was killed)."""
    return bool(_UNFINISHED.search(name))


@dataclass(frozen=True)
class ObjectInfo:
    """One file or object: `size` in bytes, `version` as `StoragePath.version`, `crc32c` (None for local files)."""

    path: StoragePath
    size: int
    version: int
    crc32c: int | None = None


class StoragePath(ABC):
    """A file or folder, here or in a bucket. Two equal places are equal values; `str` gives back what was written.

    Folders need not be made: writing below one makes it. Errors of every operation: `DataError` for what trying
    again cannot mend (absent, no such bucket, not allowed, no credentials), `Interrupted` for a bucket that did not
    answer in time. Writing to a local disk raises the `OSError` as it is: callers treat a full disk their own way.
    """

    is_local: bool

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part; of a bucket itself, the bucket's name."""

    @property
    @abstractmethod
    def parent(self) -> StoragePath: ...

    @abstractmethod
    def stat(self) -> ObjectInfo | None:
        """Size and version of the file, None where there is none (a folder is none)."""

    @abstractmethod
    def fetch(self) -> tuple[bytes, int] | None:
        """The whole content, verified, and the version it is of; None where there is no such file."""

    @abstractmethod
    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the file ends before."""

    @abstractmethod
    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        """Whole or not at all; the new version. `only_if=None` creates, `only_if=version` replaces that one.

        Raises `Conflict` where another version is there. A write that is tried again after a lost answer knows
        its own first try and does not call it a conflict.
        """

    @abstractmethod
    def list(self, recursive: bool = True) -> ObjectInfos:
        """The files in this folder (and below), sorted by name; empty where there is no such folder."""

    @abstractmethod
    def folders(self) -> StoragePaths:
        """The folders directly in this one, sorted by name."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file; an absent one is fine."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete all that is below this folder, unfinished transfers as well; an absent one is fine."""

    @abstractmethod
    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        """Copy to a local file, which appears whole: verified beside, then renamed.

        `expected`, an entry of `list`, saves asking for size and version again, and has that very version copied.
        The disk is not flushed: after a power cut the copy may have to be made again.
        """

    @abstractmethod
    def upload(self, source: Path) -> int:
        """Copy a local file to here, whole or not at all; the new version."""

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
        """Whether there is a file here (a folder is none: `is_folder`)."""
        return self.stat() is not None

    def version(self) -> int | None:
        """A number of its own for each content of this path: the generation in a bucket. None where absent."""
        entry = self.stat()
        return None if entry is None else entry.version

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether there is anything below."""

    def _existing(self) -> ObjectInfo:
        entry = self.stat()
        if entry is None:
            raise self._absent()
        return entry

    @abstractmethod
    def _absent(self) -> TrainerError: ...


deadline: ContextVar[float | None] = ContextVar("deadline", default=None)  # seconds, as set by `within`


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Another deadline than `gcs_client.DEADLINE` for the operations inside the block (in this thread)."""
    token = deadline.set(seconds)
    try:
        yield
    finally:
        deadline.reset(token)
