"""Disk cache of the shards of a bucket, with a byte budget: shards are prefetched in the order of need.

A reader requires the shards that it may open next (`require` waits for them) and names those that follow. The required
shards stay until the reader requires others; the following ones are prefetched in the background, within the budget.
Shards that are needed last, or by no reader, are evicted first.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

from trainer.errors import DataError, Interrupted
from trainer.storage.base import ObjectInfo

TRANSFERS = 8  # concurrent; a large shard has several chunks in transfer
STALL_SECONDS = 5.0  # of waiting, after which it is logged

Note = Callable[[str], None]


def _lock_folder(cache_dir: Path, address: str) -> tuple[Path, IO[str]]:
    """A local folder for the shards that one process caches of an address, and the open file that locks it.

    Each process of a machine (workers, other runs) gets one of its own. The lock ends with the process; a later process
    reuses the folder.
    """
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    for number in itertools.count():
        home = cache_dir / "shards" / f"{digest}-{number}"
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / ".lock", "a")  # noqa: SIM115 - held until `close`, or the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.close()
        except OSError:  # a file system without locks
            break
    folder = home / address.rstrip("/").rpartition("/")[2]
    folder.mkdir(exist_ok=True)
    return folder, lock


class ShardCache:
    """The shards `entries` (by file name) of the folder `address`, in a local folder below `cache_dir`."""

    def __init__(
        self,
        address: str,
        entries: Mapping[str, ObjectInfo],
        cache_dir: Path,
        budget: int,
        note: Note,
        check: Callable[[], None],
        other_files: Iterable[str] = (),
    ) -> None:
        """Reuse files of the same version, and delete all others.

        Args:
            budget: bytes of disk; unfinished transfers count as the whole shard.
            note: logs waits of more than `STALL_SECONDS`.
            check: called while a reader waits; raises to cancel.
            other_files: names of other files that are not deleted.
        """
        self.address, self.entries, self.budget, self.note, self.check = address, dict(entries), budget, note, check
        self.folder, self._lock = _lock_folder(cache_dir, address)
        self._changed = threading.Condition()
        self._cached: dict[str, int] = {}  # name -> bytes; least recently required first
        self._in_transfer: dict[str, int] = {}
        # reader -> shards that it may open now, and those it needs after that; the latest call of `require` last
        self._needs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._order: dict[str, int] = {}  # name -> position in the order of need; absent if not needed
        self._failed: dict[str, Exception] = {}
        self._closed = False
        self._scan({*other_files})

    def require(self, reader: str, names: Iterable[str], then: Iterable[str] = ()) -> float:
        """Wait until these shards are on disk; they stay until the same reader requires others or releases them.

        Args:
            then: shards that it needs after them, soonest first.

        Returns:
            seconds waited.

        Raises:
            DataError: one of them was deleted or replaced in the bucket, or they exceed the budget together.
            Interrupted: the bucket does not respond.
            OSError: the disk is full.
        """
        names = tuple(dict.fromkeys(names))
        with self._changed:
            self._needs.pop(reader, None)
            self._needs[reader] = names, tuple(then)
            for name in names:
                self._failed.pop(name, None)
                if name in self._cached:
                    size = self._cached.pop(name)
                    if self._is_whole(name):
                        self._cached[name] = size  # most recently required
            self._check_budget()
            self._plan()
            return self._wait(names)

    def release(self, reader: str) -> None:
        """Drop the needs of a reader that has ended."""
        with self._changed:
            self._needs.pop(reader, None)
            self._plan()

    def close(self) -> None:
        """Begin no more transfers, and unlock the folder."""
        with self._changed:
            self._closed = True
        self._lock.close()

    @property
    def used(self) -> int:
        """Bytes on disk or in transfer."""
        return sum(self._cached.values()) + sum(self._in_transfer.values())

    def _scan(self, other_files: set[str]) -> None:
        for file in sorted(self.folder.iterdir()):
            if file.name in self.entries and self._is_whole(file.name):
                self._cached[file.name] = self.entries[file.name].size
            elif file.name not in other_files and file.name != ".versions.json":
                file.unlink(missing_ok=True)
        if self._cached:
            count = f"{len(self._cached):,} of {len(self.entries):,} shards"
            self.note(f"{self.address}: {count} are in {self.folder}, fetched before")

    def _is_whole(self, name: str) -> bool:
        """Return whether the file has the bucket's version, which is its modification time once it is complete."""
        try:
            status = (self.folder / name).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.entries[name].size, self.entries[name].version)

    def _pinned(self) -> set[str]:
        return {name for names, _ in self._needs.values() for name in names}

    def _check_budget(self) -> None:
        pinned = self._pinned()
        needed = sum(self.entries[name].size for name in pinned)
        if needed > self.budget:
            raise DataError(
                f"{self.address}: {len(pinned)} shards of {needed / 1e9:.3g} GB are needed at the same time",
                key="runtime.disk_budget_gb",
                value=f"{self.budget / 1e9:.3g}",
                fix="raise it, or lower data.shuffle_window",
            )

    def _wait(self, names: tuple[str, ...]) -> float:
        began, reported = time.monotonic(), False
        while missing := [name for name in names if name not in self._cached]:
            for name in missing:
                if name in self._failed:
                    raise self._failed[name]
            self._changed.wait(0.1)
            self.check()
            if not reported and time.monotonic() - began > STALL_SECONDS:
                reported = True
                self.note(f"waiting for {len(missing)} shards of {self.address}, the first is {missing[0]}")
        waited = time.monotonic() - began
        if reported:
            self.note(f"{self.address}: continuing after {waited:.0f} s of waiting for shards")
        return waited

    def _plan(self) -> None:
        """Merge the needs of all readers into one order: shards that they may open now, then those they need next."""
        soon = [name for names, _ in reversed(self._needs.values()) for name in names]
        soon += [name for _, then in reversed(self._needs.values()) for name in then]
        self._order = {name: position for position, name in enumerate(dict.fromkeys(soon))}
        self._begin_transfers()

    def _begin_transfers(self) -> None:
        for name, position in self._order.items():
            if self._closed or len(self._in_transfer) >= TRANSFERS:
                return
            if name in self._cached or name in self._in_transfer or name in self._failed:
                continue
            if not self._make_room(self.entries[name].size, position):
                return  # a smaller one behind it must not take its room
            self._in_transfer[name] = self.entries[name].size
            # A daemon thread, not a pool: the process must be able to exit while a bucket does not respond.
            threading.Thread(target=self._fetch, args=(name,), name=f"shard {name}", daemon=True).start()

    def _make_room(self, size: int, position: int) -> bool:
        """Evict shards needed later than `position`, latest first, until `size` bytes fit; none if they never would."""
        excess = self.used + size - self.budget
        if excess <= 0:
            return True
        pinned, never = self._pinned(), len(self._order)
        later = [n for n in self._cached if self._order.get(n, never) > position and n not in pinned]
        if sum(self._cached[name] for name in later) < excess:
            return False
        later.sort(key=lambda name: -self._order.get(name, never))  # stable: least recently required first
        for name in later:
            (self.folder / name).unlink(missing_ok=True)
            excess -= self._cached.pop(name)
            if excess <= 0:
                break
        return True

    def _fetch(self, name: str) -> None:
        info, file, failure = self.entries[name], self.folder / name, None
        try:
            info.path.download(file, expected=info)
            os.utime(file, ns=(time.time_ns(), info.version))
        except Exception as error:
            failure = error
        with self._changed:
            size = self._in_transfer.pop(name)
            if failure is None:
                self._cached[name] = size
                # The bucket responds again: retry transfers that it interrupted.
                self._failed = {n: e for n, e in self._failed.items() if not isinstance(e, Interrupted)}
            else:
                self._failed[name] = failure
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            self._begin_transfers()
            self._changed.notify_all()
