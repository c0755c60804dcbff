"""One type for a path on disk and an address in a bucket.

    folder = place("gs://bucket/runs/7")          # or place("outputs/7"): the same from here on
    version = (folder / "LATEST").write("step-420", only_if=None)

Why not a path library: none offers writes that are conditional on a generation, see docs/storage.md.
"""

import re
from pathlib import Path

from trainer.errors import ConfigError
from trainer.storage.base import ANY, Conflict, Entry, OnlyIf, Place
from trainer.storage.local import LocalPlace

__all__ = ["ANY", "Conflict", "Entry", "LocalPlace", "OnlyIf", "Place", "place"]


def place(text: str | Path | Place) -> Place:
    """The place that `text` names: `gs://bucket/a/b`, else a local path; as text it may begin with `~`.

    Raises:
        ConfigError: another scheme, or no bucket.
    """
    if isinstance(text, Place):
        return text
    if isinstance(text, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)):
        if scheme[1] != "gs" or not text.startswith("gs://"):
            raise ConfigError(f"{text}: only local paths and gs://bucket/... can be read and written")
        bucket, _, key = text.removeprefix("gs://").partition("/")
        if not bucket:
            raise ConfigError(f"{text}: names no bucket; write it as gs://bucket/folder")
        from trainer.storage.gcs import BucketPlace  # Google's client takes long to import

        return BucketPlace(bucket) / key
    if isinstance(text, Path) and text.parts[:1] == ("gs:",):
        raise ConfigError(f"{text}: an address in a bucket must be given as text, pathlib drops one of its slashes")
    return LocalPlace(Path(text).expanduser() if isinstance(text, str) else text)
