"""Paths in a Google Cloud Storage bucket, through google-cloud-storage; every request under `gcs_client.persist`."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
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
from trainer.storage.gcs_client import NO_BUCKET, Damaged, Limits, client, persist
from trainer.storage.local import LocalPath, temporary_file

AT_ONCE = 8  # requests of one transfer at the same time
LARGE = 32 << 20  # bytes above which a download goes in chunks
CHUNK = 16 << 20  # bytes of a chunk
PART = 8 << 20  # bytes up to which an upload is one request; above, it goes in parts
MOST_PARTS = 32  # that one compose request joins
MEMORY = 256 << 20  # bytes of parts held at the same time
CLEANING = 10.0  # seconds given to deleting the parts of an upload
DAMAGED_FILES = 5  # times that a large file may arrive damaged

_OURS = "kubetune-write"  # metadata: which write made this version
_FIELDS = "items(name,size,generation,crc32c),prefixes,nextPageToken"
Item = TypeVar("Item")
Result = TypeVar("Result")


def _decoded(crc32c: str | None) -> int | None:
    """The number in the storage's base64, big-endian notation."""
    return None if crc32c is None else int.from_bytes(base64.b64decode(crc32c), "big")


def _in_parallel(do: Callable[[Item], Result], items: Iterable[Item], most: int = AT_ONCE) -> list[Result]:
    """`do` for every item, some at a time, with the caller's deadline; an error stops what has not begun."""
    stop = threading.Event()

    def one(item: Item, context: Any) -> Result | None:
        if stop.is_set():
            return None
        try:
            return context.run(do, item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(AT_ONCE, most)) as pool:
        futures = [pool.submit(one, item, copy_context()) for item in items]
    return [future.result() for future in futures]  # type: ignore[misc]  # None only where another raises


class _Replaced(DataError):
    """The generation that was asked for is gone."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__(f"{path}: was replaced or deleted while it was read")


@dataclass(frozen=True)
class GcsPath(StoragePath):
    """`gs://bucket/key`; the bucket itself has the empty key."""

    bucket: str
    key: str = ""
    is_local = False

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}" if self.key else f"gs://{self.bucket}"

    def __truediv__(self, name: str) -> GcsPath:
        parts = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ConfigError(f"{self}/{name}: '..' means nothing in a bucket; write the whole address")
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
            return self._entry(blob)

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
        """As in `StoragePath`. The storage has no checksum of a part: a small object is read and verified whole, of a
        large one the range is read twice and must be the same. For headers and indexes; to read much, download."""
        entry = self._existing()
        length = min(length, entry.size - start)
        if length <= 0:
            return b""
        if entry.size <= PART:
            return self._pinned(entry)[start : start + length]

        def twice(limits: Limits) -> bytes:
            first = self._slice(entry, start, length, limits)
            if first != self._slice(entry, start, length, limits):
                raise Damaged("two readings of one range differ")
            return first

        return persist(str(self), "storage.objects.get", twice)

    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        data = content.encode() if isinstance(content, str) else content
        if len(data) <= PART:
            return self._send(data, only_if)
        if only_if is not ANY:
            raise ValueError(f"{self}: a conditional write is for markers of up to {PART} bytes")
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
        with temporary_file(to) as beside:
            for _ in range(DAMAGED_FILES):
                entry = expected or self._existing()
                try:
                    whole = self._download(beside, entry)
                except _Replaced:
                    if expected is not None:
                        raise
                    continue
                if whole:
                    os.replace(beside, to)
                    return entry
        raise Interrupted(f"{self}: arrived damaged {DAMAGED_FILES} times (CRC32C); start the same command again")

    def list(self, recursive: bool = True) -> ObjectInfos:
        entries = [entry for page, _ in self._pages("" if recursive else "/") for entry in page]
        whole = [entry for entry in entries if not is_unfinished(str(entry.path))]
        return sorted(whole, key=lambda entry: str(entry.path).encode())

    def folders(self) -> StoragePaths:
        names = {prefix for _, prefixes in self._pages("/") for prefix in prefixes if not is_unfinished(prefix)}
        return [replace(self, key=name.rstrip("/")) for name in sorted(names)]

    def delete(self) -> None:
        def remove(limits: Limits) -> None:
            with contextlib.suppress(NotFound):
                self._blob().delete(timeout=limits, retry=None)

        persist(str(self), "storage.objects.delete", remove)

    def delete_tree(self) -> None:
        entries = [entry for page, _ in self._pages("") for entry in page]
        _in_parallel(lambda entry: entry.path.delete(), entries)

    def _blob(self, generation: int | None = None) -> Any:
        return client().bucket(self.bucket).blob(self.key, generation=generation)

    def _absent(self) -> DataError:
        try:
            replace(self, key="")._page(None, "", 1)
        except DataError as error:  # an account that may read but not list sees the object only
            if NO_BUCKET in str(error):
                return DataError(f"{self}: {NO_BUCKET}")
        return DataError(f"{self}: there is no such object")

    def _entry(self, blob: Any) -> ObjectInfo:
        return ObjectInfo(self, int(blob.size), int(blob.generation), _decoded(blob.crc32c))

    def _pages(self, delimiter: str) -> Iterator[tuple[ObjectInfos, set[str]]]:
        token: str | None = ""
        while token is not None:
            page, prefixes, token = self._page(token, delimiter)
            yield page, prefixes

    def _page(
        self, token: str | None, delimiter: str, most: int | None = None
    ) -> tuple[ObjectInfos, set[str], str | None]:
        """One page of what is below, the prefixes in it, and the token of the next page (None at the end)."""
        prefix = f"{self.key}/" if self.key else ""

        def get(limits: Limits) -> tuple[ObjectInfos, set[str], str | None]:
            listing = client().list_blobs(
                self.bucket, prefix=prefix, delimiter=delimiter or None, page_token=token or None, max_results=most,
                fields=_FIELDS, timeout=limits, retry=None,
            )  # fmt: skip
            blobs = list(next(listing.pages, ()))
            # A console marks an empty folder by an object whose name ends in a slash: no file of ours.
            page = [replace(self, key=blob.name)._entry(blob) for blob in blobs if not blob.name.endswith("/")]
            return page, set(listing.prefixes), listing.next_page_token or None

        return persist(str(self), "storage.objects.list", get)

    def _pinned(self, entry: ObjectInfo) -> bytes:
        content = self.fetch(entry.version)
        if content is None:
            raise _Replaced(self)
        return content[0]

    def _slice(self, entry: ObjectInfo, start: int, length: int, limits: Limits) -> bytes:
        """`length` bytes of one generation; for `persist`."""
        try:
            data = self._blob(entry.version).download_as_bytes(
                start=start, end=start + length - 1, raw_download=True, checksum=None, timeout=limits, retry=None
            )
        except NotFound as error:
            raise _Replaced(self) from error
        if len(data) != length:
            raise Damaged(f"{len(data)} bytes of {length}")
        return data

    def _download(self, to: Path, entry: ObjectInfo) -> bool:
        """Copy that generation to a file; whether its CRC32C is the object's (chunks cannot be checked one by one)."""

        def chunk(start: int) -> None:
            length = min(CHUNK, entry.size - start)
            data = persist(str(self), "storage.objects.get", lambda limits: self._slice(entry, start, length, limits))
            with open(to, "r+b") as part:
                part.seek(start)
                part.write(data)
            health.progress()

        with open(to, "wb") as file:
            if entry.size <= LARGE:
                file.write(self._pinned(entry))
                return True
            file.truncate(entry.size)
        _in_parallel(chunk, range(0, entry.size, CHUNK))
        crc = 0
        with open(to, "rb") as copy:
            while block := copy.read(1 << 20):
                crc = google_crc32c.extend(crc, block)
        return crc == entry.crc32c

    def _send(self, data: bytes, only_if: OnlyIf) -> int:
        """One request with its CRC32C, which the storage verifies before anything becomes visible."""
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
                # A try before this one may have been done although its answer was lost: then the write is ours.
                bucket = client().bucket(self.bucket)
                there = bucket.get_blob(self.key, timeout=limits, retry=None) if tries > 1 else None
                if there is None or (there.metadata or {}).get(_OURS) != ours:
                    raise Conflict(f"{self}: changed since it was read") from error
                blob = there
            if _decoded(blob.crc32c) != crc:  # only a server that does not verify (an emulator) gets here
                condition = None if condition is None else int(blob.generation)
                raise Damaged("CRC32C of what was stored differs")
            return int(blob.generation)

        return persist(str(self), "storage.objects.create (storage.objects.delete as well, to replace)", put)

    def _send_parts(self, size: int, content: Callable[[int, int], bytes]) -> int:
        """Upload parts at the same time, each verified, then have the storage join them in one atomic step.

        Not a resumable session: that sends one part after the other, and what a server does with a part sent
        again differs. A killed upload leaves parts behind, which lists do not show and `delete_tree` deletes.
        """
        length = max(PART, -(-size // MOST_PARTS))
        beside = replace(self, key=f"{self.key}.parts-{uuid.uuid4().hex}")
        starts = range(0, size, length)
        parts = [beside / f"{index:02d}" for index in range(len(starts))]

        def piece(start: int) -> bytes:
            return content(start, min(length, size - start))

        def send(index: int) -> int:
            sent = parts[index]._send(piece(starts[index]), ANY)
            health.progress()
            return sent

        def join(limits: Limits) -> ObjectInfo:
            blob = self._blob()
            blob.content_type = "application/octet-stream"
            sent = [part._blob(generation) for part, generation in zip(parts, generations, strict=True)]
            blob.compose(sent, timeout=limits, retry=None)
            return self._entry(blob)

        try:
            generations = _in_parallel(send, range(len(starts)), max(1, MEMORY // length))
            made = persist(str(self), "storage.objects.create and storage.objects.get", join)
        finally:
            with contextlib.suppress(DataError, Interrupted), within(CLEANING):
                _in_parallel(lambda part: part.delete(), parts)
        whole = google_crc32c.value(b"")
        for start in starts:
            whole = google_crc32c.extend(whole, piece(start))
        if (made.size, made.crc32c) != (size, whole):
            raise DataError(f"{self}: the source changed while it was uploaded")
        return made.version
