"""Writing the report's files: whole or not at all, and always the same bytes."""

from __future__ import annotations

import os
from pathlib import Path


def printable(text: str) -> str:
    """The text without what cannot be encoded or shown on one line (file names may hold any bytes)."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write beside and rename, so that a reader never sees half a file. Text becomes UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
