"""The log of a process, through the standard `logging`, as text or as one JSON object per line.

`log` is the logger of this package. INFO goes to stdout, WARNING and above to stderr. In JSON mode, Python's warnings
and the warnings and errors of other libraries also become JSON on stderr. What a library prints itself is unchanged.
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

LABELS_FIELD = "logging.googleapis.com/labels"
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

log = logging.getLogger("trainer")
_stderr = os.dup(2)  # the original: descriptor 2 is redirected while TensorFlow is imported
_ERASE = b"\r\x1b[2K\x1b[?25h"  # erases the line of the cursor, and shows the cursor
_display: int | None = None  # descriptor of the terminal on which a progress display is drawn


def set_display(descriptor: int | None) -> None:
    """Set the terminal on which a progress display is drawn and hides the cursor; None if there is none."""
    global _display
    _display = descriptor


def erase_display(*terminals: int) -> None:
    """Erase the line of the progress display and show the cursor, on these terminals or on that of `set_display`.

    Any thread may call this; a terminal whose output is paused is left as it is.
    """
    for descriptor in terminals or ([] if _display is None else [_display]):
        with suppress(OSError):
            if os.isatty(descriptor) and select.select([], [descriptor], [], 0)[1]:
                os.write(descriptor, _ERASE)


def exit_at_once(code: int) -> NoReturn:
    """End the process at once, from any thread, and leave no progress display on the terminal."""
    erase_display()
    os._exit(code)


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object with the field names of Cloud Logging.

    The object has the phase and step of the run, the labels, and the `extra={"fields": {...}}` of the record. NaN and
    infinity become strings.
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


_uncaptured: TextIO | None = None  # stderr, while `drop_stderr_lines` has redirected its descriptor


class _StandardStream(logging.StreamHandler[TextIO]):
    """A handler that writes to the current value of `sys.stdout` or `sys.stderr`."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._name = name
        self.failed = False  # a record could not be written, which has been logged

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return _uncaptured if _uncaptured and self._name == "stderr" else stream

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, and escape what the stream cannot encode, such as surrogate escapes in file names."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return super().format(record).encode(encoding, "backslashreplace").decode(encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        """Discard the stream if its reader has ended, and log a full disk once: the run does not depend on its log."""
        error = sys.exception()
        if discard_if_closed(self.stream):
            return
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            log_unbuffered(f"{self._name}: cannot be written to ({error.strerror or error}); lines of the log are lost")


_out, _err = _StandardStream("stdout"), _StandardStream("stderr")
_out.addFilter(lambda record: record.levelno < logging.WARNING)
_err.setLevel(logging.WARNING)


def configure(json_lines: bool = False, **labels: str) -> None:
    """Set up `log` for text or JSON. The labels are in JSON only, as are uncaught exceptions and Python's warnings."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_out, _err]
    for handler in log.handlers:
        handler.setFormatter(JsonFormatter(labels) if json_lines else None)
    if not json_lines:
        return
    logging.getLogger().addHandler(_err)
    logging.captureWarnings(True)
    # The resource tracker of multiprocessing outlives `os._exit`, and its warnings would not be JSON.
    filters = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
    sys.excepthook = lambda _kind, error, _trace: log_traceback(error)
    threading.excepthook = lambda ended: log_traceback(ended.exc_value)


def discard_if_closed(stream: TextIO) -> bool:
    """Redirect a stream to /dev/null if it is a pipe without a reader, and return whether it is."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a substitute without a descriptor, or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        discard(stream)
    return closed


def discard(stream: TextIO) -> None:
    """Discard what is written to a stream from now on, and what it has buffered."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def stdout_lost_lines() -> bool:
    """Return whether lines of the log could not be written to stdout, which has been logged."""
    return _out.failed


def log_traceback(error: BaseException | None) -> None:
    """Log an exception with its traceback; ignore None and SystemExit."""
    if error is not None and not isinstance(error, SystemExit):
        log.error("".join(traceback.format_exception(error)).rstrip("\n"))


def log_unbuffered(text: str) -> None:
    """Log a WARNING directly to the file descriptor of stderr, so that it is written even before `os._exit`.

    The function is thread-safe. It waits at most one second for the handler's lock, whose holder might be blocked. If
    stderr is closed or its disk is full, the text is lost, since the callers are about to end the process.
    """
    erase_display()
    record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
    data = memoryview((_err.format(record) + "\n").encode(errors="backslashreplace"))
    lock = _err.lock
    acquired = lock.acquire(timeout=1.0) if lock else False
    try:
        with suppress(OSError):
            while data:
                data = data[os.write(_stderr, data) :]
    finally:
        if lock and acquired:
            lock.release()


def format_utc_now() -> str:
    """Format the current time as RFC 3339 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, with strings, in nested dicts too."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _without_nan(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def drop_stderr_lines(pattern: re.Pattern[str]) -> Iterator[None]:
    """Drop the stderr lines that match `pattern`, including those of C++ libraries, which bypass `logging`.

    The other lines are printed at the end of the block, also after an exception; records of the log are written at
    once, since the process may end within the block. Without space for a temporary file, all lines are printed.
    """
    global _uncaptured
    try:
        temporary = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # no disk has space
        yield
        return
    with temporary as captured:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        _uncaptured = os.fdopen(stderr, "w", errors="backslashreplace", closefd=False)
        try:
            yield
        finally:
            _uncaptured = None
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if not pattern.search(line):
                    print(line, file=sys.stderr)
