"""A server's prediction log: a local file to which lines are appended, or a local or bucket folder of parts.

A part is one file, `<folder>/<day>/<time>-<server>-<number>.jsonl`, which is written in one write. Its name has the day
and time (UTC) of its first prediction. A part's lines wait in memory until a thread has written them. If the folder or
bucket cannot be written, lines wait up to a memory limit, and further lines are dropped. No request waits or fails.
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

PART_BYTES = 4 << 20  # maximum size of a part, unless a single line is longer
MAX_BUFFERED_BYTES = 64 << 20  # maximum size of the lines that are not written yet
WRITE_SECONDS = 30.0  # timeout of each bucket request when a part is written
RETRY_SECONDS = 2.0  # from a failure to write a part until the next try
CLOSE_SECONDS = 10.0  # maximum time for writing the last parts when the server stops


class PredictionLog(Protocol):
    """A prediction log, with one line per prediction."""

    def append(self, lines: Sequence[str]) -> int:
        """Add lines, each of which ends with a line break; return the number of dropped lines. Does not raise."""

    def close(self) -> None:
        """Write all lines that are not written yet. Must be called once, after the last `append`."""


class FileLog:
    """A local file to which lines are appended. After a write error, all further lines are dropped.

    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, file: str) -> None:
        path = Path(file).expanduser()
        self._file, self._descriptor = file, -1  # -1 after an error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise _make_unwritable_error(file, error) from None

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
    """The lines of a part. No line is added after `deadline`."""

    name: str  # relative to the log's folder
    deadline: float  # as `time.monotonic()`, in seconds
    size: int = 0  # total size of the lines in bytes
    lines: list[str] = field(default_factory=list)


class PartLog:
    """A folder of parts, local or in a bucket, which a thread writes. Thread-safe.

    A part is complete after `seconds`, or when it has `PART_BYTES`. If a part cannot be written, the write is retried
    with the same name, so that no prediction is in two parts.
    """

    def __init__(self, folder: StoragePath, seconds: float) -> None:
        self.folder, self._seconds = folder, seconds
        self._server = f"{os.environ.get('HOSTNAME') or platform.node()}-{secrets.token_hex(4)}"
        self._complete_parts: deque[_Part] = deque()  # complete parts that are not written yet, oldest first
        self._open_part: _Part | None = None  # the part to which lines are added
        self._buffered = self._num_parts = 0  # size of all these parts in bytes; number of parts so far
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
                if self._open_part and self._open_part.size + size > PART_BYTES:
                    self._complete_part()
                if self._open_part is None:
                    now, self._num_parts = datetime.now(UTC), self._num_parts + 1
                    name = f"{now:%Y-%m-%d}/{now:%Y%m%dT%H%M%S}Z-{self._server}-{self._num_parts:06d}.jsonl"
                    self._open_part = _Part(name, time.monotonic() + self._seconds)
                    self._changed.notify_all()  # the thread then waits until this part's `deadline`
                self._open_part.lines.append(line)
                self._open_part.size += size
                self._buffered += size
            return 0

    def _complete_part(self) -> None:
        """Complete the open part, if there is one. The caller must hold the lock `_changed`."""
        if self._open_part is not None:
            self._complete_parts.append(self._open_part)
            self._open_part = None
            self._changed.notify_all()

    def _write_parts(self) -> None:
        """Write each part as soon as it is complete, until the log is closed and all parts are written."""
        while part := self._next_part():
            is_written = self._write(part.name, "".join(part.lines))
            with self._changed:
                if is_written:
                    self._complete_parts.popleft()
                    self._buffered -= part.size
                else:
                    self._changed.wait_for(lambda: self._closed, RETRY_SECONDS)

    def _next_part(self) -> _Part | None:
        """Wait for a complete part, and return the oldest; None once the log is closed and all parts are written."""
        with self._changed:
            while not self._complete_parts:
                if self._open_part and (self._closed or time.monotonic() >= self._open_part.deadline):
                    self._complete_part()
                elif self._closed:
                    return None
                else:
                    self._changed.wait(self._open_part.deadline - time.monotonic() if self._open_part else None)
            return self._complete_parts[0]

    def _write(self, name: str, content: str) -> bool:
        """Write a part, and return whether this succeeded. Log the first of consecutive failures, and the recovery."""
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
            num_lines = sum(len(part.lines) for part in self._complete_parts)
            log.warning(f"log={self.folder}: cannot be written; {num_lines:,} predictions are lost")


def open_log(address: str | None, seconds: float) -> PredictionLog | None:
    """Open the prediction log at an address; None if there is no address.

    Args:
        address: a local *.jsonl file or an existing local file, to which lines are appended; any other address is a
            folder of parts, local or in a bucket. A bucket is not accessed before the first part is written.
        seconds: maximum time, in seconds, from a part's first prediction to its end.

    Raises:
        ConfigError: a local file or folder cannot be written, or the address is a *.jsonl file in a bucket.
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
            raise _make_unwritable_error(address, error) from None
    return PartLog(storage_path(address), seconds)


def _make_unwritable_error(address: str, error: OSError) -> ConfigError:
    fix = "give a writable file or folder, or leave log out"
    return ConfigError(f"cannot be written ({error.strerror})", key="log", value=address, fix=fix)
