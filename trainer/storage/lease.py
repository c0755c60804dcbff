"""A lease on a run's folder, which fences every commit: only its holder publishes.

`.lease` in the folder names its holder. Every write to it is conditional on the version that was read (`only_if`), so
one of any number of writers succeeds. Guarantees, without comparing the clocks of two machines:

- **One holder.** `take` succeeds for one of many. Another process gets the lease only after it has observed, for
  `LEASE_SECONDS` by its own clock, no write to `.lease`; the same uid (a Kubernetes Job) gets it at once.
- **A process that lost the lease publishes nothing.** `commit` first writes its intent (name, content, version that it
  replaces) into `.lease`, conditional on holding the lease, and then writes the marker, conditional on that version.
  The first write is the commit. It fails if the lease was lost, however long the process was frozen between `check`
  and the write: no clock is involved. Before `take` returns, the next holder completes a commit whose second write is
  missing, so that the delayed second write of a frozen holder fails too: the marker has another version.
- **Not fenced** are files other than markers (the shards of a checkpoint, logs): a frozen process that resumes can
  write them until it calls `check`. They must have names that are used once
  (`checkpoints/step-00000420-<start>/...`), and count only when a marker names them.
"""

import contextlib
import json
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from trainer.errors import ConfigError, DataError, Interrupted
from trainer.storage.base import Conflict, StoragePath, within

LEASE_SECONDS = 30.0
NAME = ".lease"


@dataclass(frozen=True)
class _Commit:
    """A marker that is being published; `replaces` is the version that it replaces (None: it is new)."""

    name: str
    content: str
    replaces: int | None


@dataclass(frozen=True)
class _State:
    """The content of `.lease`. `token` identifies one call of `take`; `renewed` is informative only."""

    holder: str | None
    uid: str | None
    note: str
    token: str
    seconds: float
    renewed: str
    commit: _Commit | None


class Lease(contextlib.AbstractContextManager["Lease"]):
    """A lease, returned by `take`. It is thread-safe; a background thread renews it until `release`."""

    def __init__(self, folder: StoragePath, state: _State, version: int, taken_at: float) -> None:
        self.folder = folder
        self._state, self._version, self._renewed_at = state, version, taken_at
        self._lost: str | None = None
        self._writing, self._committing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    def check(self) -> None:
        """Raise `Interrupted` if the lease was lost or released, or could not be renewed for `LEASE_SECONDS`."""
        age = time.monotonic() - self._renewed_at
        if self._lost:
            raise Interrupted(f"{self.folder}: {self._lost}; this process publishes nothing more")
        if self._ended.is_set():
            raise Interrupted(f"{self.folder}: the lease was released")
        if age > self._state.seconds:
            problem = f"{self.folder}: the lease could not be renewed for {age:.0f} s; another run may hold it"
            raise Interrupted(problem, fix="start the same command again")

    def commit(self, name: str, content: str) -> int:
        """Publish a marker (a small text file in the folder) atomically and return its new version.

        Raises `Interrupted`, and publishes nothing, if the lease was lost. If the storage did not respond, the commit
        may have succeeded: the next holder completes or ignores it.
        """
        with self._committing:
            self.check()
            marker = self.folder / name
            commit = _Commit(name, content, marker.version())
            self._write(commit)  # every renewal now contains the commit, also while the next line waits
            try:
                version = marker.write(content, only_if=commit.replaces)
            except Conflict as error:
                self._lost = f"{marker} was changed by another process"
                raise Interrupted(f"{self.folder}: {self._lost}; this process publishes nothing more") from error
            with self._writing:  # not in the next renewal: a marker that is deleted later must stay deleted
                self._state = replace(self._state, commit=None)
            return version

    def release(self) -> None:
        """Release the lease, so that the next run need not wait; no error if it was lost or the storage is away."""
        self._ended.set()
        self._thread.join()
        with self._writing:
            if self._lost is None:
                state = replace(self._state, holder=None, uid=None, renewed=_now())
                failures = (Conflict, Interrupted, DataError, OSError)  # then the next run waits until it expires
                with contextlib.suppress(*failures), within(self._state.seconds / 3):
                    (self.folder / NAME).write(_dump(state), only_if=self._version)
            self._lost = self._lost or "the lease was released"

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, commit: _Commit | None) -> None:
        """Renew, with a new commit or the last one. Raises `Interrupted` if another process holds the lease."""
        file = self.folder / NAME
        with self._writing:
            if self._lost:
                raise Interrupted(f"{self.folder}: {self._lost}")
            state = replace(self._state, renewed=_now(), commit=commit or self._state.commit)
            while True:
                began = time.monotonic()
                try:
                    self._version = file.write(_dump(state), only_if=self._version)
                    break
                except Conflict as error:
                    current, version = _read(file)  # our own write may have succeeded although its response was lost
                    if current is None or version is None or current.token != state.token or current.holder is None:
                        self._lost = f"the lease was taken over by {_name(current)}"
                        raise Interrupted(f"{self.folder}: {self._lost}") from error
                    self._version = version
            self._state, self._renewed_at = state, began

    def _renew_always(self) -> None:
        every = pause = self._state.seconds / 3
        while not self._ended.wait(pause) and self._lost is None:
            pause = every
            try:
                with within(every):
                    self._write(None)
            except Interrupted:  # lost, as recorded; or no response, and `check` counts the seconds
                pause = every / 10
            except (DataError, OSError) as error:
                self._lost = f"the lease cannot be renewed ({error})"


def take(folder: StoragePath, holder: str, uid: str | None = None, note: str = "", wait: bool = True) -> Lease:
    """Take the lease on a folder, and complete a commit that the last holder began.

    Args:
        holder: names this process to others (pod, host and process).
        uid: a holder with the same uid is replaced at once; another one after `LEASE_SECONDS` without a renewal.
        wait: wait for that time; else only a free lease is taken.

    Raises:
        ConfigError: another process holds and renews the lease.
    """
    file, seconds = folder / NAME, LEASE_SECONDS
    first_seen: tuple[int | None, float] | None = None  # version and time
    while True:
        current, version = _read(file)
        other, free = _held_by_another(current, uid), True
        if other:
            first_seen = first_seen or (version, time.monotonic())
            if version != first_seen[0] or not wait:
                problem = f"is in use by {_name(other)}{', ' + other.note if other.note else ''}"
                raise ConfigError(problem, key="output_dir", value=folder, fix="give another one, or end that run")
            free = time.monotonic() - first_seen[1] > max(seconds, other.seconds)
        if free:
            commit = current.commit if current else None
            state = _State(holder, uid, note, uuid.uuid4().hex, seconds, _now(), commit)
            began = time.monotonic()
            try:
                lease = Lease(folder, state, file.write(_dump(state), only_if=version), began)
            except Conflict:
                continue
            if commit is not None:
                with contextlib.suppress(Conflict):  # it was completed
                    (folder / commit.name).write(commit.content, only_if=commit.replaces)
            lease._thread.start()
            return lease
        time.sleep(seconds / 10)


def holder_of(folder: StoragePath, uid: str | None) -> str | None:
    """The holder of a folder's lease and its last renewal; None if a process with this `uid` can take it at once."""
    other = _held_by_another(_read(folder / NAME)[0], uid)
    return f"{other.holder}, last renewed at {other.renewed}" if other else None


def _held_by_another(state: _State | None, uid: str | None) -> _State | None:
    free = state is None or state.holder is None or (uid is not None and state.uid == uid)
    return None if free else state


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _name(state: _State | None) -> str:
    if state is None or state.holder is None:
        return "another run"
    return state.holder + (f" (uid {state.uid})" if state.uid else "")


def _dump(state: _State) -> str:
    return json.dumps(asdict(state), indent=1, ensure_ascii=False) + "\n"


def _read(file: StoragePath) -> tuple[_State | None, int | None]:
    """The lease and its version; None and None if there is none."""
    content = file.fetch()
    if content is None:
        return None, None
    try:
        fields = json.loads(content[0])
        commit = fields.pop("commit")
        return _State(**fields, commit=_Commit(**commit) if commit else None), content[1]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: is not a lease ({error})", fix="delete it if no run uses this folder") from error
