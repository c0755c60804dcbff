"""Why the process ended, where Kubernetes looks for it: `kubectl describe pod` shows it as the message.

Who ends by SIGKILL leaves nothing; `terminationMessagePolicy: FallbackToLogsOnError` then shows the end of the log.
"""

from __future__ import annotations

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
    """Name the file; None: nothing is left (`runtime.termination_log`)."""
    global _file
    _file = file


def outcome(text: str) -> None:
    """What is to be said of a process that ends well."""
    global _outcome
    _outcome = text


def leave(code: int, reason: str = "") -> None:
    """Write the message; from any thread, right before the end. A file that cannot be written is no reason to fail."""
    if not _file:
        return
    meaning = MEANINGS.get(code, "unexpected")
    text = reason or (_outcome if code == DONE else "")
    try:
        with open(_file, "wb") as file:
            file.write(shortened(f"exit code {code} ({meaning})" + (f": {text}" if text else "")))
    except OSError as error:
        last_words(f"runtime.termination_log={_file} cannot be written ({error.strerror or error}); it is left out")


def shortened(text: str) -> bytes:
    """UTF-8 of at most `LIMIT` bytes, cut between characters."""
    data = text.strip().encode(errors="backslashreplace")
    if len(data) <= LIMIT:
        return data
    return data[: LIMIT - 3].decode(errors="ignore").encode() + "…".encode()
