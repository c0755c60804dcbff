"""A lease on a folder. Only the process that holds it can commit a marker, a small file such as LATEST or DONE.

The file `.lease` in the folder names the holder. Every write to `.lease` is conditional on the version that was read
(`only_if`), so exactly one of several concurrent writers succeeds. No guarantee relies on comparing two clocks:

- **One holder.** `acquire_lease` succeeds for only one of several processes. Another process can take over an
  unreleased lease only if it has seen no write to `.lease` for `LEASE_SECONDS` by its own clock. A process with the
  same uid (the uid of the Kubernetes Job) takes over without waiting.
- **A process that lost the lease commits nothing.** `commit` first writes an intent (marker name, content, version to
  replace) into `.lease`, conditional on holding the lease, and then the marker, conditional on the version to replace.
  The first write is the commit. It fails if the lease was lost, however long the process was frozen between `check`
  and the write. If the second write is missing, `acquire_lease` completes the commit for the next holder before it
  returns. A frozen holder's delayed second write then fails too, because the marker has a different version.
- **In S3** a version is an ETag, a hash of the content, so equal contents have equal versions. Each write to `.lease`
  has new content (a token and the renewal time), and so does each `LATEST`, because it names a new checkpoint.
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
from trainer.storage.base import ConflictError, StoragePath, Version, encode_json, request_deadline
from trainer.storage.small_files import CONTENT_ERRORS, require_nonnegative
from trainer.types import LogMessage

LEASE_SECONDS = 30.0  # a lease that is not renewed for this time can be taken over; the holder renews it every 10 s
GRACE_SECONDS = 120.0  # seconds from SIGTERM to SIGKILL, terminationGracePeriodSeconds in k8s/*.yaml
LEASE_FILE = ".lease"  # name of the lease file in the folder


@dataclass(frozen=True)
class _Commit:
    """The intent to write a marker, which the next holder completes if this holder cannot."""

    name: str  # file name of the marker
    content: str
    replaces: Version | None  # version of the marker before the write; None if the marker does not exist yet


@dataclass(frozen=True)
class _State:
    """The content of `.lease`."""

    holder: str | None  # description of the process, for messages; None if the lease was released
    uid: str | None  # the Kubernetes Job's uid; processes with the same uid take over from each other without waiting
    note: str  # additional description of the holder, for messages
    token: str  # identifies the holder's `acquire_lease` call
    seconds: float  # the holder's `LEASE_SECONDS`
    renewed: str  # UTC time of the last renewal, for messages; it also makes each content, and so each ETag, unique
    commit: _Commit | None  # the last commit; None once its marker has been written or deleted


class Lease(contextlib.AbstractContextManager["Lease"]):
    """A lease that this process holds. Its methods are thread-safe.

    `acquire_lease` creates it and starts a thread that renews it until it is released or lost.
    """

    def __init__(self, folder: StoragePath, state: _State, version: Version, taken_at: float) -> None:
        self.folder = folder
        self._state, self._version, self._renewed_at = state, version, taken_at
        self._loss_reason: str | None = None  # why the lease was lost or released; None while it is held
        self._write_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew_until_released, name="lease", daemon=True)

    def check(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            Interrupted: the lease was lost or released, or could not be renewed for `LEASE_SECONDS`.
        """
        age = time.monotonic() - self._renewed_at
        if self._loss_reason:
            raise Interrupted(f"{self.folder}: {self._loss_reason}; this process publishes nothing more")
        if self._released.is_set():
            raise Interrupted(f"{self.folder}: the lease was released")
        if age > self._state.seconds:
            problem = f"{self.folder}: the lease could not be renewed for {age:.0f} s; another run may hold it"
            raise Interrupted(problem, fix="start the same command again")

    def commit(self, name: str, content: str) -> Version:
        """Write the marker `name` (a small text file in the folder) atomically and return its new version.

        Raises:
            Interrupted: the lease was lost, and nothing was committed; or no request succeeded in time, and the marker
                has been written, will be written by the next holder, or will never be written.
        """
        with self._commit_lock:
            self.check()
            marker = self.folder / name
            commit = _Commit(name, content, marker.version())
            self._write(commit)  # renewals include the commit until the marker is written
            try:
                version = marker.write(content, only_if=commit.replaces)
            except ConflictError as error:
                self._loss_reason = f"{marker} was changed by another process"
                raise Interrupted(f"{self.folder}: {self._loss_reason}; this process publishes nothing more") from error
            with self._write_lock:  # a later holder must not restore the marker after it has been deleted
                self._state = replace(self._state, commit=None)
            return version

    def delete(self, name: str) -> None:
        """Delete the marker `name` if it exists.

        Raises:
            Interrupted: the lease was lost, and nothing was deleted; or no request succeeded in time.
        """
        with self._commit_lock:
            self.check()
            marker = self.folder / name
            if marker.exists():
                with self._write_lock:
                    self._state = replace(self._state, commit=None)
                self._write(None)  # the next holder must not restore the marker
                marker.delete()

    def release(self) -> None:
        """Release the lease, so that the next process need not wait. A lost lease and storage errors are ignored."""
        self._released.set()
        self._renewal.join()
        with self._write_lock:
            if self._loss_reason is None:
                state = replace(self._state, holder=None, uid=None, renewed=_format_utc_now())
                # If this fails, the next process waits until the lease expires.
                with (
                    contextlib.suppress(ConflictError, Interrupted, DataError, OSError),
                    request_deadline(self._state.seconds / 3),
                ):
                    (self.folder / LEASE_FILE).write(_encode_state(state), only_if=self._version)
            self._loss_reason = self._loss_reason or "the lease was released"

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, commit: _Commit | None) -> None:
        """Renew the lease, with a new commit or, if `commit` is None, with the last commit.

        Raises:
            Interrupted: another process has taken over the lease, or no request succeeded in time.
        """
        file = self.folder / LEASE_FILE
        with self._write_lock:
            if self._loss_reason:
                raise Interrupted(f"{self.folder}: {self._loss_reason}")
            state = replace(self._state, renewed=_format_utc_now(), commit=commit or self._state.commit)
            while True:
                start = time.monotonic()
                try:
                    self._version = file.write(_encode_state(state), only_if=self._version)
                    break
                except ConflictError as error:
                    current, version = _read_state(file)  # our last write may have succeeded without a response
                    if current is None or version is None or current.token != state.token or current.holder is None:
                        self._loss_reason = f"the lease was taken over by {_format_holder(current)}"
                        raise Interrupted(f"{self.folder}: {self._loss_reason}") from error
                    self._version = version
            self._state, self._renewed_at = state, start

    def _renew_until_released(self) -> None:
        """Renew the lease periodically until it is released or lost. Runs in a thread."""
        interval = pause = self._state.seconds / 3
        while not self._released.wait(pause) and self._loss_reason is None:
            pause = interval
            try:
                with request_deadline(interval):
                    self._write(None)
            except Interrupted:  # the lease is lost (`_loss_reason` is set), or a timeout, which is retried soon
                pause = interval / 10
            except (DataError, OSError) as error:
                self._loss_reason = f"the lease cannot be renewed ({error})"


def choose_max_wait(uid: str | None) -> float:
    """Return how many seconds a process should wait for a folder that another process uses.

    `uid` is the uid of this process's Kubernetes Job, or None outside a Job. In a Job, the other process is probably a
    terminating pod of a deleted Job, whose grace period and then lease end soon. Outside a Job, the other process is
    probably another run by the user, which may take long, so the result is 0.
    """
    return GRACE_SECONDS + LEASE_SECONDS if uid else 0.0


def make_in_use_error(holder: str, folder: object) -> Interrupted:
    """Make the error for an output_dir that another process, described by `holder`, uses."""
    fix = "wait until that process ends and start the same command again, or give another one"
    return Interrupted(f"is in use by {holder}", key="output_dir", value=folder, fix=fix)


def acquire_lease(
    folder: StoragePath,
    holder: str,
    uid: str | None = None,
    note: str = "",
    max_wait: float = 0.0,
    log_message: LogMessage = lambda _text: None,
) -> Lease:
    """Acquire the lease on a folder, and complete the last holder's commit if it was interrupted.

    Args:
        holder: description of this process, for messages of other processes.
        uid: the Kubernetes Job's uid. A lease whose holder has the same uid is taken over without waiting.
        note: additional description of this process, for messages of other processes.
        max_wait: seconds to wait for a holder that renews the lease. A lease that has not been renewed for
            `LEASE_SECONDS` is taken over regardless of `max_wait`.
        log_message: called once if this process waits for a holder that renews the lease.

    Raises:
        Interrupted: another process still renews the lease after `max_wait` seconds, or no request succeeded in time.
        DataError: `.lease` is corrupt, or the storage denies access.
    """
    file = folder / LEASE_FILE
    lease_seconds = LEASE_SECONDS
    deadline = time.monotonic() + max_wait
    last_change: tuple[Version | None, float] | None = None  # version of `.lease`, and when this process first read it
    has_logged = False
    while True:
        current, version = _read_state(file)
        other = _get_other_holder(current, uid)
        if other:
            now = time.monotonic()
            if last_change is not None and version != last_change[0]:  # the holder renews the lease
                error = make_in_use_error(_format_holder(other) + (f", {other.note}" if other.note else ""), folder)
                if now > deadline:
                    raise error
                if not has_logged:
                    log_message(f"output_dir={folder} {error.problem}; waiting up to {max_wait:.0f} s until it ends")
                has_logged = True
            if last_change is None or version != last_change[0]:
                last_change = version, now
            if now - last_change[1] <= max(lease_seconds, other.seconds):
                time.sleep(lease_seconds / 10)
                continue
        commit = current.commit if current else None
        state = _State(holder, uid, note, uuid.uuid4().hex, lease_seconds, _format_utc_now(), commit)
        start = time.monotonic()
        try:
            lease = Lease(folder, state, file.write(_encode_state(state), only_if=version), start)
        except ConflictError:  # another process was faster
            continue
        if commit is not None:
            with contextlib.suppress(ConflictError):  # the last holder has written the marker
                (folder / commit.name).write(commit.content, only_if=commit.replaces)
        lease._renewal.start()
        return lease


def describe_holder(folder: StoragePath, uid: str | None) -> str | None:
    """Describe the holder of the lease on a folder, including the time of the last renewal.

    Return None if a process whose Kubernetes Job has this `uid` can acquire the lease without waiting.

    Raises:
        DataError: `.lease` is corrupt.
    """
    state = _get_other_holder(_read_state(folder / LEASE_FILE)[0], uid)
    return f"{state.holder}, last renewed at {re.sub(r'[.][0-9]+', '', state.renewed)}" if state else None


def _get_other_holder(state: _State | None, uid: str | None) -> _State | None:
    """Return `state` if another process holds the lease; None if a process with this `uid` can take it immediately."""
    is_free = state is None or state.holder is None or (uid is not None and state.uid == uid)
    return None if is_free else state


def _format_utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _format_holder(state: _State | None) -> str:
    if state is None or state.holder is None:
        return "another run"
    return state.holder + (f" (uid {state.uid})" if state.uid else "")


def _encode_state(state: _State) -> str:
    return encode_json(asdict(state))


def _read_state(file: StoragePath) -> tuple[_State | None, Version | None]:
    """Return the content and version of the lease file, or (None, None) if it does not exist."""
    content_and_version = file.fetch()
    if content_and_version is None:
        return None, None
    try:
        fields = json.loads(content_and_version[0])
        commit = fields.pop("commit")
        state = _State(**fields, commit=_Commit(**commit) if commit else None)
        strings = (state.holder or "", state.uid or "", state.note, state.token, state.renewed)
        if not all(isinstance(string, str) for string in strings):
            raise TypeError("a field is not a text")
        return replace(state, seconds=require_nonnegative(state.seconds)), content_and_version[1]
    except CONTENT_ERRORS as error:
        raise DataError(f"{file}: is not a lease ({error})", fix="delete it if no run uses this folder") from error
