"""Record a run's starts, and limit the number of restarts without progress.

The `podFailurePolicy` of our Kubernetes Jobs ignores disrupted pods, and pods that end with exit code 75. Without
another limit, a run without progress would be restarted forever. Therefore failures among its restarts are counted
here, and at the limit the run ends with exit code 3. A start that ends while it waits for the rendezvous, or for an
output_dir that is in use, is not counted: starts are recorded after that (`trainer.runs.folder.open_run_folder`).
"""

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

from trainer.errors import BUG, INTERRUPTED, GaveUp, StopRequested, TrainerError, format_count
from trainer.monitoring.log import log
from trainer.storage.base import StoragePath, encode_json, request_deadline
from trainer.storage.local import write_json
from trainer.storage.small_files import CONTENT_ERRORS, read_json_or_default, require_json_objects

ATTEMPTS_FILE = "checkpoints/attempts.json"  # file of `RestartHistory`, in a run's folder
INCOMPLETE_STARTS_FILE = ".starts"  # file of `IncompleteStarts`, in a run's output_dir, next to its lock
MAX_ENTRIES = 100  # maximum number of entries in each of these files
# Stop requests that count as one failure: a spot node is often preempted, but a full disk evicts the pod at each start.
STOPS_PER_FAILURE = 10
RECORD_SECONDS = 5.0  # deadline of the bucket requests that record the end of a start
# Values of the field `kind`, which states how a start ended: after a stop request; with exit code 1 or 75, after which
# the Job restarts the pod; with another exit code, after which it does not. The field is null if the start was killed.
STOPPED, FAILED, NOT_RETRIED = "stopped", "failed", "refused"


def parse_entries(value: Any) -> list[dict[str, Any]]:
    """Return the entries of attempts.json or `.starts`; raise one of `CONTENT_ERRORS` if they are invalid."""
    return [
        {"step": int(entry["step"]), "started": str(entry["started"]), **{k: entry[k] for k in ("kind", "reason")}}
        for entry in require_json_objects(value)
    ]


def count_failures(entries: list[dict[str, Any]]) -> int:
    """Count the failures among restarts without progress.

    A start that failed or was killed counts as one failure, and so do `STOPS_PER_FAILURE` stop requests. A start after
    which the Job does not restart the pod (`NOT_RETRIED`) does not count.
    """
    num_stops = sum(entry["kind"] == STOPPED for entry in entries)
    return sum(entry["kind"] not in (STOPPED, NOT_RETRIED) for entry in entries) + num_stops // STOPS_PER_FAILURE


def require_few_failures(entries: list[dict[str, Any]], max_failures: int, outcome: str, file: object) -> None:
    """Raise GaveUp if `count_failures` of the restarts without progress is at least `max_failures`.

    Args:
        entries: the restarts without progress, oldest first. The message has the reasons of the last three that count.
        max_failures: `runtime.max_restarts_without_progress`.
        outcome: verb phrase for the message, such as "made no progress beyond step 420".
        file: path of the file with the entries, for the message.
    """
    num_failures = count_failures(entries)
    if num_failures < max_failures:
        return
    counted_entries = [entry for entry in entries if entry["kind"] != NOT_RETRIED]
    lines = [f"  {e['started']}: {e['reason'] or 'killed (out of memory or disk?)'}" for e in counted_entries[-3:]]
    stops_note = f" ({STOPS_PER_FAILURE} stop requests count as one)" if len(counted_entries) > num_failures else ""
    problem = f"{format_count(num_failures, 'restart')} in a row{stops_note} {outcome}, the last ones with:"
    fix = f"fix the cause, then delete {file} or raise this limit"
    key = "runtime.max_restarts_without_progress"
    raise GaveUp("\n".join([problem, *lines]), key=key, value=max_failures, fix=fix)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class IncompleteStarts:
    """A run's latest starts that ended before they were ready to train, oldest first, in a file in the output_dir.

    A start is added as soon as it opens the folder, so that it is counted even if it is killed. So after `add_start`,
    the last entry is this process. A start that ends with an error that a restart cannot fix is removed again. When
    this process is ready to train, all entries are removed, and `RestartHistory` records it instead. A corrupt file
    counts as empty.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.file = folder / INCOMPLETE_STARTS_FILE
        self.entries: list[dict[str, Any]] = []
        self._is_open = False  # whether the last entry is this start, and its end is not recorded
        fetched = self.file.fetch()
        with contextlib.suppress(*CONTENT_ERRORS):
            self.entries = parse_entries(json.loads(fetched[0])) if fetched else []

    def add_start(self, max_failures: int) -> None:
        """Add this start, or raise GaveUp if too many of the earlier entries, except the first one, are failures."""
        require_few_failures(self.entries[1:], max_failures, "ended before the run began or resumed", self.file)
        self.entries.append({"step": 0, "started": _now(), "kind": None, "reason": None})
        self._is_open = True
        self._write()

    def end(self, error: BaseException | None) -> None:
        """Record the error that ended this start. Remove the start if a restart cannot fix the error.

        Only the first call after `add_start` has an effect. Storage errors are ignored. `error` is None if the start
        ended without an error, as a learning-rate range test does; the start is then removed, too.
        """
        kind = FAILED
        if isinstance(error, StopRequested):
            kind = STOPPED
        elif error is None or (isinstance(error, TrainerError) and error.exit_code not in (INTERRUPTED, BUG)):
            kind = NOT_RETRIED
        if not self._is_open:
            return
        self._is_open = False
        self.entries[-1] |= {"kind": kind, "reason": str(error)}
        if kind == NOT_RETRIED:
            self.entries.pop()
        with contextlib.suppress(TrainerError, OSError), request_deadline(RECORD_SECONDS):
            self._write()

    def clear(self) -> None:
        """Remove all starts, because this start is ready to train."""
        self.entries, self._is_open = [], False
        self._write()

    def _write(self) -> None:
        if self.entries:
            # Retain the first entry, since `add_start` does not count it.
            self.file.write(encode_json(self.entries[:1] + self.entries[1:][-MAX_ENTRIES + 1 :]))
        else:
            self.file.delete()


class RestartHistory:
    """The starts of a run that were ready to train, oldest first. After `add_start`, the last entry is this process.

    An entry is {"step", "started", "kind", "reason"}: the step from which the process resumed, the time when it was
    recorded (ISO 8601, UTC), and how and why it ended. `kind` and `reason` are None while the process runs, and remain
    None if it is killed.
    """

    def __init__(self, file: Path | None, is_new: bool = False) -> None:
        """Read the entries in `file`, unless the run is new (`is_new`). A corrupt file counts as empty.

        `file` is None on workers other than the chief, where nothing is read or written.
        """
        self.file, self._has_started = file, False  # _begun: whether the last entry is this process
        self.entries: list[dict[str, Any]] = (
            read_json_or_default(file, parse_entries, default=[]) if file and not is_new else []
        )

    def require_progress(self, step: int, max_failures: int) -> None:
        """Raise GaveUp if the restarts without progress beyond `step` count as at least `max_failures` failures."""
        restarts = self.entries[1:]  # the first entry is not a restart
        num_progressed = max((n for n, entry in enumerate(restarts, 1) if step > entry["step"]), default=0)
        require_few_failures(restarts[num_progressed:], max_failures, f"made no progress beyond step {step}", self.file)

    def add_start(self, step: int, max_failures: int) -> None:
        """Add this start, which resumes from `step` (0 without a checkpoint). Raises GaveUp like `require_progress`."""
        self.require_progress(step, max_failures)
        self._has_started = True
        self.entries.append({"step": step, "started": _now(), "kind": None, "reason": None})
        self._write()

    def end(self, kind: str, reason: str) -> None:
        """Record how and why this process ended, in the first call after `add_start`. A disk error is only logged."""
        if self._has_started and self.entries[-1]["kind"] is None:
            self.entries[-1] |= {"kind": kind, "reason": reason}
            try:
                self._write()
            except OSError as error:
                log.info(f"{self.file} cannot be written ({error.strerror}): this end is not recorded")

    def record_failure(self, code: int, reason: str) -> None:
        """Record that this process ends with an exit code other than 0, for this reason."""
        self.end(FAILED if code in (INTERRUPTED, BUG) else NOT_RETRIED, reason)

    def _write(self) -> None:
        # Retain the first entry, since `require_progress` does not count it as a restart.
        entries = [*self.entries[:1], *self.entries[1:][-MAX_ENTRIES + 1 :]]
        if self.file:
            write_json(self.file, entries)
