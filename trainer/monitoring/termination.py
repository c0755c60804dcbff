"""Write a container's termination message, in which `kubectl describe pod` shows why the process has ended.

A process that is killed with SIGKILL writes no message. With `terminationMessagePolicy: FallbackToLogsOnError`,
Kubernetes then shows the end of the log.
"""

from pathlib import Path

from trainer.errors import BUG, DONE, DRIFTED, GAVE_UP, INTERRUPTED, NOT_PROMOTED, UNREADABLE, WRONG_INPUT
from trainer.monitoring.log import log_unbuffered

MAX_BYTES = 4096  # length of the longest message that Kubernetes reads
MEANINGS = {  # exit code of `trainer.errors` -> its meaning in the message
    DONE: "done",
    BUG: "a bug",
    WRONG_INPUT: "configuration or data is wrong",
    GAVE_UP: "gave up",
    DRIFTED: "drifted",
    NOT_PROMOTED: "not promoted",
    UNREADABLE: "some images are unreadable",
    INTERRUPTED: "interrupted",
}

_path: str | None = None
_success_message = ""


def set_path(path: str | None) -> None:
    """Set the path of the message file (`runtime.termination_log`); None disables the message."""
    global _path
    _path = path


def set_success_message(text: str) -> None:
    """Set the text that `write` adds to exit code 0 if its caller passes no reason."""
    global _success_message
    _success_message = text


def write(code: int, reason: str = "") -> None:
    """Write the exit code and the reason to the file that `set_path` has set, if any. Log a failure to write.

    Called right before the process exits, from any thread.
    """
    if not _path:
        return
    explanation = reason or (_success_message if code == DONE else "")
    message = f"exit code {code} ({MEANINGS.get(code, 'unexpected')})" + (f": {explanation}" if explanation else "")
    try:
        Path(_path).write_bytes(truncate_message(message))
    except OSError as error:
        log_unbuffered(f"runtime.termination_log={_path}: cannot be written ({error.strerror or error})")


def truncate_message(text: str) -> bytes:
    """Encode a text as UTF-8. If it has more than `MAX_BYTES` bytes, truncate it at a character and add an ellipsis."""
    encoded = text.strip().encode(errors="backslashreplace")
    return encoded if len(encoded) <= MAX_BYTES else (encoded[: MAX_BYTES - 3].decode(errors="ignore") + "…").encode()
