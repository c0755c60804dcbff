"""The interface that local paths, `gs://` and `s3://` addresses have in common.

This module imports no client of a bucket: their imports are slow.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import DataError, TrainerError


class Conflict(TrainerError):
    """A conditional write failed because the file has another version. Nothing was written."""


# Modification time of a local file in ns, generation of an object in Google's storage, ETag of an object in S3. The
# first two are unique per write. An ETag is unique per content: a rewrite with the same content has the same one.
Version = int | str
ANY: Version = -1  # for an unconditional write; no file has this version

UNFINISHED_DIGITS = 15  # many, so that no file of a user has such a name: a date and time have at most 14
# `.name.<process>-<15 digits>` is a temporary local file or folder; `name.parts-<token>/` holds the parts of an upload.
_UNFINISHED = re.compile(
    rf"(^|/)(\.[^/]+\.\d{{1,7}}-\d{{{UNFINISHED_DIGITS}}}$|[^/]+\.parts-[0-9a-f]{{32}}/)", re.ASCII
)
ABANDONED_SECONDS = 3600.0  # age from which a temporary file that another machine may have written is deleted


def is_unfinished(name: str) -> bool:
    """Return whether this is the name of a temporary file or upload part, of a running or killed transfer."""
    return bool(_UNFINISHED.search(name))


@dataclass(frozen=True)
class ObjectInfo:
    """The metadata of a file or object."""

    path: StoragePath
    size: int  # in bytes
    version: Version
    crc32c: int | None = field(default=None, compare=False)  # None for local files, and in listings of S3


class StoragePath(ABC):
    """A file or folder, local or in a bucket.

    Equal addresses are equal values. `str` returns the address as written. Writes create missing parent folders.

    Every operation raises `DataError` for a permanent error (no such bucket, no permission, no credentials) and
    `Interrupted` if no request to a bucket succeeds in time. `read`, `read_text`, `size` and `download` also raise
    `DataError` if there is no such file. Local writes and deletions raise `OSError`, so that callers can handle a full
    disk.
    """

    is_local: bool

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """The last path component, or the bucket name if the path is a bucket."""

    @property
    @abstractmethod
    def parent(self) -> StoragePath: ...

    @abstractmethod
    def stat(self) -> ObjectInfo | None:
        """Return the size and version of the file; None if it does not exist or is a folder."""

    @abstractmethod
    def fetch(self) -> tuple[bytes, Version] | None:
        """Read the content and its version; None if there is no such file. The checksum of an object is verified."""

    @abstractmethod
    def read_range(self, start: int, length: int) -> bytes:
        """Read `length` bytes from `start`, fewer at the end of the file."""

    @abstractmethod
    def write(self, content: bytes | str, *, only_if: Version | None = ANY) -> Version:
        """Write atomically and return the new version.

        `only_if` makes the write conditional: None requires that the file does not exist, and a version requires that
        the file has this version. Otherwise Conflict is raised. If the response to a write was lost, its retry
        recognizes the new version as its own and succeeds.
        """

    @abstractmethod
    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        """List the files below this folder, or only directly in it, sorted by path; empty without such a folder."""

    @abstractmethod
    def folders(self) -> Sequence[StoragePath]:
        """List the folders directly in this one, sorted by name."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file if it exists."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete everything below this folder, including temporary files and upload parts."""

    @abstractmethod
    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        """Copy to a local file atomically and return the size and version that were copied.

        The checksum of an object is verified. The copy is not flushed to disk, so a power failure can lose it. With
        `expected`, an item of `list`, only this version is copied, without another metadata request.
        """

    @abstractmethod
    def upload(self, source: Path) -> Version:
        """Copy a local file to this path atomically and return the new version."""

    def read(self) -> bytes:
        """Read the content. The checksum of an object is verified."""
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

    def version(self) -> Version | None:
        """Return the version of the file; None if there is no such file."""
        info = self.stat()
        return None if info is None else info.version

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether there is anything below this path."""

    def require_info(self) -> ObjectInfo:
        """Return the size and version of the file; raise a DataError if there is none."""
        info = self.stat()
        if info is None:
            raise self._absent()
        return info

    @abstractmethod
    def _absent(self) -> TrainerError:
        """Make the error for a missing file."""


deadline_seconds: ContextVar[float | None] = ContextVar("deadline_seconds", default=None)  # see `request_deadline`


@contextlib.contextmanager
def request_deadline(seconds: float) -> Iterator[None]:
    """Set the deadline of each bucket request in this block, retries included, instead of the default."""
    token = deadline_seconds.set(seconds)
    try:
        yield
    finally:
        deadline_seconds.reset(token)
