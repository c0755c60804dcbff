"""Restart history of a run, stored beside its checkpoints: a run that makes no progress must not retry for ever.

Exit code 75 asks for another start, and a Kubernetes Job grants it for free. Starts that make no progress are counted
here, and after enough of them in a row the run gives up with exit code 3.
"""

import datetime
import json
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp
from trainer.storage.local import write_json

MAX_ENTRIES = 100  # attempts in the file
STOPPED, FAILED, REFUSED = "stopped", "failed", "refused"


class RestartHistory:
    """The attempts of one run, the last one being this process.

    One entry is {"step", "started", "kind", "reason"}: the step it resumed from, and how it ended. Kind and reason are
    None as long as it runs, and remain so where it was killed.
    """

    def __init__(self, file: Path | None) -> None:
        """`file`: None on a worker that is not the chief, which writes nothing."""
        self.file, self._ours = file, False
        try:
            self.entries: list[dict[str, Any]] = json.loads(file.read_text()) if file and file.exists() else []
        except ValueError:  # damaged: counting begins anew
            self.entries = []

    def begin(self, step: int, most_fruitless: int) -> None:
        """Add this attempt, which resumes from `step`.

        Raises:
            GaveUp: the last `most_fruitless` restarts ended without a signal and without a step of progress.
        """
        fruitless = self._fruitless(step)
        if len(fruitless) >= most_fruitless:
            killed = "ended without a word (killed; out of memory?)"
            reasons = "\n".join(f"  {e['started']}: {e['reason'] or killed}" for e in fruitless[-3:])
            raise GaveUp(
                f"{len(fruitless)} restarts in a row made no step of progress beyond step {step}; mend the cause, then "
                f"delete {self.file} or raise runtime.max_restarts_without_progress. The last ones ended so:\n{reasons}"
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._ours = True
        self.entries.append({"step": step, "started": now, "kind": None, "reason": None})
        self._write()

    def _fruitless(self, step: int) -> list[dict[str, Any]]:
        """Restarts since the last progress that count, oldest first."""
        restarts = self.entries[1:]  # the first entry is a start, not a restart
        last = max((n for n, entry in enumerate(restarts, 1) if step > entry["step"]), default=0)
        return [entry for entry in restarts[last:] if entry["kind"] not in (STOPPED, REFUSED)]

    def end(self, kind: str, reason: str) -> None:
        """Record how this attempt ends."""
        if self._ours and self.entries[-1]["kind"] is None:
            self.entries[-1] |= {"kind": kind, "reason": reason}
            self._write()

    def failed(self, code: int, reason: str) -> None:
        """Record with which exit code, and why, this attempt ends."""
        self.end(FAILED if code in (INTERRUPTED, BUG) else REFUSED, reason)

    def _write(self) -> None:
        # The first entry of all stays first: it is the one start that is no restart.
        entries = [*self.entries[:1], *self.entries[1:][-MAX_ENTRIES + 1 :]]
        if self.file:
            write_json(self.file, entries)
