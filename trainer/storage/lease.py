"""A lease on a run's folder. Only its holder can commit a marker, a small file such as LATEST or DONE.

The file `.lease` in the folder names the holder. Every write to it is conditional on the version that was read
(`only_if`), so exactly one of several concurrent writers succeeds. No guarantee compares the clocks of two machines:

- **One holder.** `acquire_lease` succeeds for one of several processes. Another process can take over an unreleased
  lease only if it has seen no write to `.lease` for `LEASE_SECONDS` by its own clock. A process with the same uid
  (that of the Kubernetes Job) takes over without waiting.
- **A process that lost the lease commits nothing.** `commit` first writes its intent (name, content, replaced version)
  into `.lease`, conditional on holding the lease, and then the marker, conditional on the replaced version. The first
  write is the commit. It fails if the lease was lost, however long the process was frozen between `check` and the
  write. If the second write is missing, `acquire_lease` completes the commit for the next holder before it returns. The
  delayed second write of a frozen holder then fails too, because the marker has another version.
- **In S3** a version is an ETag, a hash of the content, so equal content has an equal version. Every write to `.lease`
  has other content (a token and the time of the renewal), and so has `LATEST` as long as it names a new checkpoint.
- **Other files are not protected** (checkpoint files, logs). A frozen process that continues can write them until it
  calls `check`. Their names must be used only once (`checkpoints/step-00000420-<token>/...`), and they count only if a
  marker names them.
"""

import contextlib
import json
import re
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from trainer.errors import DataError, Interrupted
from trainer.storage.base import Conflict, StoragePath, Version, request_deadline
from trainer.storage.small_files import CONTENT_ERRORS, require_nonnegative
from trainer.types import LogMessage

LEASE_SECONDS = 30.0
GRACE_SECONDS = 120.0  # terminationGracePeriodSeconds of the manifests
NAME = ".lease"


@dataclass(frozen=True)
class _Commit:
    """The intent to write a marker. `replaces` is the version that it replaces, None if it does not exist yet."""

    name: str
    content: str
    replaces: Version | None


@dataclass(frozen=True)
class _State:
    """The content of `.lease`."""

    holder: str | None  # describes the process for messages; None if the lease was released
    uid: str | None  # processes with the same uid take over from each other without waiting
    note: str  # more about the holder, for messages
    token: str  # identifies the `acquire_lease` call that wrote this
    seconds: float  # `LEASE_SECONDS` of the holder
    renewed: str  # time of the last renewal, for messages; it also makes each write differ, and with it its ETag in S3
    commit: _Commit | None  # the last commit, unless its marker is known to be written


class Lease(contextlib.AbstractContextManager["Lease"]):
    """A lease that this process holds, made by `acquire_lease`. Thread-safe. A thread renews it until `release`."""

    def __init__(self, folder: StoragePath, state: _State, version: Version, taken_at: float) -> None:
        self.folder = folder
        self._state, self._version, self._renewed_at = state, version, taken_at
        self._lost: str | None = None  # why the lease was lost
        self._write_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def check(self) -> None:
        """Raise `Interrupted` if the lease was lost or released, or could not be renewed for `LEASE_SECONDS`."""
        age = time.monotonic() - self._renewed_at
        if self._lost:
            raise Interrupted(f"{self.folder}: {self._lost}; this process publishes nothing more")
        if self._released.is_set():
            raise Interrupted(f"{self.folder}: the lease was released")
        if age > self._state.seconds:
            problem = f"{self.folder}: the lease could not be renewed for {age:.0f} s; another run may hold it"
            raise Interrupted(problem, fix="start the same command again")

    def commit(self, name: str, content: str) -> Version:
        """Write a marker (a small text file in the folder) atomically and return its new version.

        Raises Interrupted if the lease was lost; then nothing was committed. Also raises it if no request succeeded in
        time; then the marker has been written, will be written by the next holder, or will never be written.
        """
        with self._commit_lock:
            self.check()
            marker = self.folder / name
            commit = _Commit(name, content, marker.version())
            self._write(commit)  # renewals include the commit until the marker is written
            try:
                version = marker.write(content, only_if=commit.replaces)
            except Conflict as error:
                self._lost = f"{marker} was changed by another process"
                raise Interrupted(f"{self.folder}: {self._lost}; this process publishes nothing more") from error
            with self._write_lock:  # the next holder must not restore a marker that is deleted later
                self._state = replace(self._state, commit=None)
            return version

    def delete(self, name: str) -> None:
        """Delete a marker if it exists. Raises Interrupted if the lease was lost; then nothing was deleted."""
        with self._commit_lock:
            self.check()
            marker = self.folder / name
            if marker.exists():
                with self._write_lock:
                    self._state = replace(self._state, commit=None)
                self._write(None)  # the next holder must not restore the marker
                marker.delete()

    def release(self) -> None:
        """Release the lease, so that the next run need not wait. Ignores a lost lease and storage errors."""
        self._released.set()
        self._renewal.join()
        with self._write_lock:
            if self._lost is None:
                state = replace(self._state, holder=None, uid=None, renewed=_now())
                # After an error the next run waits until the lease expires.
                with (
                    contextlib.suppress(Conflict, Interrupted, DataError, OSError),
                    request_deadline(self._state.seconds / 3),
                ):
                    (self.folder / NAME).write(_dump(state), only_if=self._version)
            self._lost = self._lost or "the lease was released"

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, commit: _Commit | None) -> None:
        """Renew the lease, with a new commit or the last one. Raises `Interrupted` if another process holds it."""
        file = self.folder / NAME
        with self._write_lock:
            if self._lost:
                raise Interrupted(f"{self.folder}: {self._lost}")
            state = replace(self._state, renewed=_now(), commit=commit or self._state.commit)
            while True:
                began = time.monotonic()
                try:
                    self._version = file.write(_dump(state), only_if=self._version)
                    break
                except Conflict as error:
                    current, version = _read(file)  # our last write may have succeeded although its response was lost
                    if current is None or version is None or current.token != state.token or current.holder is None:
                        self._lost = f"the lease was taken over by {_describe(current)}"
                        raise Interrupted(f"{self.folder}: {self._lost}") from error
                    self._version = version
            self._state, self._renewed_at = state, began

    def _renew_until_released(self) -> None:
        interval = pause = self._state.seconds / 3
        while not self._released.wait(pause) and self._lost is None:
            pause = interval
            try:
                with request_deadline(interval):
                    self._write(None)
            except Interrupted:  # lost, which `_write` records, or a timeout: `check` fails after `LEASE_SECONDS`
                pause = interval / 10
            except (DataError, OSError) as error:
                self._lost = f"the lease cannot be renewed ({error})"


def plan_patience(uid: str | None) -> float:
    """Choose for how many seconds a process waits for a folder that another one uses.

    In a pod of a Kubernetes Job (with this uid) that is probably the pod of a deleted Job, which still saves: its grace
    period, and then its lease, end. Elsewhere it is another run of the user.
    """
    return GRACE_SECONDS + LEASE_SECONDS if uid else 0.0


def in_use_error(holder: str, folder: object) -> Interrupted:
    """Make the error for a folder that another process still uses. The same command can succeed later."""
    fix = "wait until that process ends and start the same command again, or give another one"
    return Interrupted(f"is in use by {holder}", key="output_dir", value=folder, fix=fix)


def acquire_lease(
    folder: StoragePath,
    holder: str,
    uid: str | None = None,
    note: str = "",
    patience: float = 0.0,
    log_message: LogMessage = lambda _text: None,
) -> Lease:
    """Acquire the lease on a folder, and complete a commit that the last holder began.

    Args:
        holder: describes this process in messages of others.
        uid: take over from a holder with the same uid without waiting.
        note: more about this process, for messages of others.
        patience: seconds to wait for a holder that renews the lease. One that does not renew it for `LEASE_SECONDS`
            has lost it to this process in any case.
        log_message: is called once if another process renews the lease and is waited for.

    Raises Interrupted if another process holds the lease and still renews it after `patience`.
    """
    file, seconds, deadline = folder / NAME, LEASE_SECONDS, time.monotonic() + patience
    last_change: tuple[Version | None, float] | None = None  # version of `.lease`, and when this process first read it
    waits = False
    while True:
        current, version = _read(file)
        other = _other_holder(current, uid)
        if other:
            now = time.monotonic()
            if last_change is not None and version != last_change[0]:  # it is renewed
                error = in_use_error(_describe(other) + (f", {other.note}" if other.note else ""), folder)
                if now > deadline:
                    raise error
                if not waits:
                    log_message(f"output_dir={folder} {error.problem}; waiting up to {patience:.0f} s until it ends")
                waits = True
            if last_change is None or version != last_change[0]:
                last_change = version, now
            if now - last_change[1] <= max(seconds, other.seconds):
                time.sleep(seconds / 10)
                continue
        commit = current.commit if current else None
        state = _State(holder, uid, note, uuid.uuid4().hex, seconds, _now(), commit)
        began = time.monotonic()
        try:
            lease = Lease(folder, state, file.write(_dump(state), only_if=version), began)
        except Conflict:
            continue
        if commit is not None:
            with contextlib.suppress(Conflict):  # the marker was written
                (folder / commit.name).write(commit.content, only_if=commit.replaces)
        lease._renewal.start()
        return lease


def describe_holder(folder: StoragePath, uid: str | None) -> str | None:
    """Describe the holder of a folder's lease; None if a process with this `uid` can take it without waiting."""
    other = _other_holder(_read(folder / NAME)[0], uid)
    return f"{other.holder}, last renewed at {re.sub(r'[.][0-9]+', '', other.renewed)}" if other else None


def _other_holder(state: _State | None, uid: str | None) -> _State | None:
    is_free = state is None or state.holder is None or (uid is not None and state.uid == uid)
    return None if is_free else state


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _describe(state: _State | None) -> str:
    if state is None or state.holder is None:
        return "another run"
    return state.holder + (f" (uid {state.uid})" if state.uid else "")


def _dump(state: _State) -> str:
    return json.dumps(asdict(state), indent=1, ensure_ascii=False) + "\n"


def _read(file: StoragePath) -> tuple[_State | None, Version | None]:
    """Read `.lease` and its version; None and None if it does not exist."""
    content = file.fetch()
    if content is None:
        return None, None
    try:
        fields = json.loads(content[0])
        commit = fields.pop("commit")
        state = _State(**fields, commit=_Commit(**commit) if commit else None)
        texts = (state.holder or "", state.uid or "", state.note, state.token, state.renewed)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a field is not a text")
        return replace(state, seconds=require_nonnegative(state.seconds)), content[1]
    except CONTENT_ERRORS as error:
        raise DataError(f"{file}: is not a lease ({error})", fix="delete it if no run uses this folder") from error
