"""Restart history of a run: a limit for restarts without progress.

After exit code 75 a Kubernetes Job restarts the pod without counting it. So restarts without progress are counted here,
and after enough of them in a row the run ends with exit code 3.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp
from trainer.storage.local import write_json

MAX_ENTRIES = 100  # in the file
STOPPED, FAILED, REFUSED = "stopped", "failed", "refused"


class RestartHistory:
    """The starts of one run; the last one is this process.

    An entry is {"step", "started", "kind", "reason"}: the step it resumed from, and how it ended. Kind and reason are
    None while it runs, and after a kill.
    """

    def __init__(self, file: Path | None) -> None:
        """`file`: None on workers other than the chief, which write nothing."""
        self.file, self._ours = file, False
        try:
            self.entries: list[dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else []
        except ValueError:  # damaged: start counting again
            self.entries = []

    def begin(self, step: int, most: int) -> None:
        """Add this start, which resumes from `step`.

        Raises:
            GaveUp: the last `most` restarts made no step of progress and were not stopped by a signal.
        """
        restarts = self.entries[1:]  # without the first start
        last = max((n for n, entry in enumerate(restarts, 1) if step > entry["step"]), default=0)
        failures = [entry for entry in restarts[last:] if entry["kind"] not in (STOPPED, REFUSED)]
        if len(failures) >= most:
            lines = [f"  {e['started']}: {e['reason'] or 'killed (out of memory?)'}" for e in failures[-3:]]
            problem = f"{len(failures)} restarts in a row made no progress beyond step {step}, the last ones with:"
            fix = f"fix the cause, then delete {self.file} or raise this limit"
            raise GaveUp("\n".join([problem, *lines]), key="runtime.max_restarts_without_progress", value=most, fix=fix)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._ours = True
        self.entries.append({"step": step, "started": now, "kind": None, "reason": None})
        self._write()

    def end(self, kind: str, reason: str) -> None:
        """Record the end of this start."""
        if self._ours and self.entries[-1]["kind"] is None:
            self.entries[-1] |= {"kind": kind, "reason": reason}
            self._write()

    def failed(self, code: int, reason: str) -> None:
        """Record an end with an exit code other than 0."""
        self.end(FAILED if code in (INTERRUPTED, BUG) else REFUSED, reason)

    def _write(self) -> None:
        # The first entry stays: it is not a restart.
        entries = [*self.entries[:1], *self.entries[1:][-MAX_ENTRIES + 1 :]]
        if self.file:
            write_json(self.file, entries)
