"""The log of a process, as text or with one JSON object a line.

Prints, warnings, tracebacks and what libraries log become JSON as well. Our own lines do not go through `logging`:
Hydra configures it anew and disables loggers, a sweep silences it, and the last line of a process must not wait for the
lock of a handler.
"""

import atexit
import datetime
import io
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
from typing import Any, Literal, get_args

from trainer.monitoring.health import health

Severity = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LABELS = "logging.googleapis.com/labels"

_stdout = 1
_stderr = os.dup(2)  # as it was when the process began: while TensorFlow is imported, 2 is something else
_labels: dict[str, str] = {}
_writing = threading.Lock()
_json = False


def say(text: str, severity: Severity = "INFO", **facts: Any) -> None:
    """Log a text, on stderr from WARNING on; in JSON `facts` are fields of their own.

    Call it before a slow thing begins, so that a start that hangs can be told from one that works.
    """
    stderr = severity not in ("DEBUG", "INFO")
    if _json:
        _write(_stderr if stderr else _stdout, _line(text, severity, facts))
    else:
        print(text, file=sys.stderr if stderr else sys.stdout, flush=True)


def say_traceback(error: BaseException) -> None:
    """Log an exception as Python prints it."""
    say("".join(traceback.format_exception(error)).rstrip("\n"), "ERROR")


def last_words(text: str) -> None:
    """Log why the process ends, from any thread or signal handler, also right before `os._exit`."""
    _write(_stderr, _line(text, "WARNING", {}) if _json else text + "\n")


def as_json(**labels: str) -> None:
    """Make every line that Python writes a JSON object with these labels, from here on: prints, warnings, tracebacks,
    what libraries log. What TensorFlow's C++ code writes to the file descriptor stays as it is.
    """
    global _json
    _labels.update(labels)
    if _json:
        return
    _json = True
    streams: Any = _Lines(_stdout, "INFO"), _Lines(_stderr, "WARNING")
    sys.stdout, sys.stderr = streams
    for stream in streams:
        atexit.register(stream.end)
    logging.getLogger().addHandler(_Handler())
    logging.captureWarnings(True)
    # A helper process of multiprocessing outlives `os._exit` and warns of what it then cleans up, on our stderr.
    quiet = (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    sys.excepthook = lambda _kind, error, _trace: say_traceback(error)
    threading.excepthook = _say_thread_traceback


def _say_thread_traceback(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        say_traceback(ended.exc_value)


def timestamp() -> str:
    """Now, as RFC 3339 in UTC with milliseconds: 2026-01-31T12:00:00.000Z."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _line(text: str, severity: str, facts: dict[str, Any]) -> str:
    step = {"step": int(health.values["step"])} if "step" in health.values else {}
    labels = {LABELS: _labels} if _labels else {}
    entry = {"severity": severity, "time": timestamp(), "message": text.strip("\n"), "phase": health.phase}
    return json.dumps(_finite(entry | step | facts | labels), ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """The value with nan and infinity as text: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def _write(file: int, text: str) -> None:
    data = memoryview(text.encode(errors="backslashreplace"))
    held = _writing.acquire(timeout=1.0)  # not for ever: the last words of a process must not wait for a stuck reader
    try:
        while data:
            data = data[os.write(file, data) :]
    finally:
        if held:
            _writing.release()


class _Lines(io.TextIOBase):
    """The standard output or error stream: each line that is printed becomes an object."""

    encoding = "utf-8"

    def __init__(self, file: int, severity: Severity) -> None:
        self._file, self._severity, self._rest = file, severity, ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest.rpartition("\r")[2]  # a progress bar draws over itself: its last state counts
        for line in whole:
            self._log(line)
        return len(text)

    def end(self) -> None:
        """Log what has no end of line, when the process ends."""
        rest, self._rest = self._rest, ""
        self._log(rest)

    def _log(self, line: str) -> None:
        if line := line.rpartition("\r")[2].rstrip():
            _write(self._file, _line(line, self._severity, {}))


class _Handler(logging.Handler):
    """The handler of what libraries log, and of Python's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        severity = record.levelname if record.levelname in get_args(Severity) else "INFO"
        _write(_stderr, _line(self.format(record), severity, {"logger": record.name}))


@contextmanager
def without(chatter: re.Pattern[str]) -> Iterator[None]:
    """Leave out the lines on stderr in which `chatter` is found, those of libraries in C++ too, which no logger of
    Python sees; all others reach stderr afterwards, also where the block fails.
    """
    with tempfile.TemporaryFile() as heard:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            heard.seek(0)
            for line in heard.read().decode(errors="replace").splitlines():
                if not chatter.search(line):
                    print(line, file=sys.stderr)
