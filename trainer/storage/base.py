"""`StoragePath`, the common interface of local paths and of `gs://` and `s3://` addresses.

This module does not import the client libraries for buckets, because their imports are slow.
"""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import DataError, TrainerError


class ConflictError(TrainerError):
    """A conditional write failed because the file does not have the required version. Nothing was written."""


# The version of a file: the modification time in ns of a local file (int), the generation of an object in Google's
# storage (int), or the ETag of an object in S3 (str). Each write has a new modification time or generation. An ETag is
# a hash of the content, so objects with the same content have the same ETag.
Version = int | str
ANY: Version = -1  # value of `only_if` for an unconditional write; no file has this version

TEMPORARY_NAME_DIGITS = 15  # digits at the end of a temporary name; a date and time in a user's file name has 14
# `.name.<process>-<15 digits>` is a temporary local file or folder; `name.parts-<token>/` holds the parts of an upload.
_TEMPORARY_NAME = re.compile(
    rf"(^|/)(\.[^/]+\.\d{{1,7}}-\d{{{TEMPORARY_NAME_DIGITS}}}$|[^/]+\.parts-[0-9a-f]{{32}}/)", re.ASCII
)
STALE_SECONDS = 3600.0  # age at which a temporary file is deleted although another machine may have written it


def encode_json(value: Any, *, allow_nan: bool = True) -> str:
    """Encode a value as the text of a JSON file: indented, and with a final line break."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n"


def is_temporary_name(name: str) -> bool:
    """Return whether `name` is the name, path or address of a temporary file or folder, or of a part of an upload."""
    return bool(_TEMPORARY_NAME.search(name))


@dataclass(frozen=True)
class ObjectInfo:
    """The metadata of a file or object."""

    path: StoragePath
    size: int  # in bytes
    version: Version
    crc32c: int | None = field(default=None, compare=False)  # None if unknown, as for local files and listings of S3


class StoragePath(ABC):
    """The address of a file or folder, local or in a bucket. The file need not exist.

    Paths with the same address are equal. `str` returns the address: a local path, or `gs://bucket/key`. Writes create
    missing parent folders.

    Every operation raises `DataError` for a permanent error (no such bucket, no permission, no credentials) and
    `Interrupted` if no request to a bucket succeeds in time. `read`, `read_text`, `read_range`, `size`, `require_info`
    and `download` also raise `DataError` if there is no such file. Local writes and deletions raise `OSError`, so that
    callers can handle a full disk.
    """

    is_local: bool

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> StoragePath: ...

    @property
    @abstractmethod
    def name(self) -> str:
        """Last path component, or the name of the bucket if this is the address of a bucket."""

    @property
    @abstractmethod
    def parent(self) -> StoragePath: ...

    @abstractmethod
    def stat(self) -> ObjectInfo | None:
        """Return the file's size and version, or None if it does not exist or is a folder."""

    @abstractmethod
    def fetch(self) -> tuple[bytes, Version] | None:
        """Return the file's content and version, or None if it does not exist. An object's checksum is verified."""

    @abstractmethod
    def read_range(self, start: int, length: int) -> bytes:
        """Read `length` bytes from offset `start`, or fewer at the end of the file."""

    @abstractmethod
    def write(self, content: bytes | str, *, only_if: Version | None = ANY) -> Version:
        """Write the file atomically and return the new version.

        If the response of an attempt is lost, the retry recognizes that the file has already been written.

        Args:
            content: bytes, or text to encode as UTF-8.
            only_if: condition of the write. None requires that the file does not exist; a version requires that the
                file has this version. Defaults to no condition.

        Raises:
            ConflictError: the condition does not hold.
        """

    @abstractmethod
    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        """List the files below this folder, sorted by path, without temporary files.

        If `recursive` is False, files in subfolders are omitted. The list is empty if the folder does not exist.
        """

    @abstractmethod
    def folders(self) -> Sequence[StoragePath]:
        """List the direct subfolders of this folder, sorted by name."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file if it exists."""

    @abstractmethod
    def delete_tree(self) -> None:
        """Delete everything below this folder, including temporary files and upload parts."""

    @abstractmethod
    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        """Copy this file to the local file `to` atomically, and return the size and version of what was copied.

        An object's checksum is verified. The copy is not flushed to disk, so a power failure can lose it.
        `expected`, an item of `list`, is the version to copy; it defaults to the current version.

        Raises:
            DataError: the file does not exist, or it no longer has the expected version.
        """

    @abstractmethod
    def upload(self, source: Path) -> Version:
        """Copy a local file to this path atomically and return the new version."""

    def read(self) -> bytes:
        """Return the content. An object's checksum is verified."""
        content = self.fetch()
        if content is None:
            raise self._make_not_found_error()
        return content[0]

    def read_text(self) -> str:
        """Return the content as text; raise a DataError if it is not UTF-8."""
        try:
            return self.read().decode()
        except UnicodeDecodeError as error:
            problem = f"{self}: is not UTF-8 text ({error.reason} at byte {error.start})"
            raise DataError(problem, fix="restore or rewrite the file") from None

    def size(self) -> int:
        """Return the size in bytes."""
        return self.require_info().size

    def exists(self) -> bool:
        """Return whether this is an existing file, not a folder."""
        return self.stat() is not None

    def version(self) -> Version | None:
        """Return the file's version, or None if it does not exist."""
        info = self.stat()
        return None if info is None else info.version

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether this is a folder that is not empty."""

    def require_info(self) -> ObjectInfo:
        """Return the file's size and version; raise a DataError if it does not exist."""
        info = self.stat()
        if info is None:
            raise self._make_not_found_error()
        return info

    @abstractmethod
    def _make_not_found_error(self) -> TrainerError:
        """Make the error for a missing file."""


# The deadline in seconds that `request_deadline` sets. None means the default, `retries.DEADLINE_SECONDS`.
deadline_seconds: ContextVar[float | None] = ContextVar("deadline_seconds", default=None)


@contextlib.contextmanager
def request_deadline(seconds: float) -> Iterator[None]:
    """Limit each bucket request in this block to `seconds`, including retries. The default limit is 120 s."""
    token = deadline_seconds.set(seconds)
    try:
        yield
    finally:
        deadline_seconds.reset(token)
