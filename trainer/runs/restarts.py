"""Record the restarts of a run, and limit those without progress.

The `podFailurePolicy` of our Kubernetes Jobs does not count pods that end with exit code 75, so a run that makes no
progress would be restarted forever. Such restarts are counted here. At the limit the run ends with exit code 3.
"""

import datetime
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp
from trainer.monitoring.log import log
from trainer.storage.local import write_json
from trainer.storage.small_files import read_json_or_default, require_json_objects

ATTEMPTS = "checkpoints/attempts.json"  # in the folder of a run
MAX_ENTRIES = 100  # in the file
STOPPED, FAILED, REFUSED = "stopped", "failed", "refused"  # stop request; exit code 1 or 75; another exit code


def parse_entries(value: Any) -> list[dict[str, Any]]:
    """Validate the content of attempts.json; raise one of `CONTENT_ERRORS` for anything else."""
    return [
        {"step": int(entry["step"]), "started": str(entry["started"]), **{k: entry[k] for k in ("kind", "reason")}}
        for entry in require_json_objects(value)
    ]


class RestartHistory:
    """The starts of one run, oldest first. After `begin`, the last entry is this process.

    An entry is {"step", "started", "kind", "reason"}: the step from which the process resumed, the time of its start,
    and how it ended. Kind and reason are None while it runs, and remain None if it is killed.
    """

    def __init__(self, file: Path | None, is_new: bool = False) -> None:
        """Read `file` (None on workers other than the chief) unless the run `is_new`; corrupt counts as empty."""
        self.file, self._begun = file, False  # _begun: the last entry is this process
        self.entries: list[dict[str, Any]] = (
            read_json_or_default(file, parse_entries, []) if file and not is_new else []
        )

    def require_progress(self, step: int, max_failures: int) -> None:
        """Raise GaveUp if `max_failures` restarts failed or were killed without progress beyond `step`.

        Restarts that ended with a stop request or an error of the user are not counted.
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

    def begin(self, step: int, max_failures: int) -> None:
        """Add this start, which resumes from `step`. Raises the error of `require_progress`."""
        self.require_progress(step, max_failures)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._begun = True
        self.entries.append({"step": step, "started": now, "kind": None, "reason": None})
        self._write()

    def end(self, kind: str, reason: str) -> None:
        """Record how this process ended; later calls change nothing. A disk error is only logged."""
        if self._begun and self.entries[-1]["kind"] is None:
            self.entries[-1] |= {"kind": kind, "reason": reason}
            try:
                self._write()
            except OSError as error:
                log.info(f"{self.file} cannot be written ({error.strerror}): this end is not recorded")

    def record_failure(self, code: int, reason: str) -> None:
        """Record that this process ends with an exit code other than 0."""
        self.end(FAILED if code in (INTERRUPTED, BUG) else REFUSED, reason)

    def _write(self) -> None:
        # Retain the first entry, since `require_progress` does not count it as a restart.
        entries = [*self.entries[:1], *self.entries[1:][-MAX_ENTRIES + 1 :]]
        if self.file:
            write_json(self.file, entries)
