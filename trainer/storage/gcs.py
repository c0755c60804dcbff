"""Places in a Google Cloud Storage bucket, through google-cloud-storage; every request under `retrying.persist`."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
from google.api_core.exceptions import NotFound, PreconditionFailed

from trainer.errors import ConfigError, DataError, Interrupted
from trainer.monitoring.health import health
from trainer.storage.base import ANY, Conflict, Entries, Entry, OnlyIf, Place, Places, on_its_way, within
from trainer.storage.gcs_client import Damaged, Limits, client, persist, refused
from trainer.storage.local import LocalPlace

AT_ONCE = 8  # requests of one transfer at the same time

Downloaded = TypeVar("Downloaded")
Item = TypeVar("Item")


def file_crc32c(path: Path) -> int:
    """CRC32C of a local file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = google_crc32c.extend(crc, block)
    return crc


def decoded(crc32c: str | None) -> int | None:
    """The number in the storage's base64, big-endian notation."""
    return None if crc32c is None else int.from_bytes(base64.b64decode(crc32c), "big")


def write_at(file: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written


def together(do: Callable[[Item], Downloaded], items: Iterable[Item], most: int | None = None) -> list[Downloaded]:
    """`do` for every item, some at a time, with the caller's deadline; an error stops what has not begun."""
    stop = threading.Event()

    def one(item: Item, context: Any) -> Downloaded | None:
        if stop.is_set():
            return None
        try:
            return context.run(do, item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(AT_ONCE, most or AT_ONCE)) as pool:
        futures = [pool.submit(one, item, copy_context()) for item in items]
    return [future.result() for future in futures]  # type: ignore[misc]  # None only where another raises


# ---------------------------------------------------------------------------------------------------------------
# Places in a Google Cloud Storage bucket, through google-cloud-storage; every request under `retrying.persist`

LARGE = 32 << 20  # bytes above which a download goes in chunks
CHUNK = 16 << 20  # bytes of a chunk
PART = 8 << 20  # bytes up to which an upload is one request; above, it goes in parts
MOST_PARTS = 32  # that one compose request joins
MEMORY = 256 << 20  # bytes of parts held at the same time
CLEANING = 10.0  # seconds given to deleting the parts of an upload
DAMAGED_FILES = 5  # times that a large file may arrive damaged

_OURS = "kubetune-write"  # metadata: which write made this version
_FIELDS = "items(name,size,generation,crc32c),prefixes,nextPageToken"
_NO_BUCKET = "there is no such bucket, or it is not yours to see"
Result = TypeVar("Result")


class _Replaced(DataError):
    """The generation that was asked for is gone."""


@dataclass(frozen=True)
class BucketPlace(Place):
    """`gs://bucket/key`; the bucket itself has the empty key."""

    bucket: str
    key: str = ""
    is_local = False

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}" if self.key else f"gs://{self.bucket}"

    def __truediv__(self, name: str) -> BucketPlace:
        parts = [part for part in f"{self.key}/{name}".split("/") if part not in ("", ".")]
        if ".." in parts:
            raise ConfigError(f"{self}/{name}: '..' means nothing in a bucket; write the whole address")
        return replace(self, key="/".join(parts))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> BucketPlace:
        return replace(self, key=self.key.rpartition("/")[0])

    def stat(self) -> Entry | None:
        def look(limits: Limits) -> Entry | None:
            blob = self._blob()
            try:
                blob.reload(timeout=limits, retry=None)
            except NotFound:
                return None
            return self._entry(blob)

        return self._do("storage.objects.get", look) if self.key else None

    def is_folder(self) -> bool:
        return bool(self._page(None, "", 2)[0])

    def fetch(self) -> tuple[bytes, int] | None:
        return self._fetch(None)

    def read_range(self, start: int, length: int) -> bytes:
        """As in `Place`. The storage has no checksum of a part: a small object is read and verified whole, of a
        large one the range is read twice and must be the same. For headers and indexes; to read much, download."""
        entry = self.stat()
        if entry is None:
            raise self._absent()
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

        return self._do("storage.objects.get", twice)

    def write(self, content: bytes | str, *, only_if: OnlyIf = ANY) -> int:
        data = content.encode() if isinstance(content, str) else content
        if len(data) <= PART:
            return self._send(data, only_if)
        if only_if is not ANY:
            raise ValueError(f"{self}: a conditional write is for markers of up to {PART} bytes")
        return self._send_parts(len(data), lambda start, length: data[start : start + length])

    def upload(self, source: Path) -> int:
        with LocalPlace(source)._reading():
            file = os.open(source, os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            if size <= PART:
                return self._send(os.pread(file, size, 0), ANY)
            return self._send_parts(size, lambda start, length: os.pread(file, length, start))
        finally:
            os.close(file)

    def download(self, to: Path, expected: Entry | None = None) -> Entry:
        with LocalPlace(to)._beside() as beside:
            for _ in range(DAMAGED_FILES):
                entry = expected or self.stat()
                if entry is None:
                    raise self._absent()
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

    def list(self, recursive: bool = True) -> Entries:
        found: Entries = []
        token: str | None = ""
        while token is not None:
            page, _, token = self._page(token, "" if recursive else "/")
            found += [entry for entry in page if not on_its_way(entry.place.key)]  # type: ignore[attr-defined]
        return sorted(found, key=lambda entry: str(entry.place).encode())

    def folders(self) -> Places:
        names: set[str] = set()
        token: str | None = ""
        while token is not None:
            _, prefixes, token = self._page(token, "/")
            names |= {prefix for prefix in prefixes if not on_its_way(prefix)}
        return [replace(self, key=name.rstrip("/")) for name in sorted(names)]

    def delete(self) -> None:
        def remove(limits: Limits) -> None:
            with contextlib.suppress(NotFound):
                self._blob().delete(timeout=limits, retry=None)

        self._do("storage.objects.delete", remove)

    def delete_tree(self) -> None:
        token: str | None = ""
        found: Entries = []
        while token is not None:
            page, _, token = self._page(token, "")
            found += page
        together(lambda entry: entry.place.delete(), found)

    def _blob(self, generation: int | None = None) -> Any:
        return client().bucket(self.bucket).blob(self.key, generation=generation)

    def _do(self, permission: str, call: Callable[[Limits], Result], absent: str = _NO_BUCKET) -> Result:
        """`call` under `persist`; its lasting errors explained."""
        try:
            return persist(str(self), call)
        except Exception as error:
            explained = refused(error, str(self), permission, absent)
            if explained is None:
                raise
            raise explained from error

    def _absent(self) -> DataError:
        try:
            replace(self, key="")._page(None, "", 1)
        except DataError as error:  # who may read but not list is told of the object only
            if _NO_BUCKET in str(error):
                return DataError(f"{self}: {_NO_BUCKET}")
        return DataError(f"{self}: there is no such object")

    def _replaced(self) -> DataError:
        return _Replaced(f"{self}: was replaced or deleted while it was read")

    def _entry(self, blob: Any) -> Entry:
        return Entry(self, int(blob.size), int(blob.generation), decoded(blob.crc32c))

    def _page(self, token: str | None, delimiter: str, most: int | None = None) -> tuple[Entries, set[str], str | None]:
        """One page of what is below, the prefixes in it, and the token of the next page (None at the end)."""
        prefix = f"{self.key}/" if self.key else ""

        def look(limits: Limits) -> tuple[Entries, set[str], str | None]:
            listing = client().list_blobs(
                self.bucket, prefix=prefix, delimiter=delimiter or None, page_token=token or None, max_results=most,
                fields=_FIELDS, timeout=limits, retry=None,
            )  # fmt: skip
            blobs = list(next(listing.pages, ()))
            # A console marks an empty folder by an object whose name ends in a slash: no file of ours.
            page = [replace(self, key=blob.name)._entry(blob) for blob in blobs if not blob.name.endswith("/")]
            return page, set(listing.prefixes), listing.next_page_token or None

        return self._do("storage.objects.list", look)

    def _fetch(self, generation: int | None) -> tuple[bytes, int] | None:
        def get(limits: Limits) -> tuple[bytes, int] | None:
            blob = self._blob(generation)
            try:
                data = blob.download_as_bytes(raw_download=True, checksum=None, timeout=limits, retry=None)
            except NotFound:
                return None
            if google_crc32c.value(data) != decoded(blob.crc32c):
                raise Damaged("CRC32C differs")
            return data, int(blob.generation)

        return self._do("storage.objects.get", get)

    def _pinned(self, entry: Entry) -> bytes:
        found = self._fetch(entry.version)
        if found is None:
            raise self._replaced()
        return found[0]

    def _slice(self, entry: Entry, start: int, length: int, limits: Limits) -> bytes:
        """A part of one generation, its length checked; for `persist`."""
        try:
            data = self._blob(entry.version).download_as_bytes(
                start=start, end=start + length - 1, raw_download=True, checksum=None, timeout=limits, retry=None
            )
        except NotFound as error:
            raise self._replaced() from error
        if len(data) != length:
            raise Damaged(f"{len(data)} bytes of {length}")
        return data

    def _download(self, to: Path, entry: Entry) -> bool:
        """Copy that generation to a file; whether its CRC32C is the object's (chunks cannot be checked one by one)."""

        def chunk(start: int) -> None:
            length = min(CHUNK, entry.size - start)
            data = self._do("storage.objects.get", lambda limits: self._slice(entry, start, length, limits))
            write_at(file.fileno(), data, start)
            health.progress()

        with open(to, "wb") as file:
            if entry.size <= LARGE:
                file.write(self._pinned(entry))
                return True
            file.truncate(entry.size)
            together(chunk, range(0, entry.size, CHUNK))
        return file_crc32c(to) == entry.crc32c

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
                there = (
                    client().bucket(self.bucket).get_blob(self.key, timeout=limits, retry=None) if tries > 1 else None
                )
                if there is None or (there.metadata or {}).get(_OURS) != ours:
                    raise Conflict(f"{self}: changed since it was read") from error
                blob = there
            if decoded(blob.crc32c) != crc:  # only a server that does not verify (an emulator) gets here
                condition = None if condition is None else int(blob.generation)
                raise Damaged("CRC32C of what was stored differs")
            return int(blob.generation)

        return self._do("storage.objects.create (storage.objects.delete as well, to replace)", put)

    def _send_parts(self, size: int, content: Callable[[int, int], bytes]) -> int:
        """Upload parts at the same time, each verified, then have the storage join them in one atomic step.

        Not a resumable session: that sends one part after the other, and what a server does with a part sent
        again differs. A killed upload leaves parts behind, which lists do not show and `delete_tree` deletes.
        """
        length = max(PART, -(-size // MOST_PARTS))
        beside = replace(self, key=f"{self.key}.parts-{uuid.uuid4().hex}")
        starts = range(0, size, length)
        names = [beside / f"{index:02d}" for index in range(len(starts))]

        def send(index: int) -> int:
            sent = names[index]._send(content(starts[index], min(length, size - starts[index])), ANY)
            health.progress()
            return sent

        def join(limits: Limits) -> Entry:
            blob = self._blob()
            blob.content_type = "application/octet-stream"
            parts = [name._blob(generation) for name, generation in zip(names, generations, strict=True)]
            blob.compose(parts, timeout=limits, retry=None)
            return self._entry(blob)

        try:
            generations = together(send, range(len(starts)), most=max(1, MEMORY // length))
            made = self._do("storage.objects.create and storage.objects.get", join)
        finally:
            with contextlib.suppress(DataError, Interrupted), within(CLEANING):
                together(lambda name: name.delete(), names)
        whole = google_crc32c.value(b"")
        for start in starts:
            whole = google_crc32c.extend(whole, content(start, min(length, size - start)))
        if (made.size, made.crc32c) != (size, whole):
            raise DataError(f"{self}: the source changed while it was uploaded")
        return made.version
