"""`GcsPath`, the storage path of an object or folder in a Google Cloud Storage bucket.

All content is verified by CRC32C. `gcs_client.call_with_retries` sends each request with timeouts and retries. Large
files are transferred in parallel.
"""

from __future__ import annotations

import base64
import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed

from trainer.errors import ConfigError, DataError, Interrupted
from trainer.monitoring.health import health
from trainer.names import encode_utf8
from trainer.storage.base import ANY, Conflict, ObjectInfo, StoragePath, is_unfinished, request_deadline
from trainer.storage.gcs_client import (
    CHECK_BUCKET,
    NO_BUCKET,
    CorruptTransfer,
    Timeouts,
    call_with_retries,
    get_bucket,
    get_client,
)
from trainer.storage.local import LocalPath, temporary_file

MAX_CONCURRENT_REQUESTS = 8  # of one transfer
MAX_UNCHUNKED_BYTES = 32 << 20  # a larger object is downloaded in chunks
CHUNK_BYTES = 16 << 20  # of a download
PART_BYTES = 8 << 20  # a larger file is uploaded in parts of at least this size
MAX_COMPOSED_PARTS = 32  # the storage's maximum per compose request
MAX_MEMORY_BYTES = 256 << 20  # of the upload parts in memory at the same time
CLEANUP_SECONDS = 10.0  # deadline for deleting one part after an upload
MAX_DOWNLOADS = 5  # attempts until the CRC32C of a large object matches

_WRITE_ID = "kubetune-write"  # metadata key; its value identifies the write that created a generation
_FIELDS = "items(name,size,generation,crc32c),prefixes,nextPageToken"
Item = TypeVar("Item")
Result = TypeVar("Result")


def _decode_crc32c(crc32c: str | None) -> int | None:
    """Decode a CRC32C as the storage reports it, big-endian in base64."""
    return None if crc32c is None else int.from_bytes(base64.b64decode(crc32c), "big")


def _in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = MAX_CONCURRENT_REQUESTS
) -> list[Result]:
    """Map `function` over items in threads, with the caller's deadline. An error cancels the calls not yet begun."""
    calls = [partial(copy_context().run, function, item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda call: call(), calls))


class _Replaced(DataError):
    """The generation that is being read no longer exists."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__(f"{path}: was replaced or deleted while it was read", fix="start the same command again")


@dataclass(frozen=True)
class GcsPath(StoragePath):
    """`gs://bucket/key`; the bucket itself has the key ""."""

    bucket: str
    key: str = ""
    is_local = False

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}" if self.key else f"gs://{self.bucket}"

    def __truediv__(self, name: str) -> GcsPath:
        components = [c for c in f"{self.key}/{name}".split("/") if c not in ("", ".")]
        if ".." in components:
            raise ConfigError(f"{self}/{name}: a bucket has no '..'", fix="give the address without '..'")
        return replace(self, key="/".join(components))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> GcsPath:
        return replace(self, key=self.key.rpartition("/")[0])

    def stat(self) -> ObjectInfo | None:
        def get(timeouts: Timeouts) -> ObjectInfo | None:
            blob = self._current_blob(timeouts)
            return None if blob is None else self._info(blob)

        return call_with_retries(str(self), "storage.objects.get", get) if self.key else None

    def is_folder(self) -> bool:
        return any(page for page, _ in self._pages(""))  # the first pages may have placeholders only

    def fetch(self, generation: int | None = None) -> tuple[bytes, int] | None:
        def get(timeouts: Timeouts) -> tuple[bytes, int] | None:
            blob = self._blob(generation)
            try:
                data = blob.download_as_bytes(raw_download=True, checksum=None, timeout=timeouts, retry=None)
            except NotFound:
                return None
            if google_crc32c.value(data) != _decode_crc32c(blob.crc32c):
                raise CorruptTransfer("CRC32C differs")
            return data, int(blob.generation)

        return call_with_retries(str(self), "storage.objects.get", get)

    def read_range(self, start: int, length: int) -> bytes:
        """Read a range, for which the storage has no checksum.

        A small object is read and verified as a whole. The range of a large one is read twice and compared.
        """
        info = self.require_info()
        length = min(length, info.size - start)
        if length <= 0:
            return b""
        if info.size <= PART_BYTES:
            return self.read()[start : start + length]

        def read_twice(timeouts: Timeouts) -> bytes:
            first = self._request_range(info, start, length, timeouts)
            if first != self._request_range(info, start, length, timeouts):
                raise CorruptTransfer("two reads of one range differ")
            return first

        return call_with_retries(str(self), "storage.objects.get", read_twice)

    def write(self, content: bytes | str, *, only_if: int | None = ANY) -> int:
        data = encode_utf8(content)
        return self._upload(len(data), lambda start, length: data[start : start + length], only_if)

    def upload(self, source: Path) -> int:
        with LocalPath(source).open() as file:
            size = os.fstat(file.fileno()).st_size
            return self._upload(size, lambda start, length: os.pread(file.fileno(), length, start), ANY)

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        with temporary_file(to) as temporary:
            for _ in range(MAX_DOWNLOADS):
                info = expected or self.require_info()
                try:
                    if self._download(temporary, info):
                        os.replace(temporary, to)
                        return info
                except _Replaced:
                    if expected is not None:
                        raise
        problem = f"{self}: the download failed its CRC32C check {MAX_DOWNLOADS} times"
        raise Interrupted(problem, fix="start the same command again")

    def list(self, recursive: bool = True) -> Sequence[ObjectInfo]:
        infos = [info for page, _ in self._pages("" if recursive else "/") for info in page]
        return sorted((i for i in infos if not is_unfinished(str(i.path))), key=lambda i: str(i.path).encode())

    def folders(self) -> Sequence[StoragePath]:
        prefixes = {prefix for _, page in self._pages("/") for prefix in page if not is_unfinished(prefix)}
        # An object such as "p//x" makes "p//" a prefix, whose path would be that of this folder again.
        return [replace(self, key=name.rstrip("/")) for name in sorted(prefixes) if not f"/{name}".endswith("//")]

    def delete(self) -> None:
        def request(timeouts: Timeouts) -> None:
            with contextlib.suppress(NotFound):
                self._blob().delete(timeout=timeouts, retry=None)

        call_with_retries(str(self), "storage.objects.delete", request)

    def delete_tree(self) -> None:
        _in_parallel(lambda info: info.path.delete(), [info for page, _ in self._pages("") for info in page])

    def _blob(self, generation: int | None = None) -> Any:
        return get_bucket(self.bucket).blob(self.key, generation=generation)

    def _current_blob(self, timeouts: Timeouts) -> Any:
        """Request the metadata of the object, without retries; None if there is no such object."""
        return get_bucket(self.bucket).get_blob(self.key, timeout=timeouts, retry=None)

    def _absent(self) -> DataError:
        try:
            replace(self, key="")._page(None, "", 1)
        except DataError as error:  # a different one if the account can read but not list
            if NO_BUCKET in str(error):
                return DataError(f"{self}: {NO_BUCKET}", fix=CHECK_BUCKET)
        return DataError(f"{self}: there is no such object", fix="check the address")

    def _info(self, blob: Any) -> ObjectInfo:
        return ObjectInfo(self, int(blob.size), int(blob.generation), _decode_crc32c(blob.crc32c))

    def _pages(self, delimiter: str) -> Iterator[tuple[Sequence[ObjectInfo], set[str]]]:
        """Yield the objects and subfolders of each page. Delimiter "/" lists one level, "" all objects below."""
        token: str | None = ""
        while token is not None:
            page, prefixes, token = self._page(token, delimiter)
            yield page, prefixes

    def _page(
        self, token: str | None, delimiter: str, max_objects: int | None = None
    ) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
        """Request a page: its objects, its subfolders as prefixes, and the token of the next page (None at the end)."""
        prefix = f"{self.key}/" if self.key else ""

        def get(timeouts: Timeouts) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
            listing = get_client().list_blobs(
                get_bucket(self.bucket), prefix=prefix, delimiter=delimiter or None, page_token=token or None,
                max_results=max_objects, fields=_FIELDS, timeout=timeouts, retry=None,
            )  # fmt: skip
            blobs = list(next(listing.pages, ()))
            # The web console marks an empty folder with an object whose name ends in a slash.
            page = [replace(self, key=blob.name)._info(blob) for blob in blobs if not blob.name.endswith("/")]
            return page, set(listing.prefixes), listing.next_page_token or None

        return call_with_retries(str(self), "storage.objects.list", get)

    def _request_range(self, info: ObjectInfo, start: int, length: int, timeouts: Timeouts) -> bytes:
        """Request `length` bytes of one generation from offset `start`, without retries."""
        try:
            data = self._blob(info.version).download_as_bytes(
                start=start, end=start + length - 1, raw_download=True, checksum=None, timeout=timeouts, retry=None
            )
        except NotFound as error:
            raise _Replaced(self) from error
        if len(data) != length:
            raise CorruptTransfer(f"{len(data)} bytes of {length}")
        return data

    def _download(self, to: Path, info: ObjectInfo) -> bool:
        """Copy one generation to a file and return whether its CRC32C matches; chunks have no checksum of their own."""

        def copy_chunk(start: int) -> None:
            length = min(CHUNK_BYTES, info.size - start)
            request = partial(self._request_range, info, start, length)
            data = call_with_retries(str(self), "storage.objects.get", request)
            with open(to, "r+b") as target:
                target.seek(start)
                target.write(data)
            health.record_progress()

        with open(to, "wb") as file:
            if info.size <= MAX_UNCHUNKED_BYTES:
                if (content := self.fetch(info.version)) is None:
                    raise _Replaced(self)
                file.write(content[0])
                return True
            file.truncate(info.size)
        _in_parallel(copy_chunk, range(0, info.size, CHUNK_BYTES))
        crc = 0
        with open(to, "rb") as copied:
            while block := copied.read(1 << 20):
                crc = google_crc32c.extend(crc, block)
        return crc == info.crc32c

    def _upload_object(self, data: bytes, only_if: int | None) -> int:
        """Upload in one request with a CRC32C, which the storage verifies before the object becomes visible."""
        write_id, crc = uuid.uuid4().hex, google_crc32c.value(data)
        condition = None if only_if == ANY else only_if or 0  # 0: the object must not exist
        attempts = 0

        def put(timeouts: Timeouts) -> int:
            nonlocal attempts, condition
            attempts += 1
            blob = self._blob()
            blob.metadata = {_WRITE_ID: write_id}
            try:
                blob.upload_from_string(
                    data, content_type="application/octet-stream", checksum="crc32c",
                    if_generation_match=condition, timeout=timeouts, retry=None,
                )  # fmt: skip
            except PreconditionFailed as error:
                # An earlier attempt may have succeeded and lost its response; then the object has our write ID.
                blob = self._current_blob(timeouts) if attempts > 1 else None
                if blob is None or (blob.metadata or {}).get(_WRITE_ID) != write_id:
                    raise Conflict(f"{self}: changed since it was read") from error
            if _decode_crc32c(blob.crc32c) != crc:  # only an emulator stores corrupt data
                condition = None if condition is None else int(blob.generation)
                raise CorruptTransfer("CRC32C of the stored object differs")
            return int(blob.generation)

        return call_with_retries(str(self), "storage.objects.create (storage.objects.delete as well, to replace)", put)

    def _upload(self, size: int, read_range: Callable[[int, int], bytes], only_if: int | None) -> int:
        """Upload a small file in one request, and a large one in parallel parts.

        The CRC32C of each part is verified, and one atomic request composes the parts. A resumable upload would be
        sequential, and servers differ in how they treat a repeated chunk. `list` omits the parts that a killed process
        left, and `delete_tree` deletes them. `read_range` takes an offset and a length.
        """
        if size <= PART_BYTES:
            return self._upload_object(read_range(0, size), only_if)
        if only_if != ANY:
            raise ValueError(f"{self}: a conditional write is limited to {PART_BYTES} bytes")
        part_bytes = max(PART_BYTES, -(-size // MAX_COMPOSED_PARTS))
        folder = replace(self, key=f"{self.key}.parts-{uuid.uuid4().hex}")
        starts = range(0, size, part_bytes)
        parts = [folder / f"{index:02d}" for index in range(len(starts))]

        def read_part(start: int) -> bytes:
            return read_range(start, min(part_bytes, size - start))

        def upload_part(index: int) -> int:
            generation = parts[index]._upload_object(read_part(starts[index]), ANY)
            health.record_progress()
            return generation

        def compose(timeouts: Timeouts) -> ObjectInfo:
            blob = self._blob()
            blob.content_type = "application/octet-stream"
            uploaded = [part._blob(generation) for part, generation in zip(parts, generations, strict=True)]
            blob.compose(uploaded, timeout=timeouts, retry=None)
            return self._info(blob)

        try:
            threads = min(MAX_CONCURRENT_REQUESTS, max(1, MAX_MEMORY_BYTES // part_bytes))
            generations = _in_parallel(upload_part, range(len(starts)), threads)
            composed = call_with_retries(str(self), "storage.objects.create and storage.objects.get", compose)
        finally:
            with contextlib.suppress(DataError, Interrupted), request_deadline(CLEANUP_SECONDS):
                _in_parallel(lambda part: part.delete(), parts)
        crc = google_crc32c.value(b"")
        for start in starts:
            crc = google_crc32c.extend(crc, read_part(start))
        if (composed.size, composed.crc32c) != (size, crc):
            raise DataError(f"{self}: the source changed while it was uploaded", fix="start the same command again")
        return composed.version
