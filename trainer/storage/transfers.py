"""Small parts of moving bytes: checksums, writing at an offset, several requests at the same time."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

AT_ONCE = 8  # requests of one transfer at the same time

Result = TypeVar("Result")
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


def together(do: Callable[[Item], Result], items: Iterable[Item], most: int | None = None) -> list[Result]:
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

    with ThreadPoolExecutor(min(AT_ONCE, most or AT_ONCE)) as pool:
        futures = [pool.submit(one, item, copy_context()) for item in items]
    return [future.result() for future in futures]  # type: ignore[misc]  # None only where another raises
