"""Termination message of a container, with which `kubectl describe pod` shows why the process ended.

SIGKILL leaves none. With `terminationMessagePolicy: FallbackToLogsOnError` Kubernetes then shows the end of the log.
"""

from pathlib import Path

from trainer.errors import BUG, DONE, DRIFTED, GAVE_UP, INTERRUPTED, REFUSED, UNREADABLE, WRONG_INPUT
from trainer.monitoring.log import log_unbuffered

MAX_BYTES = 4096  # Kubernetes reads no more
MEANINGS = {
    DONE: "done",
    BUG: "a bug",
    WRONG_INPUT: "configuration or data is wrong",
    GAVE_UP: "gave up",
    DRIFTED: "drifted",
    REFUSED: "not promoted",
    UNREADABLE: "some images are unreadable",
    INTERRUPTED: "interrupted",
}

_path: str | None = None
_success_message = ""


def set_path(path: str | None) -> None:
    """Set the file for the message (`runtime.termination_log`); None disables it."""
    global _path
    _path = path


def set_success_message(text: str) -> None:
    """Set the default reason of `write` for exit code 0."""
    global _success_message
    _success_message = text


def write(code: int, reason: str = "") -> None:
    """Write the exit code and reason. Called right before the process exits, from any thread; logs its own failure."""
    if not _path:
        return
    text = reason or (_success_message if code == DONE else "")
    message = f"exit code {code} ({MEANINGS.get(code, 'unexpected')})" + (f": {text}" if text else "")
    try:
        Path(_path).write_bytes(truncate_message(message))
    except OSError as error:
        log_unbuffered(f"runtime.termination_log={_path}: cannot be written ({error.strerror or error})")


def truncate_message(text: str) -> bytes:
    """Encode as UTF-8, and truncate between characters to at most `MAX_BYTES`."""
    data = text.strip().encode(errors="backslashreplace")
    return data if len(data) <= MAX_BYTES else (data[: MAX_BYTES - 3].decode(errors="ignore") + "…").encode()
