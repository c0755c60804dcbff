"""The log of a process, through the standard `logging`, as text or as one JSON object per line.

`log` is the logger of this package. INFO goes to stdout, WARNING and above to stderr. In JSON mode, Python's warnings
and the warnings and errors of other libraries are JSON on stderr as well. What a library prints itself is unchanged.
"""

import datetime
import json
import logging
import math
import os
import re
import select
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from trainer.monitoring.health import health

LABELS_FIELD = "logging.googleapis.com/labels"  # of Cloud Logging
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")  # levels that Cloud Logging has too; others become INFO

log = logging.getLogger("trainer")
_stderr_descriptor = os.dup(2)  # a copy, because descriptor 2 is redirected while TensorFlow is imported
_ERASE_LINE = b"\r\x1b[2K\x1b[?25h"  # erases the line of the cursor, and shows the cursor
_display_descriptor: int | None = None  # of the terminal on which a progress display is drawn; None if there is none


def set_display(descriptor: int | None) -> None:
    """Set the descriptor of the terminal on which a progress display is drawn; None if there is no display."""
    global _display_descriptor
    _display_descriptor = descriptor


def erase_display(*terminals: int) -> None:
    """Erase the line of the progress display and show the cursor. Any thread may call this.

    `terminals` are file descriptors, and default to that of `set_display`. A terminal whose output is paused is not
    changed, because the write would block.
    """
    for descriptor in terminals or ([] if _display_descriptor is None else [_display_descriptor]):
        with suppress(OSError):
            if os.isatty(descriptor) and select.select([], [descriptor], [], 0)[1]:
                os.write(descriptor, _ERASE_LINE)


def exit_at_once(code: int) -> NoReturn:
    """End the process at once with this exit code, from any thread, and erase the progress display."""
    erase_display()
    os._exit(code)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object with the field names of Cloud Logging.

    The object has the severity, time and message, the phase and step of the run, the labels of the process, and the
    fields of the record, which are passed to `log` as `extra={"fields": {...}}`. NaN and infinity become strings.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        super().__init__()
        self._labels = {LABELS_FIELD: labels} if labels else {}

    def format(self, record: logging.LogRecord) -> str:
        severity = record.levelname if record.levelname in SEVERITIES else "INFO"
        entry = {"severity": severity, "time": format_utc_now(), "message": super().format(record).strip("\n")}
        entry |= {} if record.name == log.name else {"logger": record.name}
        step = {"step": int(health.values["step"])} if "step" in health.values else {}
        entry |= {"phase": health.phase} | step | getattr(record, "fields", {}) | self._labels
        return json.dumps(_without_nan(entry), ensure_ascii=False, default=str)


_original_stderr: TextIO | None = None  # the original stream while `drop_stderr_lines` has redirected descriptor 2


class _StandardStreamHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the current `sys.stdout` or `sys.stderr`, which can be replaced at any time."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._name = name
        self.failed = False  # whether a record could not be written; the failure is logged once

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return _original_stderr if _original_stderr and self._name == "stderr" else stream

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, and escape characters that the stream cannot encode, such as those of odd file names."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        """Discard the stream if its reader has ended; log a full disk once. The run does not depend on its log."""
        error = sys.exception()
        if discard_if_closed(self.stream):
            return
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            log_unbuffered(f"{self._name}: cannot be written to ({error.strerror or error}); lines of the log are lost")


_stdout_handler, _stderr_handler = _StandardStreamHandler("stdout"), _StandardStreamHandler("stderr")
_stdout_handler.addFilter(lambda record: record.levelno < logging.WARNING)
_stderr_handler.setLevel(logging.WARNING)


def configure(json_lines: bool = False, **labels: str) -> None:
    """Set up `log` as text or as JSON lines.

    `labels` are added to each line in JSON mode only. In JSON mode, uncaught exceptions and Python's warnings become
    JSON lines as well.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_stdout_handler, _stderr_handler]
    for handler in log.handlers:
        handler.setFormatter(JsonFormatter(labels) if json_lines else None)
    if not json_lines:
        return
    logging.getLogger().addHandler(_stderr_handler)
    logging.captureWarnings(True)
    # The resource tracker of multiprocessing outlives `os._exit`, and its warnings would not be JSON.
    filters = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
    sys.excepthook = lambda _kind, error, _trace: log_traceback(error)
    threading.excepthook = lambda hook_args: log_traceback(hook_args.exc_value)


def discard_if_closed(stream: TextIO) -> bool:
    """Return whether a stream is a pipe without a reader; if so, redirect the stream to /dev/null."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # the stream is closed, or a substitute without a descriptor
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    is_closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if is_closed:
        discard(stream)
    return is_closed


def discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that its buffered and its later output is discarded."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def stdout_lost_lines() -> bool:
    """Return whether lines of the log could not be written to stdout. The failure is already logged."""
    return _stdout_handler.failed


def log_traceback(error: BaseException | None) -> None:
    """Log an exception as an error with its traceback; ignore None and SystemExit."""
    if error is not None and not isinstance(error, SystemExit):
        log.error("".join(traceback.format_exception(error)).rstrip("\n"))


def log_unbuffered(text: str) -> None:
    """Log a WARNING directly to the descriptor of stderr, so that it is written even if `os._exit` follows.

    Thread-safe. Waits at most one second for the lock of the handler, whose holder may be blocked. If stderr is closed
    or its disk is full, the text is lost, because the callers are about to end the process.
    """
    erase_display()
    record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
    data = memoryview((_stderr_handler.format(record) + "\n").encode(errors="backslashreplace"))
    lock = _stderr_handler.lock
    acquired = lock.acquire(timeout=1.0) if lock else False
    try:
        with suppress(OSError):
            while data:
                data = data[os.write(_stderr_descriptor, data) :]
    finally:
        if lock and acquired:
            lock.release()


def format_utc_now() -> str:
    """Format the current time in UTC as RFC 3339 with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by strings, in nested dicts too."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _without_nan(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def drop_stderr_lines(pattern: re.Pattern[str]) -> Iterator[None]:
    """Drop the lines that are written to stderr in this block and match `pattern`; print the others at its end.

    The others are printed even after an exception. Lines of C++ libraries, which bypass `logging`, are included.
    Records of `log` are written at once, because the process may end within the block. If there is no space for a
    temporary file, all lines are printed.
    """
    global _original_stderr
    try:
        temporary = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # no disk has space
        yield
        return
    with temporary as captured:
        sys.stderr.flush()
        stderr_copy = os.dup(2)
        os.dup2(captured.fileno(), 2)
        _original_stderr = os.fdopen(stderr_copy, "w", errors="backslashreplace", closefd=False)
        try:
            yield
        finally:
            _original_stderr = None
            sys.stderr.flush()
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if not pattern.search(line):
                    print(line, file=sys.stderr)
