"""`BucketPath`, the base class of the storage paths in buckets.

A subclass (`gcs.GcsPath`, `s3.S3Path`) implements the individual requests: the metadata, content and ranges of one
object, a page of a listing, a conditional write, a deletion, and the upload of a large file. `BucketPath` adds what is
common to both storages: addresses, checksums, parallel transfers, and the recognition of a write whose response was
lost.
"""

from __future__ import annotations

import os
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar

import google_crc32c

from trainer.errors import ConfigError, DataError, Interrupted
from trainer.monitoring.health import health
from trainer.names import encode_utf8
from trainer.storage.base import ANY, ConflictError, ObjectInfo, StoragePath, Version, is_temporary_name
from trainer.storage.local import LocalPath, compute_file_crc32c, temporary_file
from trainer.storage.retries import CHECK_BUCKET_FIX, NO_BUCKET_PROBLEM, CorruptTransfer, Result, Timeouts

MAX_CONCURRENT_REQUESTS = 8  # maximum number of concurrent requests of one transfer
MAX_UNCHUNKED_BYTES = 32 << 20  # a larger object is downloaded in chunks
CHUNK_BYTES = 16 << 20  # size of a chunk of a download
PART_BYTES = 8 << 20  # a larger file is uploaded in parts of at least this size
MAX_DOWNLOADS = 5  # attempts to download an object if its CRC32C does not match, or it is replaced during the download
WRITE_ID = "kubetune-write"  # key in an object's metadata; its value identifies the write that created the version

Action = Literal["read", "list", "write", "delete"]  # what a request does; error messages name its permission
Item = TypeVar("Item")


@dataclass(frozen=True)
class WriteResult:
    """What the storage reports about an object after it has written it or rejected a conditional write."""

    version: Version
    write_id: str | None  # identifies the write that created this version; None if another program wrote it
    crc32c: int | None  # None if the storage does not compute it


class PreconditionFailed(Exception):
    """The storage rejected a conditional write because the object does not have the required version."""


class ReplacedError(DataError):
    """An object was replaced or deleted while it was read."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__(f"{path}: was replaced or deleted while it was read", fix="start the same command again")


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = MAX_CONCURRENT_REQUESTS
) -> list[Result]:
    """Call `function` for each item in threads, with the caller's `request_deadline`. Return the results in order.

    If a call fails, the calls that have not started are cancelled, and its error is raised.
    """
    calls = [partial(copy_context().run, function, item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda call: call(), calls))


@dataclass(frozen=True)
class BucketPath(StoragePath):
    """The address `SCHEME://bucket/key` of an object or folder. The key of the bucket itself is ""."""

    bucket: str
    key: str = ""
    scheme: ClassVar[str]
    is_local = False

    @abstractmethod
    def _call(self, action: Action, request: Callable[[Timeouts], Result]) -> Result:
        """Call `request`, which makes a single attempt, with retries. Translate its errors for the user."""

    @abstractmethod
    def _request_info(self, timeouts: Timeouts) -> ObjectInfo | None:
        """Request the metadata of the object. Return None if it does not exist."""

    @abstractmethod
    def _request_content(self, version: Version | None, timeouts: Timeouts) -> tuple[bytes, Version] | None:
        """Request the content of a version, or of the current version if `version` is None, and verify its checksum.

        Return None if the object or version does not exist.
        """

    @abstractmethod
    def _request_range(self, info: ObjectInfo, start: int, length: int, timeouts: Timeouts) -> bytes:
        """Request `length` bytes from offset `start` of the version in `info`; raise ReplacedError if it is gone."""

    @abstractmethod
    def _request_page(
        self, token: str, delimiter: str, max_objects: int | None, timeouts: Timeouts
    ) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
        """Request a page of a listing. See `_list_page` for the arguments and the result."""

    @abstractmethod
    def _request_write(self, data: bytes, write_id: str, only_if: Version | None, timeouts: Timeouts) -> WriteResult:
        """Write the object in one request; raise PreconditionFailed if the condition `only_if` does not hold."""

    @abstractmethod
    def _request_write_result(self, timeouts: Timeouts) -> WriteResult | None:
        """Request what the storage knows about the object's last write. Return None if the object does not exist."""

    @abstractmethod
    def _request_deletion(self, timeouts: Timeouts) -> None:
        """Delete the object if it exists."""

    @abstractmethod
    def _get_crc32c(self, info: ObjectInfo) -> int | None:
        """Return the CRC32C of the version in `info`, or None if it is unknown. In S3, this takes a request."""

    @abstractmethod
    def _upload_parts(self, size: int, read_range: Callable[[int, int], bytes]) -> Version:
        """Upload `size` bytes in parallel parts, which become visible together. See `_upload` for `read_range`."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    def __truediv__(self, name: str) -> Self:
        components = [c for c in f"{self.key}/{name}".split("/") if c not in ("", ".")]
        if ".." in components:
            raise ConfigError(f"{self}/{name}: a bucket has no '..'", fix="give the address without '..'")
        return replace(self, key="/".join(components))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> Self:
        return replace(self, key=self.key.rpartition("/")[0])

    def stat(self) -> ObjectInfo | None:
        return self._call("read", self._request_info) if self.key else None

    def is_folder(self) -> bool:
        return any(page for page, _ in self._list_pages(""))  # a page without objects, only folder markers, is empty

    def fetch(self, version: Version | None = None) -> tuple[bytes, Version] | None:
        return self._call("read", partial(self._request_content, version))

    def read_range(self, start: int, length: int) -> bytes:
        """Read a range of the content. The storage does not compute a checksum for a range.

        Therefore a small object is read completely and verified, while a range of a large object is read twice and
        compared.
        """
        info = self.require_info()
        length = min(length, info.size - start)
        if length <= 0:
            return b""
        if info.size <= PART_BYTES:
            return self.read()[start : start + length]

        def read_twice(timeouts: Timeouts) -> bytes:
            data = self._attempt_range(info, start, length, timeouts)
            if data != self._attempt_range(info, start, length, timeouts):
                raise CorruptTransfer("two reads of one range differ")
            return data

        return self._call("read", read_twice)

    def write(self, content: bytes | str, *, only_if: Version | None = ANY) -> Version:
        data = encode_utf8(content)
        return self._upload(len(data), lambda start, length: data[start : start + length], only_if)

    def upload(self, source: Path) -> Version:
        with LocalPath(source).open() as file:
            size = os.fstat(file.fileno()).st_size
            return self._upload(size, lambda start, length: os.pread(file.fileno(), length, start), ANY)

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        with temporary_file(to) as temporary_path:
            for _ in range(MAX_DOWNLOADS):
                info = expected or self.require_info()
                try:
                    if self._download(temporary_path, info):
                        os.replace(temporary_path, to)
                        return info
                except ReplacedError:
                    if expected is not None:
                        raise
        problem = f"{self}: the download failed its CRC32C check {MAX_DOWNLOADS} times"
        raise Interrupted(problem, fix="start the same command again")

    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        infos = [info for page, _ in self._list_pages("" if recursive else "/") for info in page]
        return sorted((i for i in infos if not is_temporary_name(str(i.path))), key=lambda i: str(i.path).encode())

    def folders(self) -> Sequence[StoragePath]:
        prefixes = {
            prefix
            for _, page_prefixes in self._list_pages("/")
            for prefix in page_prefixes
            if not is_temporary_name(prefix)
        }
        # An object such as "p//x" in the folder "p" has the prefix "p//", which would become the path of "p" again.
        return [replace(self, key=prefix.rstrip("/")) for prefix in sorted(prefixes) if not f"/{prefix}".endswith("//")]

    def delete(self) -> None:
        self._call("delete", self._request_deletion)

    def delete_tree(self) -> None:
        map_in_threads(lambda info: info.path.delete(), [info for page, _ in self._list_pages("") for info in page])

    def _make_not_found_error(self) -> DataError:
        try:
            replace(self, key="")._list_page("", "", 1)
        except DataError as error:  # the bucket does not exist, or this account may not list it
            if NO_BUCKET_PROBLEM in str(error):
                return DataError(f"{self}: {NO_BUCKET_PROBLEM}", fix=CHECK_BUCKET_FIX)
        return DataError(f"{self}: there is no such object", fix="check the address")

    def _list_pages(self, delimiter: str) -> Iterator[tuple[Sequence[ObjectInfo], set[str]]]:
        """Yield each page of this folder's listing: the objects, and the subfolders' prefixes. See `_list_page`."""
        token: str | None = ""
        while token is not None:
            page, prefixes, token = self._list_page(token, delimiter)
            yield page, prefixes

    def _list_page(
        self, token: str, delimiter: str, max_objects: int | None = None
    ) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
        """Request a page of this folder's listing, with retries.

        Args:
            token: token of the page, which the previous page returned; "" for the first page.
            delimiter: "/" to list the objects and subfolders directly in this folder, "" to list all objects below it.
            max_objects: maximum number of objects on the page; defaults to the storage's limit.

        Returns:
            The objects, the prefixes of the subfolders such as "a/b/", and the token of the next page (None for the
            last page).
        """
        return self._call("list", partial(self._request_page, token, delimiter, max_objects))

    def _attempt_range(self, info: ObjectInfo, start: int, length: int, timeouts: Timeouts) -> bytes:
        """Call `_request_range` and verify the length of the result."""
        data = self._request_range(info, start, length, timeouts)
        if len(data) != length:
            raise CorruptTransfer(f"{len(data)} bytes of {length}")
        return data

    def _download(self, to: Path, info: ObjectInfo) -> bool:
        """Copy the version in `info` to the file `to`. Return False if the copy's CRC32C does not match.

        A large object is verified after all chunks have been downloaded, because chunks have no checksums.
        """

        def copy_chunk(start: int) -> None:
            """Download the chunk at offset `start`, and write it to the file."""
            length = min(CHUNK_BYTES, info.size - start)
            data = self._call("read", partial(self._attempt_range, info, start, length))
            with open(to, "r+b") as target:
                target.seek(start)
                target.write(data)
            health.record_progress()

        with open(to, "wb") as file:
            if info.size <= MAX_UNCHUNKED_BYTES:
                if (content := self.fetch(info.version)) is None:
                    raise ReplacedError(self)
                file.write(content[0])
                return True
            file.truncate(info.size)
        map_in_threads(copy_chunk, range(0, info.size, CHUNK_BYTES))
        return self._get_crc32c(info) in (None, compute_file_crc32c(to))

    def _upload_object(self, data: bytes, only_if: Version | None) -> Version:
        """Upload `data` in one request. The storage verifies it before the object becomes visible."""
        write_id = uuid.uuid4().hex
        crc = google_crc32c.value(data)
        condition = only_if
        attempts = 0

        def put(timeouts: Timeouts) -> Version:
            """Write the object in one attempt, and verify it."""
            nonlocal attempts, condition
            attempts += 1
            try:
                result = self._request_write(data, write_id, condition, timeouts)
            except PreconditionFailed as error:
                # An earlier attempt may have succeeded, but its response was lost. Then the object has our write ID.
                current = self._request_write_result(timeouts) if attempts > 1 else None
                if current is None or current.write_id != write_id:
                    raise ConflictError(f"{self}: changed since it was read") from error
                result = current
            if result.crc32c not in (None, crc):  # only an emulator stores corrupt data
                condition = ANY if condition == ANY else result.version
                raise CorruptTransfer("CRC32C of the stored object differs")
            return result.version

        return self._call("write", put)

    def _upload(self, size: int, read_range: Callable[[int, int], bytes], only_if: Version | None) -> Version:
        """Upload a small file in one request, and a large file in parallel parts.

        `read_range(start, length)` returns `length` bytes of the file from offset `start`.
        """
        if size <= PART_BYTES:
            return self._upload_object(read_range(0, size), only_if)
        if only_if != ANY:
            raise ValueError(f"{self}: a conditional write is limited to {PART_BYTES} bytes")
        return self._upload_parts(size, read_range)
