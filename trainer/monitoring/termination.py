"""Termination message of a container, in which `kubectl describe pod` shows why the process ended.

After SIGKILL there is none; with `terminationMessagePolicy: FallbackToLogsOnError` Kubernetes shows the end of the log.
"""

from pathlib import Path

from trainer.errors import BUG, DONE, DRIFTED, GAVE_UP, INTERRUPTED, WRONG_INPUT
from trainer.monitoring.log import log_unbuffered

MAX_BYTES = 4096  # Kubernetes reads no more
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
    """Set the file that receives the message (`runtime.termination_log`); None if no message is to be written."""
    global _path
    _path = path


def set_success_message(text: str) -> None:
    """Set the reason that `write` uses for exit code 0."""
    global _success_message
    _success_message = text


def write(code: int, reason: str = "") -> None:
    """Write the exit code and reason right before the process exits, from any thread; only log a failure to write."""
    if not _path:
        return
    text = reason or (_success_message if code == DONE else "")
    message = f"exit code {code} ({MEANINGS.get(code, 'unexpected')})" + (f": {text}" if text else "")
    try:
        Path(_path).write_bytes(truncate_message(message))
    except OSError as error:
        log_unbuffered(f"runtime.termination_log={_path}: cannot be written ({error.strerror or error})")


def truncate_message(text: str) -> bytes:
    """Encode as UTF-8, cut between characters to at most `MAX_BYTES`."""
    data = text.strip().encode(errors="backslashreplace")
    return data if len(data) <= MAX_BYTES else (data[: MAX_BYTES - 3].decode(errors="ignore") + "…").encode()
