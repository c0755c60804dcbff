"""A lease on a run's folder, which fences every commit: only its holder publishes.

`.lease` in the folder names its holder. It is only ever written on the condition that nobody else has written it
since (`only_if`), so of any number of writers one succeeds. What is guaranteed, without comparing the clocks of two
machines:

- **One holder.** `take` succeeds for one of many. Another than the holder gets the lease only after it has seen, for
  `LEASE_SECONDS` by its own clock, that `.lease` is not written; the same uid (a Kubernetes Job) gets it at once.
- **A loser publishes nothing.** `commit` first writes what it is about to publish (name, content, version that it
  replaces) into `.lease`, on the condition that the lease is still ours, and only then writes the marker, on the
  condition that it still has that version. The first write is the commit. It fails for whoever lost the lease,
  however long the process was frozen between `check` and the write: no clock is involved. The next holder carries
  out a commit whose second write is missing before `take` returns, so that the second write of a holder that was
  frozen between the two comes too late as well: the marker no longer has the version it wants.
- **What is not fenced.** Files that are not markers (the shards of a checkpoint, logs) can still be written by a
  frozen process that thaws, until it calls `check`. So they must go under names that are used once
  (`checkpoints/step-00000420-<attempt>/...`), and count only when a marker names them.
"""

from __future__ import annotations

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
    """A marker that is being published; `replaces` is the version that it takes the place of (None: it is new)."""

    name: str
    content: str
    replaces: int | None


@dataclass(frozen=True)
class _State:
    """The content of `.lease`. `token` is one taking of the lease; `renewed` is for people, nothing compares it."""

    holder: str | None
    uid: str | None
    note: str
    token: str
    seconds: float
    renewed: str
    commit: _Commit | None


class Lease:
    """A lease as `take` returns it. Any thread may use it; a thread of its own renews it until `release`."""

    def __init__(self, folder: StoragePath, state: _State, version: int, taken_at: float) -> None:
        self.folder = folder
        self._state, self._version, self._renewed_at = state, version, taken_at
        self._lost: str | None = None
        self._writing, self._committing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    def check(self) -> None:
        """Raises `Interrupted` where the lease was lost, or could not be renewed for `LEASE_SECONDS`."""
        silent = time.monotonic() - self._renewed_at
        if self._lost:
            raise Interrupted(f"{self.folder}: {self._lost}; nothing more is published here by this process")
        if self._ended.is_set():
            raise Interrupted(f"{self.folder}: the lease was given back")
        if silent > self._state.seconds:
            raise Interrupted(
                f"{self.folder}: the lease could not be renewed for {silent:.0f} s, so another run may have taken it; "
                "start the same command again"
            )

    def commit(self, name: str, content: str) -> int:
        """Publish a marker (a small text file in the folder) in one atomic act; its new version.

        Raises `Interrupted`, and has published nothing, where the lease was lost. Where the storage did not answer
        the commit may have been done: the next holder sees which.
        """
        with self._committing:
            self.check()
            marker = self.folder / name
            commit = _Commit(name, content, marker.version())
            self._write(commit)  # from here on it is renewed with the commit in it, also while the next line waits
            try:
                version = marker.write(content, only_if=commit.replaces)
            except Conflict as error:
                self._lost = f"{marker} was changed by another process"
                raise Interrupted(f"{self.folder}: {self._lost}; nothing more is published here") from error
            with self._writing:  # the next renewal forgets it: a marker that is deleted later must stay deleted
                self._state = replace(self._state, commit=None)
            return version

    def release(self) -> None:
        """Give the lease back, so that the next run need not wait; no error where it was lost or nothing answers."""
        self._ended.set()
        self._thread.join()
        with self._writing:
            if self._lost is None:
                state = replace(self._state, holder=None, uid=None, renewed=_now())
                failures = (Conflict, Interrupted, DataError, OSError)  # then the next run waits it out
                with contextlib.suppress(*failures), within(self._state.seconds / 3):
                    (self.folder / NAME).write(_dump(state), only_if=self._version)
            self._lost = self._lost or "the lease was given back"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, commit: _Commit | None) -> None:
        """Renew, with a new commit or the last one. Raises `Interrupted` where the lease is another's."""
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
                    there, version = _read(file)  # a write of ours may have been done without our knowing
                    if there is None or version is None or there.token != state.token or there.holder is None:
                        self._lost = f"the lease was taken over by {_name(there)}"
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
            except Interrupted:  # lost, and noted; or no answer, and `check` counts the seconds
                pause = every / 10
            except (DataError, OSError) as error:
                self._lost = f"the lease cannot be renewed ({error})"


def take(folder: StoragePath, holder: str, uid: str | None = None, note: str = "", wait: bool = True) -> Lease:
    """The lease on a folder.

    `holder` names us to whoever is kept out (pod, host and process). The same `uid` takes over at once. From
    another holder it is taken after `LEASE_SECONDS` in which it was not renewed; where it is renewed, or `wait` is
    false, raises `ConfigError` that names the holder. Before it returns, a commit that the last holder began is done.
    """
    file, seconds = folder / NAME, LEASE_SECONDS
    watched: tuple[int | None, float] | None = None  # the version we saw first, and when
    while True:
        there, version = _read(file)
        held, free = _held_by_another(there, uid), True
        if held:
            watched = watched or (version, time.monotonic())
            if version != watched[0] or not wait:
                raise ConfigError(
                    f"{folder}: is in use by {_name(held)}{', ' + held.note if held.note else ''}; "
                    "choose another output_dir, or end that run first"
                )
            free = time.monotonic() - watched[1] > max(seconds, held.seconds)
        if free:
            commit = there.commit if there else None
            state = _State(holder, uid, note, uuid.uuid4().hex, seconds, _now(), commit)
            began = time.monotonic()
            try:
                lease = Lease(folder, state, file.write(_dump(state), only_if=version), began)
            except Conflict:
                continue
            if commit is not None:
                with contextlib.suppress(Conflict):  # it was done
                    (folder / commit.name).write(commit.content, only_if=commit.replaces)
            lease._thread.start()
            return lease
        time.sleep(seconds / 10)


def holder_of(folder: StoragePath, uid: str | None) -> str | None:
    """Who keeps `uid` out of a folder, and when it last renewed its lease; None where `uid` takes the lease at once."""
    held = _held_by_another(_read(folder / NAME)[0], uid)
    return f"{held.holder}, last renewed at {held.renewed}" if held else None


def _held_by_another(there: _State | None, uid: str | None) -> _State | None:
    free = there is None or there.holder is None or (uid is not None and there.uid == uid)
    return None if free else there


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _name(state: _State | None) -> str:
    if state is None or state.holder is None:
        return "another run"
    return state.holder + (f" (uid {state.uid})" if state.uid else "")


def _dump(state: _State) -> str:
    return json.dumps(asdict(state), indent=1, ensure_ascii=False) + "\n"


def _read(file: StoragePath) -> tuple[_State | None, int | None]:
    """The lease and its version; None and None where there is none."""
    content = file.fetch()
    if content is None:
        return None, None
    try:
        fields = json.loads(content[0])
        commit = fields.pop("commit")
        return _State(**fields, commit=_Commit(**commit) if commit else None), content[1]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: is not a lease ({error}); delete it if no run uses this folder") from error
