"""Storage paths in a Google Cloud Storage bucket, by google-cloud-storage; `gcs_client.persist` retries requests."""

from __future__ import annotations

import base64
import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
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
from trainer.storage.base import (
    ANY,
    Conflict,
    ObjectInfo,
    ObjectInfos,
    OnlyIf,
    StoragePath,
    StoragePaths,
    is_unfinished,
    within,
)
from trainer.storage.gcs_client import CHECK_BUCKET, NO_BUCKET, Damaged, Limits, client, persist
from trainer.storage.local import LocalPath, temporary_file

AT_ONCE = 8  # concurrent requests of one transfer
LARGE = 32 << 20  # bytes above which a file is downloaded in chunks
CHUNK = 16 << 20  # bytes of a chunk
PART = 8 << 20  # bytes above which a file is uploaded in parts
MOST_PARTS = 32  # of one compose request
MEMORY = 256 << 20  # bytes of parts in memory at the same time
CLEANING = 10.0  # deadline in seconds for deleting the parts of an upload
DAMAGED_FILES = 5  # downloads of a large file that may fail its checksum

_OURS = "kubetune-write"  # metadata key: identifies the write that made this version
_FIELDS = "items(name,size,generation,crc32c),prefixes,nextPageToken"
Item = TypeVar("Item")
Result = TypeVar("Result")


def _decoded(crc32c: str | None) -> int | None:
    """Decode the storage's notation of a checksum: base64, big-endian."""
    return None if crc32c is None else int.from_bytes(base64.b64decode(crc32c), "big")


def _in_parallel(do: Callable[[Item], Result], items: Iterable[Item], most: int = AT_ONCE) -> list[Result]:
    """Map `do` over items in threads, with the caller's deadline; an error cancels the calls that have not begun."""
    calls = [partial(copy_context().run, do, item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, most)) as pool:
        return list(pool.map(lambda call: call(), calls))


class _Replaced(DataError):
    """The requested generation no longer exists."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__(f"{path}: was replaced or deleted while it was read", fix="start the same command again")


@dataclass(frozen=True)
class GcsPath(StoragePath):
    """`gs://bucket/key`; the key of the bucket itself is empty."""

    bucket: str
    key: str = ""
    is_local = False

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}" if self.key else f"gs://{self.bucket}"

    def __truediv__(self, name: str) -> GcsPath:
        parts = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ConfigError(f"{self}/{name}: a bucket has no '..'", fix="write the whole address")
        return replace(self, key="/".join(parts))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> GcsPath:
        return replace(self, key=self.key.rpartition("/")[0])

    def stat(self) -> ObjectInfo | None:
        def get(limits: Limits) -> ObjectInfo | None:
            blob = self._blob()
            try:
                blob.reload(timeout=limits, retry=None)
            except NotFound:
                return None
            return self._info(blob)

        return persist(str(self), "storage.objects.get", get) if self.key else None

    def is_folder(self) -> bool:
        return bool(self._page(None, "", 2)[0])

    def fetch(self, generation: int | None = None) -> tuple[bytes, int] | None:
        def get(limits: Limits) -> tuple[bytes, int] | None:
            blob = self._blob(generation)
            try:
                data = blob.download_as_bytes(raw_download=True, checksum=None, timeout=limits, retry=None)
            except NotFound:
                return None
            if google_crc32c.value(data) != _decoded(blob.crc32c):
                raise Damaged("CRC32C differs")
            return data, int(blob.generation)

        return persist(str(self), "storage.objects.get", get)

    def read_range(self, start: int, length: int) -> bytes:
        """Read a range, for headers and indexes. The storage has no checksum of a range: a small object is read and
        verified as a whole; of a large one the range is read twice and compared."""
        info = self._existing()
        length = min(length, info.size - start)
        if length <= 0:
            return b""
        if info.size <= PART:
            return self._pinned(info)[start : start + length]

        def twice(limits: Limits) -> bytes:
            first = self._slice(info, start, length, limits)
            if first != self._slice(info, start, length, limits):
                raise Damaged("two reads of one range differ")
            return first

        return persist(str(self), "storage.objects.get", twice)

    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        data = content.encode() if isinstance(content, str) else content
        if len(data) <= PART:
            return self._send(data, only_if)
        if only_if is not ANY:
            raise ValueError(f"{self}: a conditional write is limited to {PART} bytes")
        return self._send_parts(len(data), lambda start, length: data[start : start + length])

    def upload(self, source: Path) -> int:
        with LocalPath(source)._reading():
            file = open(source, "rb")  # noqa: SIM115 - closed below
        with file:
            size = os.fstat(file.fileno()).st_size
            if size <= PART:
                return self._send(os.pread(file.fileno(), size, 0), ANY)
            return self._send_parts(size, lambda start, length: os.pread(file.fileno(), length, start))

    def download(self, to: Path, expected: ObjectInfo | None = None) -> ObjectInfo:
        with temporary_file(to) as temporary:
            for _ in range(DAMAGED_FILES):
                info = expected or self._existing()
                try:
                    whole = self._download(temporary, info)
                except _Replaced:
                    if expected is not None:
                        raise
                    continue
                if whole:
                    os.replace(temporary, to)
                    return info
        problem = f"{self}: the download failed its CRC32C check {DAMAGED_FILES} times"
        raise Interrupted(problem, fix="start the same command again")

    def list(self, recursive: bool = True) -> ObjectInfos:
        files = [info for page, _ in self._pages("" if recursive else "/") for info in page]
        return sorted((f for f in files if not is_unfinished(str(f.path))), key=lambda f: str(f.path).encode())

    def folders(self) -> StoragePaths:
        names = {prefix for _, prefixes in self._pages("/") for prefix in prefixes if not is_unfinished(prefix)}
        return [replace(self, key=name.rstrip("/")) for name in sorted(names)]

    def delete(self) -> None:
        def remove(limits: Limits) -> None:
            with contextlib.suppress(NotFound):
                self._blob().delete(timeout=limits, retry=None)

        persist(str(self), "storage.objects.delete", remove)

    def delete_tree(self) -> None:
        _in_parallel(lambda info: info.path.delete(), [info for page, _ in self._pages("") for info in page])

    def _blob(self, generation: int | None = None) -> Any:
        return client().bucket(self.bucket).blob(self.key, generation=generation)

    def _absent(self) -> DataError:
        try:
            replace(self, key="")._page(None, "", 1)
        except DataError as error:  # also raised for an account that may read but not list
            if NO_BUCKET in str(error):
                return DataError(f"{self}: {NO_BUCKET}", fix=CHECK_BUCKET)
        return DataError(f"{self}: there is no such object", fix="check the address")

    def _info(self, blob: Any) -> ObjectInfo:
        return ObjectInfo(self, int(blob.size), int(blob.generation), _decoded(blob.crc32c))

    def _pages(self, delimiter: str) -> Iterator[tuple[ObjectInfos, set[str]]]:
        token: str | None = ""
        while token is not None:
            page, prefixes, token = self._page(token, delimiter)
            yield page, prefixes

    def _page(
        self, token: str | None, delimiter: str, most: int | None = None
    ) -> tuple[ObjectInfos, set[str], str | None]:
        """One page of the objects below, its prefixes, and the token of the next page (None at the end)."""
        prefix = f"{self.key}/" if self.key else ""

        def get(limits: Limits) -> tuple[ObjectInfos, set[str], str | None]:
            listing = client().list_blobs(
                self.bucket, prefix=prefix, delimiter=delimiter or None, page_token=token or None, max_results=most,
                fields=_FIELDS, timeout=limits, retry=None,
            )  # fmt: skip
            blobs = list(next(listing.pages, ()))
            # The console marks an empty folder by an object whose name ends in a slash.
            page = [replace(self, key=blob.name)._info(blob) for blob in blobs if not blob.name.endswith("/")]
            return page, set(listing.prefixes), listing.next_page_token or None

        return persist(str(self), "storage.objects.list", get)

    def _pinned(self, info: ObjectInfo) -> bytes:
        content = self.fetch(info.version)
        if content is None:
            raise _Replaced(self)
        return content[0]

    def _slice(self, info: ObjectInfo, start: int, length: int, limits: Limits) -> bytes:
        """`length` bytes of one generation; for `persist`."""
        try:
            data = self._blob(info.version).download_as_bytes(
                start=start, end=start + length - 1, raw_download=True, checksum=None, timeout=limits, retry=None
            )
        except NotFound as error:
            raise _Replaced(self) from error
        if len(data) != length:
            raise Damaged(f"{len(data)} bytes of {length}")
        return data

    def _download(self, to: Path, info: ObjectInfo) -> bool:
        """Copy one generation to a file and return whether its CRC32C matches (a chunk has no checksum)."""

        def chunk(start: int) -> None:
            length = min(CHUNK, info.size - start)
            data = persist(str(self), "storage.objects.get", lambda limits: self._slice(info, start, length, limits))
            with open(to, "r+b") as part:
                part.seek(start)
                part.write(data)
            health.progress()

        with open(to, "wb") as file:
            if info.size <= LARGE:
                file.write(self._pinned(info))
                return True
            file.truncate(info.size)
        _in_parallel(chunk, range(0, info.size, CHUNK))
        crc = 0
        with open(to, "rb") as copy:
            while block := copy.read(1 << 20):
                crc = google_crc32c.extend(crc, block)
        return crc == info.crc32c

    def _send(self, data: bytes, only_if: OnlyIf) -> int:
        """Upload in one request with a CRC32C, which the storage verifies before the object becomes visible."""
        ours, crc = uuid.uuid4().hex, google_crc32c.value(data)
        condition = None if only_if is ANY else only_if or 0
        tries = 0

        def put(limits: Limits) -> int:
            nonlocal tries, condition
            tries += 1
            blob = self._blob()
            blob.metadata = {_OURS: ours}
            try:
                blob.upload_from_string(
                    data, content_type="application/octet-stream", checksum="crc32c",
                    if_generation_match=condition, timeout=limits, retry=None,
                )  # fmt: skip
            except PreconditionFailed as error:
                # An earlier try may have succeeded although its response was lost: then the version is ours.
                bucket = client().bucket(self.bucket)
                blob = bucket.get_blob(self.key, timeout=limits, retry=None) if tries > 1 else None
                if blob is None or (blob.metadata or {}).get(_OURS) != ours:
                    raise Conflict(f"{self}: changed since it was read") from error
            if _decoded(blob.crc32c) != crc:  # only with a server that does not verify (an emulator)
                condition = None if condition is None else int(blob.generation)
                raise Damaged("CRC32C of the stored object differs")
            return int(blob.generation)

        return persist(str(self), "storage.objects.create (storage.objects.delete as well, to replace)", put)

    def _send_parts(self, size: int, content: Callable[[int, int], bytes]) -> int:
        """Upload parts in parallel, each verified, then compose them in one atomic request.

        A resumable session would be sequential, and servers differ in how they treat a part that is sent again. The
        parts of a killed upload are not listed; `delete_tree` deletes them.
        """
        length = max(PART, -(-size // MOST_PARTS))
        folder = replace(self, key=f"{self.key}.parts-{uuid.uuid4().hex}")
        starts = range(0, size, length)
        parts = [folder / f"{index:02d}" for index in range(len(starts))]

        def part_at(start: int) -> bytes:
            return content(start, min(length, size - start))

        def send(index: int) -> int:
            generation = parts[index]._send(part_at(starts[index]), ANY)
            health.progress()
            return generation

        def join(limits: Limits) -> ObjectInfo:
            blob = self._blob()
            blob.content_type = "application/octet-stream"
            sent = [part._blob(generation) for part, generation in zip(parts, generations, strict=True)]
            blob.compose(sent, timeout=limits, retry=None)
            return self._info(blob)

        try:
            generations = _in_parallel(send, range(len(starts)), max(1, MEMORY // length))
            made = persist(str(self), "storage.objects.create and storage.objects.get", join)
        finally:
            with contextlib.suppress(DataError, Interrupted), within(CLEANING):
                _in_parallel(lambda part: part.delete(), parts)
        whole = google_crc32c.value(b"")
        for start in starts:
            whole = google_crc32c.extend(whole, part_at(start))
        if (made.size, made.crc32c) != (size, whole):
            raise DataError(f"{self}: the source changed while it was uploaded", fix="start the same command again")
        return made.version
