"""Parse an address into a `StoragePath`, the common type of local paths and of `gs://` and `s3://` addresses.

    folder = storage_path("gs://bucket/runs/7")          # or storage_path("outputs/7")
    version = (folder / "LATEST").write("step-420", only_if=None)  # only if it does not exist yet

Existing path libraries for buckets do not have the conditional writes that leases need (docs/storage.md).
"""

import os
import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.storage.base import ConflictError, ObjectInfo, StoragePath
from trainer.storage.local import LocalPath

__all__ = ["ConflictError", "ObjectInfo", "StoragePath", "storage_path"]


SCHEMES = ("gs", "s3")  # URL schemes of addresses in buckets


def storage_path(text: str | Path | StoragePath) -> StoragePath:
    """Parse `gs://bucket/a/b`, `s3://bucket/a/b` or a local path.

    A `~` is expanded in a string, but not in a `Path`. A `StoragePath` is returned unchanged.

    Raises:
        ConfigError: the address has an unsupported scheme; a bucket address has no bucket name, contains `..`, or was
            passed as a `pathlib.Path`.
    """
    if isinstance(text, StoragePath):
        return text
    if isinstance(text, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)):
        if scheme[1] not in SCHEMES or not text.startswith(f"{scheme[1]}://"):
            fix = "give a local path, gs://bucket/... or s3://bucket/..."
            raise ConfigError(f"{text}: has an unsupported scheme", fix=fix)
        bucket, _, key = text.removeprefix(f"{scheme[1]}://").partition("/")
        if not bucket:
            raise ConfigError(f"{text}: names no bucket", fix=f"write it as {scheme[1]}://bucket/folder")
        return _make_bucket_path(scheme[1], bucket) / key
    if isinstance(text, Path) and text.parts[:1] in [(f"{scheme}:",) for scheme in SCHEMES]:
        raise ConfigError(f"{text}: is a pathlib.Path, which drops a slash", fix="pass a string")
    return LocalPath(Path(text).expanduser() if isinstance(text, str) else text)


def _make_bucket_path(scheme: str, bucket: str) -> StoragePath:
    """Make the path of a bucket. The client library is imported only here, because the import is slow."""
    if scheme == "gs":
        from trainer.storage.gcs import GcsPath

        return GcsPath(bucket)
    from trainer.storage.s3 import S3Path

    return S3Path(bucket)


def canonicalize_address(address: str) -> str:
    """Return the canonical address of a folder, without a trailing slash.

    A local path becomes absolute; `~`, `.`, `..` and symbolic links are resolved.
    """
    return str(storage_path(address.rstrip("/"))) if "://" in address else os.path.realpath(os.path.expanduser(address))
