"""Libraries in C++ talk on stderr past every logger of Python."""

from __future__ import annotations

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
from typing import Any, Literal

from trainer.monitoring.health import health

Severity = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LABELS = "logging.googleapis.com/labels"

_stdout = 1
_stderr = os.dup(2)  # as it was when the process began: while TensorFlow is imported, 2 is something else
_labels: dict[str, str] = {}
_writing = threading.Lock()
_json = False


def say(text: str, severity: Severity = "INFO", **facts: Any) -> None:
    """Tell of something, on stderr from WARNING on; in JSON `facts` are fields of their own.

    Progress is told before a slow thing begins, so that a start that hangs can be told from one that works.
    """
    stderr = severity not in ("DEBUG", "INFO")
    if _json:
        _write(_stderr if stderr else _stdout, _line(text, severity, facts))
    else:
        print(text, file=sys.stderr if stderr else sys.stdout, flush=True)


def say_traceback(error: BaseException) -> None:
    """A bug, as Python prints it."""
    say("".join(traceback.format_exception(error)).rstrip("\n"), "ERROR")


def last_words(text: str) -> None:
    """Say why, from any thread, also right before `os._exit`."""
    data = _line(text, "WARNING", {}) if _json else text + "\n"
    _write(_stderr, data)


def as_json(**labels: str) -> None:
    """From here on every line that Python writes is a JSON object with these labels: prints, warnings, tracebacks,
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
    threading.excepthook = _of_thread


def is_json() -> bool:
    """Whether lines are JSON objects."""
    return _json


def _of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        say_traceback(ended.exc_value)


def _line(text: str, severity: str, facts: dict[str, Any]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    where = {"phase": health.phase} | {k: int(v) for k, v in health.values.items() if k == "step"}
    entry = {"severity": severity, "time": now, "message": text.strip("\n")} | where | facts
    if _labels:
        entry[LABELS] = _labels
    return json.dumps(_finite(entry), ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity."""
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
    """Stands for stdout or stderr: each line becomes an object."""

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
            self._tell(line)
        return len(text)

    def end(self) -> None:
        """The process ends: what has no end of line is told too."""
        rest, self._rest = self._rest, ""
        self._tell(rest)

    def _tell(self, line: str) -> None:
        if line := line.rpartition("\r")[2].rstrip():
            _write(self._file, _line(line, self._severity, {}))


class _Handler(logging.Handler):
    """What libraries log, and Python's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        severity = record.levelname if record.levelname in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "INFO"
        _write(_stderr, _line(self.format(record), severity, {"logger": record.name}))


# ---------------------------------------------------------------------------------------------------------------
# Libraries in C++ talk on stderr past every logger of Python


@contextmanager
def without(chatter: re.Pattern[str]) -> Iterator[None]:
    """Leave out the lines in which `chatter` is found; all others reach stderr afterwards, also where it fails."""
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
