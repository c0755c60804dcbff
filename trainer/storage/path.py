"""Parse an address into a `StoragePath`, the common type of local paths and `gs://` addresses.

    folder = storage_path("gs://bucket/runs/7")          # or storage_path("outputs/7")
    version = (folder / "LATEST").write("step-420", only_if=None)  # only if it does not exist yet

Path libraries for buckets lack conditional writes, which leases need (docs/storage.md).
"""

import os
import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.storage.base import Conflict, ObjectInfo, StoragePath
from trainer.storage.local import LocalPath

__all__ = ["Conflict", "ObjectInfo", "StoragePath", "storage_path"]


def storage_path(text: str | Path | StoragePath) -> StoragePath:
    """Parse `gs://bucket/a/b` or a local path, and expand `~` in a string.

    Raises ConfigError for another scheme, an address without a bucket, or a `gs://` address as a pathlib.Path.
    """
    if isinstance(text, StoragePath):
        return text
    if isinstance(text, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)):
        if scheme[1] != "gs" or not text.startswith("gs://"):
            raise ConfigError(f"{text}: has an unsupported scheme", fix="give a local path or gs://bucket/...")
        bucket, _, key = text.removeprefix("gs://").partition("/")
        if not bucket:
            raise ConfigError(f"{text}: names no bucket", fix="write it as gs://bucket/folder")
        from trainer.storage.gcs import GcsPath  # slow: imports Google's client

        return GcsPath(bucket) / key
    if isinstance(text, Path) and text.parts[:1] == ("gs:",):
        raise ConfigError(f"{text}: is a pathlib.Path, which drops a slash", fix="pass a string")
    return LocalPath(Path(text).expanduser() if isinstance(text, str) else text)


def canonicalize_address(address: str) -> str:
    """Return the canonical address of a folder: absolute, without `~`, `.`, `..`, symbolic links and trailing slash."""
    return str(storage_path(address.rstrip("/"))) if "://" in address else os.path.realpath(os.path.expanduser(address))
