"""`S3Path`, the `StoragePath` of an object or folder in an S3 bucket.

The version of an object is its ETag, which a conditional write sends (If-Match, If-None-Match). S3 verifies an upload
by its signed SHA-256. This package writes each object's CRC32C into its metadata, and uses it to verify downloads. If
another program wrote an object, only the length of a download is verified, in addition to the protection by TLS.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from trainer.errors import DataError, TrainerError
from trainer.monitoring.health import health
from trainer.storage import bucket as buckets
from trainer.storage import retries
from trainer.storage.base import ANY, ObjectInfo, Version
from trainer.storage.bucket import (
    MAX_CONCURRENT_REQUESTS,
    WRITE_ID,
    Action,
    BucketPath,
    PreconditionFailed,
    ReplacedError,
    WriteResult,
)
from trainer.storage.retries import CorruptTransfer, Result, Timeouts, Transient
from trainer.storage.s3_client import call_with_retries, classify_error, get_store, parse_failure

MAX_PARTS = 10_000  # S3's limit per upload
MIN_PART_BYTES = 5 << 20  # S3's minimum size of each part except the last one
MAX_UPLOADS = 10  # attempts to upload a large file after errors that obstore does not retry, such as corrupt parts
PAGE_OBJECTS = 1000  # S3's limit per page of a listing

_CRC32C_KEY = "kubetune-crc32c"  # key in an object's metadata; its value has 8 hex digits
# S3 permission that each action requires, for error messages.
_PERMISSIONS: dict[Action, str] = {
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "write": "s3:PutObject",
    "delete": "s3:DeleteObject",
}


def _is_missing_object(error: FileNotFoundError) -> bool:
    """Return whether the error means that the object does not exist, rather than its bucket.

    The response to a HEAD request does not distinguish these cases, so the result for its errors is always True.
    """
    return parse_failure(error).code != "NoSuchBucket"


def _is_failed_precondition(error: Exception) -> bool:
    """Return whether a conditional write was rejected because its condition does not hold.

    The result for status 409 is False. It means that another conditional write is in progress, so a retry can succeed.
    """
    return isinstance(error, AlreadyExistsError | PreconditionError) and parse_failure(error).status in (404, 412, 304)


@dataclass(frozen=True)
class S3Path(BucketPath):
    """The address `s3://bucket/key` of an object or folder. The key of the bucket itself is ""."""

    scheme = "s3"

    def _call(self, action: Action, request: Callable[[Timeouts], Result]) -> Result:
        return call_with_retries(str(self), _PERMISSIONS[action], request)

    def _request_info(self, timeouts: Timeouts) -> ObjectInfo | None:
        response = self._get({"head": True}, timeouts)
        return None if response is None else self._make_info(response.meta, response.attributes)

    def _request_content(self, version: Version | None, timeouts: Timeouts) -> tuple[bytes, Version] | None:
        try:
            response = self._get({} if version is None else {"if_match": str(version)}, timeouts)
        except PreconditionError:
            return None
        if response is None:
            return None
        info = self._make_info(response.meta, response.attributes)
        data = bytes(response.bytes())
        if len(data) != info.size:
            raise CorruptTransfer(f"{len(data)} bytes of {info.size}")
        if info.crc32c not in (None, google_crc32c.value(data)):
            raise CorruptTransfer("CRC32C differs")
        return data, info.version

    def _request_range(self, info: ObjectInfo, start: int, length: int, timeouts: Timeouts) -> bytes:
        try:
            response = self._get({"range": (start, start + length), "if_match": str(info.version)}, timeouts)
        except PreconditionError as error:
            raise ReplacedError(self) from error
        if response is None:
            raise ReplacedError(self)
        return bytes(response.bytes())

    def _request_page(
        self, token: str, delimiter: str, max_objects: int | None, timeouts: Timeouts
    ) -> tuple[Sequence[ObjectInfo], set[str], str | None]:
        """Request a page of a listing. The token of a page is the last key of the previous page.

        With a delimiter, all objects and subfolders are on one page. The web console marks a folder with an empty
        object whose key ends in a slash. obstore removes the slash, so here the object has the folder's name.
        """
        store = get_store(self.bucket, timeouts)
        prefix = self.key or None
        limit = max_objects or PAGE_OBJECTS
        if delimiter:
            listing = obstore.list_with_delimiter(store, prefix)
            page = [replace(self, key=meta["path"])._make_info(meta) for meta in listing["objects"]]
            return page, {f"{name}/" for name in listing["common_prefixes"]}, None
        metas = next(iter(obstore.list(store, prefix, offset=token or None, chunk_size=limit)), [])
        page = [replace(self, key=meta["path"])._make_info(meta) for meta in metas]
        return page, set(), metas[-1]["path"] if len(metas) == limit else None

    def _request_write(self, data: bytes, write_id: str, only_if: Version | None, timeouts: Timeouts) -> WriteResult:
        mode: Any = "overwrite" if only_if == ANY else "create" if only_if is None else {"e_tag": str(only_if)}
        crc = google_crc32c.value(data)
        store = get_store(self.bucket, timeouts)
        attributes = _make_attributes(write_id, crc)
        try:
            result = obstore.put(store, self.key, data, mode=mode, attributes=attributes, use_multipart=False)
        except Exception as error:
            if _is_failed_precondition(error):
                raise PreconditionFailed from error
            raise
        return WriteResult(str(result["e_tag"]), write_id, None)

    def _request_write_result(self, timeouts: Timeouts) -> WriteResult | None:
        head = self._get({"head": True}, timeouts)
        return None if head is None else WriteResult(str(head.meta["e_tag"]), head.attributes.get(WRITE_ID), None)

    def _request_deletion(self, timeouts: Timeouts) -> None:
        try:
            obstore.delete(get_store(self.bucket, timeouts), self.key)
        except FileNotFoundError as error:
            if not _is_missing_object(error):
                raise

    def _get_crc32c(self, info: ObjectInfo) -> int | None:
        current_info = self.stat()
        if current_info is None or current_info.version != info.version:
            raise ReplacedError(self)
        return current_info.crc32c

    def _get(self, options: Any, timeouts: Timeouts) -> Any:
        """Request the object, without retries. Return None if the object does not exist.

        `options` are obstore's `GetOptions`, which can select only the metadata, a range, or a required version.
        """
        try:
            return obstore.get(get_store(self.bucket, timeouts), self.key, options=options)
        except FileNotFoundError as error:
            if _is_missing_object(error):
                return None
            raise

    def _make_info(self, meta: Any, attributes: Mapping[str, str] | None = None) -> ObjectInfo:
        crc32c_hex = (attributes or {}).get(_CRC32C_KEY)
        with contextlib.suppress(ValueError, TypeError):  # there is no CRC32C, because another program wrote the object
            return ObjectInfo(self, meta["size"], str(meta["e_tag"]), int(crc32c_hex, 16))  # type: ignore[arg-type]
        return ObjectInfo(self, meta["size"], str(meta["e_tag"]))

    def _upload_parts(self, size: int, read_range: Callable[[int, int], bytes]) -> Version:
        """Upload a large file in one multipart upload, whose last request makes the object visible.

        If the process is killed, the parts remain unless the bucket has a rule that deletes them (docs/storage.md).

        Raises:
            DataError: the source changed during the upload, which is cancelled.
        """
        part_bytes = max(buckets.PART_BYTES, MIN_PART_BYTES, -(-size // MAX_PARTS))

        crc = google_crc32c.value(b"")
        for start in range(0, size, part_bytes):  # first, because the metadata is sent before the content
            crc = google_crc32c.extend(crc, read_range(start, min(part_bytes, size - start)))

        def read_parts() -> Iterator[bytes]:
            """Yield the parts of the file, and raise a DataError before the last part if the file has changed."""
            sent_crc = google_crc32c.value(b"")
            for start in range(0, size, part_bytes):
                part = read_range(start, min(part_bytes, size - start))
                sent_crc = google_crc32c.extend(sent_crc, part)
                if start + part_bytes >= size and sent_crc != crc:  # before the last part, so nothing becomes visible
                    problem = f"{self}: the source changed while it was uploaded"
                    raise DataError(problem, fix="start the same command again")
                health.record_progress()
                yield part

        return self._send_parts(part_bytes, read_parts, crc)

    def _send_parts(self, part_bytes: int, read_parts: Callable[[], Iterator[bytes]], crc: int) -> Version:
        """Upload all parts, and upload all of them again after a transient error that obstore did not retry.

        obstore itself retries each part until the deadline. `crc` is the CRC32C of the whole file, for the metadata.
        """
        deadline = retries.get_deadline()
        timeouts = min(retries.CONNECT_SECONDS, deadline), min(retries.READ_SECONDS, deadline)
        store = get_store(self.bucket, timeouts, retry_seconds=deadline)
        for attempt in range(MAX_UPLOADS):
            write_id = uuid.uuid4().hex
            start = time.monotonic()
            try:
                result = obstore.put(
                    store, self.key, read_parts(), attributes=_make_attributes(write_id, crc), use_multipart=True,
                    chunk_size=part_bytes, max_concurrency=MAX_CONCURRENT_REQUESTS,
                )  # fmt: skip
                return str(result["e_tag"])
            except Exception as error:
                verdict = classify_error(error, str(self), _PERMISSIONS["write"])
                if verdict is None:
                    raise
                is_last_attempt = attempt + 1 == MAX_UPLOADS or time.monotonic() - start >= deadline
                if isinstance(verdict, Transient) and is_last_attempt:
                    raise retries.make_timeout_error(str(self), deadline, verdict.reason) from error
                # The last request may have succeeded, but its response may have been lost. Then its repetition fails.
                if isinstance(verdict, Transient) or parse_failure(error).code == "NoSuchUpload":
                    written = self._call("read", self._request_write_result)
                    if written is not None and written.write_id == write_id:
                        return written.version
                if isinstance(verdict, TrainerError):
                    raise verdict from error
                time.sleep(retries.INITIAL_BACKOFF_SECONDS)
        raise AssertionError("unreachable")


def _make_attributes(write_id: str, crc32c: int) -> Any:
    return {WRITE_ID: write_id, _CRC32C_KEY: f"{crc32c:08x}", "Content-Type": "application/octet-stream"}
