"""Record the restarts of a run, and limit those without progress.

The `podFailurePolicy` of our Kubernetes Jobs counts neither pods that end with exit code 75 nor disrupted ones, so a
run that makes no progress would be restarted forever. Such restarts are counted here. At the limit the run ends with
exit code 3. Not counted are starts that only wait: for other workers, or for a folder that is in use.
"""

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp, StopRequested, TrainerError
from trainer.monitoring.log import log
from trainer.storage.base import StoragePath, request_deadline
from trainer.storage.local import write_json
from trainer.storage.small_files import CONTENT_ERRORS, read_json_or_default, require_json_objects

ATTEMPTS = "checkpoints/attempts.json"  # in the folder of a run
UNBEGUN = ".starts"  # in the output_dir of a run, next to its lock
MAX_ENTRIES = 100  # in the file
STOPS_PER_FAILURE = 10  # a spot node is often preempted during a start, a full disk evicts the pod every time
RECORD_SECONDS = 5.0  # for the requests that record the end of a start
STOPPED, FAILED, REFUSED = "stopped", "failed", "refused"  # stop request; exit code 1 or 75; another exit code


def parse_entries(value: Any) -> list[dict[str, Any]]:
    """Validate the content of attempts.json; raise one of `CONTENT_ERRORS` for anything else."""
    return [
        {"step": int(entry["step"]), "started": str(entry["started"]), **{k: entry[k] for k in ("kind", "reason")}}
        for entry in require_json_objects(value)
    ]


def count_failures(entries: list[dict[str, Any]]) -> int:
    """Count starts without progress as failures: ten stop requests as one, refused starts not at all."""
    stops = sum(entry["kind"] == STOPPED for entry in entries)
    return sum(entry["kind"] not in (STOPPED, REFUSED) for entry in entries) + stops // STOPS_PER_FAILURE


def require_few_failures(entries: list[dict[str, Any]], max_failures: int, outcome: str, file: object) -> None:
    """Raise GaveUp, with the last reasons, if these starts without progress are at least `max_failures` failures."""
    count = count_failures(entries)
    if count < max_failures:
        return
    counted = [entry for entry in entries if entry["kind"] != REFUSED]
    lines = [f"  {e['started']}: {e['reason'] or 'killed (out of memory or disk?)'}" for e in counted[-3:]]
    stops = f" ({STOPS_PER_FAILURE} stop requests count as one)" if len(counted) > count else ""
    problem = f"{count} restarts in a row{stops} {outcome}, the last ones with:"
    fix = f"fix the cause, then delete {file} or raise this limit"
    key = "runtime.max_restarts_without_progress"
    raise GaveUp("\n".join([problem, *lines]), key=key, value=max_failures, fix=fix)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class UnbegunStarts:
    """The starts of a run that have ended before it began or resumed, in a file of its output_dir, oldest first.

    A start is added when it opens the folder, since it can be killed at any moment. It is removed when the run begins
    or resumes (then `RestartHistory` counts), or when the start is refused.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.file = folder / UNBEGUN
        self.entries: list[dict[str, Any]] = []
        content = self.file.fetch()
        with contextlib.suppress(*CONTENT_ERRORS):
            self.entries = parse_entries(json.loads(content[0])) if content else []

    def begin(self, max_failures: int) -> None:
        """Add this start. Raises GaveUp if too many before it ended without a beginning of the run."""
        require_few_failures(self.entries[1:], max_failures, "ended before the run began or resumed", self.file)
        self.entries.append({"step": 0, "started": _now(), "kind": None, "reason": None})
        self._write()

    def end(self, error: BaseException | None) -> None:
        """Record the error that ended this start, and remove the start if it was refused. Ignores storage errors."""
        kind = FAILED
        if isinstance(error, StopRequested):
            kind = STOPPED
        elif error is None or (isinstance(error, TrainerError) and error.exit_code not in (INTERRUPTED, BUG)):
            kind = REFUSED
        if not self.entries or self.entries[-1]["kind"] is not None:
            return
        self.entries[-1] |= {"kind": kind, "reason": str(error)}
        if kind == REFUSED:
            self.entries.pop()
        with contextlib.suppress(TrainerError, OSError), request_deadline(RECORD_SECONDS):
            self._write()

    def clear(self) -> None:
        """Remove all starts: the run begins or resumes."""
        self.entries = []
        self._write()

    def _write(self) -> None:
        if self.entries:
            self.file.write(json.dumps(self.entries[:1] + self.entries[1:][-MAX_ENTRIES + 1 :], indent=1) + "\n")
        else:
            self.file.delete()


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
        """Raise GaveUp if `max_failures` restarts ended without progress beyond `step`, by `count_failures`."""
        restarts = self.entries[1:]  # the first entry is not a restart
        progressed = max((n for n, entry in enumerate(restarts, 1) if step > entry["step"]), default=0)
        require_few_failures(restarts[progressed:], max_failures, f"made no progress beyond step {step}", self.file)

    def begin(self, step: int, max_failures: int) -> None:
        """Add this start, which resumes from `step`. Raises the error of `require_progress`."""
        self.require_progress(step, max_failures)
        self._begun = True
        self.entries.append({"step": step, "started": _now(), "kind": None, "reason": None})
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
