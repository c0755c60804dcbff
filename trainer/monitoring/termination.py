"""The termination message of a container: `kubectl describe pod` shows why the process ended.

A process that SIGKILL ends leaves none; `terminationMessagePolicy: FallbackToLogsOnError` then shows the log's end.
"""

from pathlib import Path

from trainer.errors import BUG, DONE, GAVE_UP, INTERRUPTED, WRONG_INPUT
from trainer.monitoring.log import last_words

LIMIT = 4096  # bytes that Kubernetes reads
MEANINGS = {
    DONE: "done",
    BUG: "a bug",
    WRONG_INPUT: "configuration or data is wrong",
    GAVE_UP: "gave up",
    INTERRUPTED: "interrupted",
}

_file: str | None = None
_outcome = ""


def leave_in(file: str | None) -> None:
    """Set the file that gets the message; None: no message is written (`runtime.termination_log`)."""
    global _file
    _file = file


def outcome(text: str) -> None:
    """Set the message of a process that ends with exit code 0."""
    global _outcome
    _outcome = text


def leave(code: int, reason: str = "") -> None:
    """Write the message, from any thread, right before the end. A file that cannot be written is no reason to fail."""
    if not _file:
        return
    text = reason or (_outcome if code == DONE else "")
    message = f"exit code {code} ({MEANINGS.get(code, 'unexpected')})" + (f": {text}" if text else "")
    try:
        Path(_file).write_bytes(shortened(message))
    except OSError as error:
        last_words(f"runtime.termination_log={_file} cannot be written ({error.strerror or error}); it is left out")


def shortened(text: str) -> bytes:
    """UTF-8 of at most `LIMIT` bytes, cut between characters."""
    data = text.strip().encode(errors="backslashreplace")
    if len(data) <= LIMIT:
        return data
    return data[: LIMIT - 3].decode(errors="ignore").encode() + "…".encode()
