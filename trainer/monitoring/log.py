"""The log of a process: the standard `logging`, as text or with one JSON object per line.

`log` is the logger of this package: INFO goes to stdout, WARNING and above to stderr. In JSON, records of other
libraries and Python's warnings go to stderr as well; what a library prints itself is unchanged.
"""

import datetime
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from trainer.monitoring.health import health

LABELS = "logging.googleapis.com/labels"
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

log = logging.getLogger("trainer")
_stderr = os.dup(2)  # the original: descriptor 2 is redirected while TensorFlow is imported


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object with the field names of Cloud Logging, the phase and step of the run, labels,
    and the `extra={"fields": {...}}` of the record. nan and infinity become strings.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        super().__init__()
        self._labels = {LABELS: labels} if labels else {}

    def format(self, record: logging.LogRecord) -> str:
        severity = record.levelname if record.levelname in SEVERITIES else "INFO"
        entry = {"severity": severity, "time": timestamp(), "message": super().format(record).strip("\n")}
        entry |= {} if record.name == log.name else {"logger": record.name}
        step = {"step": int(health.values["step"])} if "step" in health.values else {}
        entry |= {"phase": health.phase} | step | getattr(record, "fields", {}) | self._labels
        return json.dumps(_finite(entry), ensure_ascii=False, default=str)


class _StandardStream(logging.StreamHandler[TextIO]):
    """A handler for the current object at `sys.stdout` or `sys.stderr`."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._name = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        stream: TextIO = getattr(sys, self._name)
        return stream


_out, _err = _StandardStream("stdout"), _StandardStream("stderr")
_out.addFilter(lambda record: record.levelno < logging.WARNING)
_err.setLevel(logging.WARNING)


def configure(json_lines: bool = False, **labels: str) -> None:
    """Set up `log` to write text, or JSON with these labels; a later call replaces an earlier one.

    With JSON, uncaught exceptions and Python's warnings are records too.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_out, _err]
    for handler in log.handlers:
        handler.setFormatter(JsonFormatter(labels) if json_lines else None)
    if not json_lines:
        return
    logging.getLogger().addHandler(_err)
    logging.captureWarnings(True)
    # The resource tracker of multiprocessing outlives `os._exit` and warns on our stderr of what it cleans up.
    quiet = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    sys.excepthook = lambda _kind, error, _trace: log_traceback(error)
    threading.excepthook = lambda ended: log_traceback(ended.exc_value)


def log_traceback(error: BaseException | None) -> None:
    """Log an exception, except SystemExit, as Python prints it."""
    if error is not None and not isinstance(error, SystemExit):
        log.error("".join(traceback.format_exception(error)).rstrip("\n"))


def last_words(text: str) -> None:
    """Log a WARNING right before the process ends, from any thread or signal handler, also before `os._exit`.

    It waits at most one second for the lock of the handler, whose reader may be blocked, and uses no Python stream.
    """
    record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
    data = memoryview((_err.format(record) + "\n").encode(errors="backslashreplace"))
    lock = _err.lock
    held = lock.acquire(timeout=1.0) if lock else False
    try:
        while data:
            data = data[os.write(_stderr, data) :]
    finally:
        if lock and held:
            lock.release()


def timestamp() -> str:
    """The current time as RFC 3339 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def without(chatter: re.Pattern[str]) -> Iterator[None]:
    """Drop lines on stderr that match `chatter`, also those of C++ libraries, which bypass Python's logging; all others
    reach stderr at the end of the block, also if it fails.
    """
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if not chatter.search(line):
                    print(line, file=sys.stderr)
