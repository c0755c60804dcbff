"""Termination message of a container: `kubectl describe pod` shows why the process ended.

After SIGKILL there is none; with `terminationMessagePolicy: FallbackToLogsOnError` Kubernetes shows the end of the log.
"""

from pathlib import Path

from trainer.errors import BUG, DONE, DRIFTED, GAVE_UP, INTERRUPTED, WRONG_INPUT
from trainer.monitoring.log import last_words

LIMIT = 4096  # bytes that Kubernetes reads
MEANINGS = {
    DONE: "done",
    BUG: "a bug",
    WRONG_INPUT: "configuration or data is wrong",
    GAVE_UP: "gave up",
    DRIFTED: "drifted",
    INTERRUPTED: "interrupted",
}

_path: str | None = None
_success_message = ""


def set_path(path: str | None) -> None:
    """Set the file for the message; None: no message is written (`runtime.termination_log`)."""
    global _path
    _path = path


def set_success_message(text: str) -> None:
    """Set the message for exit code 0."""
    global _success_message
    _success_message = text


def write(code: int, reason: str = "") -> None:
    """Write the message, from any thread, right before the process exits. If this fails, only log it."""
    if not _path:
        return
    text = reason or (_success_message if code == DONE else "")
    message = f"exit code {code} ({MEANINGS.get(code, 'unexpected')})" + (f": {text}" if text else "")
    try:
        Path(_path).write_bytes(shortened(message))
    except OSError as error:
        last_words(f"runtime.termination_log={_path}: cannot be written ({error.strerror or error})")


def shortened(text: str) -> bytes:
    """Encode as UTF-8 in at most `LIMIT` bytes, cut between characters."""
    data = text.strip().encode(errors="backslashreplace")
    return data if len(data) <= LIMIT else (data[: LIMIT - 3].decode(errors="ignore") + "…").encode()
