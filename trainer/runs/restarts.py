"""Restart history of a run, which limits restarts without progress.

The `podFailurePolicy` of our Kubernetes Jobs does not count pods that end with exit code 75, so a run that makes no
progress would be restarted forever. Such restarts are counted here; at the limit the run ends with exit code 3.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp
from trainer.storage.local import write_json

MAX_ENTRIES = 100  # in the file
STOPPED, FAILED, REFUSED = "stopped", "failed", "refused"  # stop request; exit code 1 or 75; another exit code


class RestartHistory:
    """The starts of one run, oldest first; after `begin`, the last one is this process.

    An entry is {"step", "started", "kind", "reason"}: the step that the process resumed from, its time, and how it
    ended. Kind and reason are None while it runs, and remain None if it is killed.
    """

    def __init__(self, file: Path | None) -> None:
        """`file`: read if it exists; None on workers other than the chief, which do not write."""
        self.file, self._begun = file, False  # _begun: the last entry is this process
        try:
            self.entries: list[dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else []
        except ValueError:  # damaged: start counting again
            self.entries = []

    def begin(self, step: int, max_failures: int) -> None:
        """Add this start, which resumes from `step`.

        Raises GaveUp if `max_failures` restarts failed or were killed since `step` was first resumed from. Restarts
        that a stop request or an error of the user ended are not counted.
        """
        restarts = self.entries[1:]  # the first entry is not a restart
        progressed = max((n for n, entry in enumerate(restarts, 1) if step > entry["step"]), default=0)
        failures = [entry for entry in restarts[progressed:] if entry["kind"] not in (STOPPED, REFUSED)]
        if len(failures) >= max_failures:
            lines = [f"  {e['started']}: {e['reason'] or 'killed (out of memory?)'}" for e in failures[-3:]]
            problem = f"{len(failures)} restarts in a row made no progress beyond step {step}, the last ones with:"
            fix = f"fix the cause, then delete {self.file} or raise this limit"
            key = "runtime.max_restarts_without_progress"
            raise GaveUp("\n".join([problem, *lines]), key=key, value=max_failures, fix=fix)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._begun = True
        self.entries.append({"step": step, "started": now, "kind": None, "reason": None})
        self._write()

    def end(self, kind: str, reason: str) -> None:
        """Record how this process ended; later calls change nothing."""
        if self._begun and self.entries[-1]["kind"] is None:
            self.entries[-1] |= {"kind": kind, "reason": reason}
            self._write()

    def record_failure(self, code: int, reason: str) -> None:
        """Record that this process ends with an exit code other than 0."""
        self.end(FAILED if code in (INTERRUPTED, BUG) else REFUSED, reason)

    def _write(self) -> None:
        # The first entry is retained, since `begin` does not count it as a restart.
        entries = [*self.entries[:1], *self.entries[1:][-MAX_ENTRIES + 1 :]]
        if self.file:
            write_json(self.file, entries)
