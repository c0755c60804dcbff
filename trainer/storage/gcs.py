"""`GcsPath`, the `StoragePath` of an object or folder in a Google Cloud Storage bucket.

The version of an object is its generation. Uploads, and reads of whole objects, are verified by their CRC32C. The
methods `_request_*` make one attempt with the given timeouts; `BucketPath` calls them through `_call`, which retries.
"""

from __future__ import annotations

import base64
import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
from google.api_core import exceptions
from google.api_core.exceptions import NotFound

from trainer.errors import DataError, Interrupted
from trainer.monitoring.health import health
from trainer.storage import bucket as buckets
from trainer.storage.base import ANY, ObjectInfo, Version, request_deadline
from trainer.storage.bucket import (
    WRITE_ID,
    Action,
    BucketPath,
    PreconditionFailed,
    ReplacedError,
    WriteResult,
    map_in_threads,
)
from trainer.storage.gcs_client import call_with_retries, get_bucket, get_client
from trainer.storage.retries import CorruptTransfer, Result, Timeouts

MAX_COMPOSED_PARTS = 32  # source objects per compose request (limit of Cloud Storage)
MAX_PART_BYTES = 32 << 20  # a larger file has more parts, so that the parts in memory take at most 256 MiB
CLEANUP_SECONDS = 10.0  # deadline of each request that deletes a part after an upload

_CONTENT_TYPE = "application/octet-stream"  # of all objects that this module writes
_FIELDS = "items(name,size,generation,crc32c),prefixes,nextPageToken"  # fields of the response to a list request
# Google Cloud permission that each action requires, for error messages.
_PERMISSIONS: dict[Action, str] = {
    "read": "storage.objects.get",
    "list": "storage.objects.list",
    "write": "storage.objects.create (storage.objects.delete as well, to replace)",
    "delete": "storage.objects.delete",
}
_COMPOSE_PERMISSIONS = "storage.objects.create and storage.objects.get (storage.objects.delete as well, to replace)"


def _decode_crc32c(crc32c: str | None) -> int | None:
    """Decode a CRC32C as Cloud Storage reports it: base64 of 4 big-endian bytes. None, if it is unknown, stays None."""
    return None if crc32c is None else int.from_bytes(base64.b64decode(crc32c), "big")


def _require_crc32c(blob: Any) -> int:
    """Return the CRC32C of the `storage.Blob` of a response. Cloud Storage sends it for each object."""
    if (crc32c := _decode_crc32c(blob.crc32c)) is None:
        raise CorruptTransfer("the response has no CRC32C")
    return crc32c


@dataclass(frozen=True)
class GcsPath(BucketPath):
    """The address `gs://bucket/key` of an object or folder. The key of the bucket itself is ""."""

    scheme = "gs"

    def _call(self, action: Action, request: Callable[[Timeouts], Result]) -> Result:
        return call_with_retries(str(self), _PERMISSIONS[action], request)

    def _request_info(self, timeouts: Timeouts) -> ObjectInfo | None:
        blob = self._request_blob(timeouts)
        return None if blob is None else self._make_info(blob)

    def _request_content(self, version: Version | None, timeouts: Timeouts) -> tuple[bytes, Version] | None:
        blob = self._make_blob(version)
        try:
            # raw_download, because the CRC32C, which is verified below, is that of the stored bytes, which may be
            # compressed.
            data = blob.download_as_bytes(raw_download=True, checksum=None, timeout=timeouts, retry=None)
        except NotFound:
            return None
        if google_crc32c.value(data) != _require_crc32c(blob):
            raise CorruptTransfer("CRC32C differs")
        return data, int(blob.generation)

    def _request_range(self, info: ObjectInfo, start: int, length: int, timeouts: Timeouts) -> bytes:
        try:
            data: bytes = self._make_blob(info.version).download_as_bytes(
                start=start, end=start + length - 1, raw_download=True, checksum=None, timeout=timeouts, retry=None
            )
        except NotFound as error:
            raise ReplacedError(self) from error
        return data

    def _request_page(
        self, token: str, delimiter: str, max_objects: int | None, timeouts: Timeouts
    ) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
        listing = get_client().list_blobs(
            get_bucket(self.bucket), prefix=f"{self.key}/" if self.key else "", delimiter=delimiter or None,
            page_token=token or None, max_results=max_objects, fields=_FIELDS, timeout=timeouts, retry=None,
        )  # fmt: skip
        blobs = list(next(listing.pages, ()))
        # The web console marks an empty folder with an object whose name ends in a slash.
        page = [replace(self, key=blob.name)._make_info(blob) for blob in blobs if not blob.name.endswith("/")]
        return page, set(listing.prefixes), listing.next_page_token or None

    def _request_write(self, data: bytes, write_id: str, only_if: Version | None, timeouts: Timeouts) -> WriteResult:
        blob = self._make_blob()
        blob.metadata = {WRITE_ID: write_id}
        condition = None if only_if == ANY else only_if or 0  # 0: the object must not exist
        try:
            blob.upload_from_string(
                data, content_type=_CONTENT_TYPE, checksum="crc32c",
                if_generation_match=condition, timeout=timeouts, retry=None,
            )  # fmt: skip
        except exceptions.PreconditionFailed as error:
            raise PreconditionFailed from error
        return self._make_write_result(blob)

    def _request_write_result(self, timeouts: Timeouts) -> WriteResult | None:
        blob = self._request_blob(timeouts)
        return None if blob is None else self._make_write_result(blob)

    def _request_deletion(self, timeouts: Timeouts) -> None:
        with contextlib.suppress(NotFound):
            self._make_blob().delete(timeout=timeouts, retry=None)

    def _get_crc32c(self, info: ObjectInfo) -> int | None:
        return info.crc32c

    def _make_blob(self, generation: Version | None = None) -> Any:
        """Make a `storage.Blob` for the object, or for one of its generations, without a request."""
        return get_bucket(self.bucket).blob(self.key, generation=generation)

    def _request_blob(self, timeouts: Timeouts) -> Any:
        """Request the object's metadata as a `storage.Blob`, without retries; None if the object does not exist."""
        return get_bucket(self.bucket).get_blob(self.key, timeout=timeouts, retry=None)

    def _make_info(self, blob: Any) -> ObjectInfo:
        return ObjectInfo(self, int(blob.size), int(blob.generation), _decode_crc32c(blob.crc32c))

    def _make_write_result(self, blob: Any) -> WriteResult:
        return WriteResult(int(blob.generation), (blob.metadata or {}).get(WRITE_ID), _decode_crc32c(blob.crc32c))

    def _upload_parts(self, size: int, read_range: Callable[[int, int], bytes]) -> Version:
        """Upload the parts as objects with verified CRC32C, compose them under a temporary name, verify, and copy.

        The copy, which is atomic and within the storage, makes the object visible. A resumable upload would be
        sequential, and servers differ in how they treat a repeated chunk. If the process is killed, `list` omits the
        parts that it leaves behind, and `delete_tree` deletes them.

        Raises:
            DataError: the composed object does not have the size and CRC32C of the source. It is deleted.
        """
        # Few large parts rather than many small ones, because each compose request takes a limited number.
        part_bytes = max(buckets.PART_BYTES, min(MAX_PART_BYTES, -(-size // MAX_COMPOSED_PARTS)))  # rounded up
        folder = replace(self, key=f"{self.key}.parts-{uuid.uuid4().hex}")
        starts = range(0, size, part_bytes)
        temporary: list[GcsPath] = []  # the objects to delete at the end

        def read_part(start: int) -> bytes:
            return read_range(start, min(part_bytes, size - start))

        def upload_part(index: int) -> Any:
            """Upload a part of the file as an object, and return its `Blob`."""
            part = folder / f"{index:02d}"
            temporary.append(part)
            generation = part._upload_object(read_part(starts[index]), ANY)
            health.record_progress()
            return part._make_blob(generation)

        try:
            blobs = map_in_threads(upload_part, range(len(starts)))
            while len(blobs) > 1:
                groups = [blobs[i : i + MAX_COMPOSED_PARTS] for i in range(0, len(blobs), MAX_COMPOSED_PARTS)]
                targets = [folder / f"{len(temporary) + index:02d}" for index in range(len(groups))]
                temporary += targets
                blobs = map_in_threads(lambda pair: pair[0]._compose(pair[1]), zip(targets, groups, strict=True))
            # Read the source again: it may have changed while the parts were uploaded.
            crc = google_crc32c.value(b"")
            for start in starts:
                crc = google_crc32c.extend(crc, read_part(start))
            (composed,) = blobs
            if (composed.size, _decode_crc32c(composed.crc32c)) != (size, crc):
                raise DataError(f"{self}: the source changed while it was uploaded", fix="start the same command again")
            return self._copy_object(composed)
        finally:
            with contextlib.suppress(DataError, Interrupted), request_deadline(CLEANUP_SECONDS):
                map_in_threads(lambda path: path.delete(), temporary)

    def _compose(self, sources: Sequence[Any]) -> Any:
        """Concatenate objects in the same bucket into this one, and return it. Each is the `Blob` of a generation."""

        def compose(timeouts: Timeouts) -> Any:
            """Send the compose request."""
            blob = self._make_blob()
            blob.content_type = _CONTENT_TYPE
            blob.compose(sources, timeout=timeouts, retry=None)
            _require_crc32c(blob)
            return blob

        blob = call_with_retries(str(self), _COMPOSE_PERMISSIONS, compose)
        health.record_progress()
        return blob

    def _copy_object(self, source: Any) -> Version:
        """Copy a generation of another object in the same bucket, a `Blob`, to this object, within the storage."""

        def copy(timeouts: Timeouts) -> Version:
            """Send rewrite requests until the copy is complete, and return the copy's generation."""
            blob = self._make_blob()
            token = None
            blob.content_type = _CONTENT_TYPE
            while True:  # once, unless the storage cannot copy by reference
                token, *_ = blob.rewrite(source, token=token, timeout=timeouts, retry=None)
                if token is None:
                    return int(blob.generation)

        return call_with_retries(str(self), _COMPOSE_PERMISSIONS, copy)
