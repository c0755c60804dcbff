"""A process's log, written through the standard `logging` as text or as one JSON object per line.

`log` is the logger of this package. INFO goes to stdout, WARNING and above to stderr. In JSON mode, Python's warnings
and the warnings and errors of other libraries are also JSON on stderr. Text that a library prints itself is unchanged.
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
from functools import partial
from typing import Any, NoReturn, TextIO

from trainer.monitoring.health import health

LABELS_FIELD = "logging.googleapis.com/labels"  # the field that Cloud Logging reads labels from
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")  # levels that Cloud Logging knows; others become INFO

log = logging.getLogger("trainer")
_stderr_descriptor = os.dup(2)  # a copy, because descriptor 2 is redirected while TensorFlow is imported
_ERASE_LINE = b"\r\x1b[2K\x1b[?25h"  # terminal codes that erase the cursor's line and show the cursor
_display_descriptor: int | None = None  # file descriptor of the terminal with the progress display; None without one


def set_display_descriptor(descriptor: int | None) -> None:
    """Set the file descriptor of the terminal with the progress display; None if there is no display."""
    global _display_descriptor
    _display_descriptor = descriptor


def erase_display(*terminals: int) -> None:
    """Erase the progress display's line and show the cursor. Any thread may call this.

    `terminals` are file descriptors; the default is the one set by `set_display_descriptor`. A terminal with paused
    output is not changed, because the write would block.
    """
    for descriptor in terminals or ([] if _display_descriptor is None else [_display_descriptor]):
        with suppress(OSError):
            if os.isatty(descriptor) and select.select([], [descriptor], [], 0)[1]:
                os.write(descriptor, _ERASE_LINE)


def exit_at_once(code: int) -> NoReturn:
    """Erase the progress display, and exit immediately (`os._exit`) with exit code `code`. Any thread may call this."""
    erase_display()
    os._exit(code)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object with Cloud Logging's field names.

    The object has the severity, time and message, the run's phase and step, the process's labels, and the fields that
    the log call passes as `extra={"fields": {...}}`. NaN and infinity become strings.
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
        return json.dumps(_replace_nan(entry), ensure_ascii=False, default=str)


_original_stderr: TextIO | None = None  # a stream to the original stderr while `drop_stderr_lines` captures it


class _StandardStreamHandler(logging.StreamHandler[TextIO]):
    """A handler that writes to the current `sys.stdout` or `sys.stderr`, which can be replaced at any time."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._name = name
        self.failed = False  # whether a write has failed with an OSError; only the first failure is logged

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return _original_stderr if _original_stderr and self._name == "stderr" else stream

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, and escape characters that the stream cannot encode, as they occur in some file names."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        """Discard the stream if its reader has exited; log a full disk once. The run continues without its log."""
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
    """Configure `log` to write text or, if `json_lines` is true, one JSON object per line.

    In JSON mode, `labels` are added to each line, and uncaught exceptions, Python's warnings, and the warnings and
    errors of other libraries also become JSON lines.
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
    warning_filters = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, warning_filters))
    sys.excepthook = lambda _kind, error, _trace: log_traceback(error)
    threading.excepthook = lambda hook_args: log_traceback(hook_args.exc_value)


def discard_if_closed(stream: TextIO) -> bool:
    """Redirect a stream to /dev/null if it is a pipe whose reader has exited; return whether it is."""
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
    """Redirect a stream to /dev/null, so that buffered and later output is discarded."""
    null_descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_descriptor, stream.fileno())
    os.close(null_descriptor)


def stdout_lost_lines() -> bool:
    """Return whether writing log lines to stdout has failed. The first failure has already been logged."""
    return _stdout_handler.failed


def log_traceback(error: BaseException | None) -> None:
    """Log an exception as an error with its traceback; ignore None and SystemExit."""
    if error is not None and not isinstance(error, SystemExit):
        log.error("".join(traceback.format_exception(error)).rstrip("\n"))


def log_unbuffered(text: str) -> None:
    """Log a WARNING directly to stderr's file descriptor, so that it is written even if `os._exit` follows.

    Thread-safe. Waits at most one second for the handler's lock, whose holder may be blocked. If stderr is closed or
    its disk is full, the text is lost without an error, because the callers are about to end the process.
    """
    erase_display()
    record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
    remaining = memoryview((_stderr_handler.format(record) + "\n").encode(errors="backslashreplace"))
    lock = _stderr_handler.lock
    acquired = lock.acquire(timeout=1.0) if lock else False
    try:
        with suppress(OSError):
            while remaining:
                remaining = remaining[os.write(_stderr_descriptor, remaining) :]
    finally:
        if lock and acquired:
            lock.release()


def format_utc_now() -> str:
    """Format the current time in UTC as RFC 3339 with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _replace_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with strings, including those in nested dictionaries."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _replace_nan(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def drop_stderr_lines(pattern: re.Pattern[str]) -> Iterator[None]:
    """Capture stderr in this block; at the end of the block, print the captured lines that do not match `pattern`.

    The lines are printed even after an exception. Output of C++ libraries, which bypass `logging`, is captured too.
    Records of `log` are not captured but written immediately, because the process may end within the block. If no
    temporary file can be created, nothing is captured.
    """
    global _original_stderr
    try:
        capture_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # such as a full disk
        yield
        return
    with capture_file as captured:
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


_LITERT_LINES = re.compile(r"^fully_quantize: \d|^INFO: Created TensorFlow Lite XNNPACK delegate")
# Context manager that drops the stderr lines that every conversion for LiteRT and every new interpreter prints.
suppress_litert_output = partial(drop_stderr_lines, _LITERT_LINES)
