"""Local files written so that a reader, or a power cut, never sees half of one."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or entered into a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside, flush to disk, rename over. Makes the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` as indented JSON."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
