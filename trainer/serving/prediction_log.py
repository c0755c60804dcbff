"""The prediction log of a server: one file that is appended to, or parts in a folder or a bucket.

A part is written as a whole, to `<folder>/<day>/<time>-<server>-<number>.jsonl`, where day and time (in UTC) are those
of its first prediction. Predictions wait in memory until a thread has written them. If the folder or bucket cannot be
written, they wait there up to a limit, and later ones are dropped and counted; no request waits or fails.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from trainer.errors import ConfigError, TrainerError
from trainer.monitoring.log import log
from trainer.storage.base import StoragePath, request_deadline
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote

PART_BYTES = 4 << 20  # a part is not larger, except for one with a single longer line
MAX_BUFFERED_BYTES = 64 << 20  # of predictions that are not written yet
WRITE_SECONDS = 30.0  # deadline of writing one part
RETRY_SECONDS = 2.0  # until a part that could not be written is tried again
CLOSE_SECONDS = 10.0  # for writing the last parts when the server stops


class PredictionLog(Protocol):
    """Where the lines of predictions are written."""

    def append(self, lines: Sequence[str]) -> int:
        """Add lines, which end with a line break, and return the number of dropped ones. Does not raise or wait."""

    def close(self) -> None:
        """Write what is not written yet; called once, after the last `append`."""


class FileLog:
    """A local file that is appended to. After an error nothing is written anymore."""

    def __init__(self, file: str) -> None:
        path = Path(file).expanduser()
        self._file, self._descriptor = file, -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise _cannot_write(file, error) from None

    def append(self, lines: Sequence[str]) -> int:
        if self._descriptor < 0:
            return len(lines)
        try:
            os.write(self._descriptor, "".join(lines).encode())
            return 0
        except OSError as error:
            log.warning(f"log={self._file}: cannot be written ({error.strerror}); logging has stopped")
            self._descriptor = -1
            return len(lines)

    def close(self) -> None:
        pass


@dataclass
class _Part:
    """The lines of a part; no line is added after `end`, in seconds of the monotonic clock."""

    name: str
    end: float
    size: int = 0
    lines: list[str] = field(default_factory=list)


class PartLog:
    """Parts in a folder or bucket, written by a thread. Thread-safe.

    A part ends after `seconds`, or when it has `PART_BYTES`. One that cannot be written is tried again under the same
    name, so that no prediction is in two parts.
    """

    def __init__(self, folder: StoragePath, seconds: float) -> None:
        self.folder, self._seconds = folder, seconds
        self._server = f"{os.environ.get('HOSTNAME') or platform.node()}-{secrets.token_hex(4)}"
        self._complete: deque[_Part] = deque()  # not written yet, oldest first
        self._open: _Part | None = None  # that lines are added to
        self._buffered = self._number = 0  # bytes in all these parts; parts so far
        self._failing = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_parts, name="prediction log", daemon=True)
        self._thread.start()

    def append(self, lines: Sequence[str]) -> int:
        with self._changed:
            for index, line in enumerate(lines):
                size = len(line)  # bytes: JSON is ASCII
                if self._buffered + size > MAX_BUFFERED_BYTES:
                    return len(lines) - index
                if self._open and self._open.size + size > PART_BYTES:
                    self._complete_part()
                if self._open is None:
                    now, self._number = datetime.now(UTC), self._number + 1
                    name = f"{now:%Y-%m-%d}/{now:%Y%m%dT%H%M%S}Z-{self._server}-{self._number:06d}.jsonl"
                    self._open = _Part(name, time.monotonic() + self._seconds)
                    self._changed.notify_all()  # the thread waits until its end
                self._open.lines.append(line)
                self._open.size += size
                self._buffered += size
            return 0

    def _complete_part(self) -> None:
        """Complete the open part; the caller has the lock."""
        if self._open is not None:
            self._complete.append(self._open)
            self._open = None
            self._changed.notify_all()

    def _write_parts(self) -> None:
        """Write parts as they are complete, until the log is closed and everything is written."""
        while part := self._next_part():
            written = self._write(part.name, "".join(part.lines))
            with self._changed:
                if written:
                    self._complete.popleft()
                    self._buffered -= part.size
                else:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)

    def _next_part(self) -> _Part | None:
        """Wait for a complete part, and return the oldest one; None if the log is closed and has none."""
        with self._changed:
            while not self._complete:
                if self._open and (self._closed or time.monotonic() >= self._open.end):
                    self._complete_part()
                elif self._closed:
                    return None
                else:
                    self._changed.wait(self._open.end - time.monotonic() if self._open else None)
            return self._complete[0]

    def _write(self, name: str, content: str) -> bool:
        """Write a part; log the first of several failures in a row, and the success after them."""
        try:
            with request_deadline(WRITE_SECONDS):
                (self.folder / name).write(content)
        except (TrainerError, OSError) as error:
            if not self._failing:
                log.warning(f"log={self.folder}: cannot be written ({error}); predictions wait in memory")
            self._failing = True
            return False
        if self._failing:
            log.info(f"log={self.folder}: can be written again")
        self._failing = False
        return True

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            lines = sum(len(part.lines) for part in self._complete)
            log.warning(f"log={self.folder}: cannot be written; {lines:,} predictions are lost")


def open_log(address: str | None, seconds: float) -> PredictionLog | None:
    """Open the prediction log at an address: a local *.jsonl file, or a folder of parts, local or in a bucket.

    Raises ConfigError if a local file or folder cannot be written. A bucket is not read before the first part.
    """
    if not address:
        return None
    if address.endswith(".jsonl") and is_remote(address):
        fix = "give a folder of the bucket, into which parts are written"
        raise ConfigError("is a file in a bucket, which cannot be appended to", key="log", value=address, fix=fix)
    path = Path(address).expanduser()
    if not is_remote(address) and (address.endswith(".jsonl") or (path.exists() and not path.is_dir())):
        return FileLog(address)
    if not is_remote(address):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(address, error) from None
    return PartLog(storage_path(address), seconds)


def _cannot_write(address: str, error: OSError) -> ConfigError:
    fix = "give a writable file or folder, or leave log out"
    return ConfigError(f"cannot be written ({error.strerror})", key="log", value=address, fix=fix)
