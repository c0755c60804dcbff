"""The log of a process: the standard `logging`, as text or with one JSON object per line.

`log` is the logger of this package: INFO goes to stdout, WARNING and above to stderr. In JSON what other libraries log
and Python's warnings go to stderr as well; what a library prints itself stays as it is.
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
_stderr = os.dup(2)  # as it was when the process began: while TensorFlow is imported, 2 is something else


class JsonFormatter(logging.Formatter):
    """One JSON object per record, with the field names of Cloud Logging, the phase and step of the run, these labels,
    and what the record has under `extra={"fields": {...}}`. nan and infinity become text: JSON has neither.
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
    """A handler for the current `sys.stdout` or `sys.stderr`, whichever object that is now."""

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
    """Set up `log` to write text, or JSON with these labels. The last call counts.

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
    # A helper process of multiprocessing outlives `os._exit` and warns of what it then cleans up, on our stderr.
    quiet = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    sys.excepthook = lambda _kind, error, _trace: log_traceback(error)
    threading.excepthook = _log_thread_traceback


def log_traceback(error: BaseException) -> None:
    """Log an exception as Python prints it."""
    log.error("".join(traceback.format_exception(error)).rstrip("\n"))


def _log_thread_traceback(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        log_traceback(ended.exc_value)


def last_words(text: str) -> None:
    """Log a WARNING right before the process ends, from any thread or signal handler, also before `os._exit`.

    It does not wait for ever for the lock of a handler whose reader hangs, and needs no stream of Python.
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
    """Now, as RFC 3339 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def without(chatter: re.Pattern[str]) -> Iterator[None]:
    """Leave out the lines on stderr in which `chatter` is found, those of libraries in C++ too, which no logger of
    Python sees; all others reach stderr afterwards, also where the block fails.
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
