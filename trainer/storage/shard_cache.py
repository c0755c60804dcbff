"""Disk cache for the shards of a dataset in a bucket, with a byte budget and prefetching.

A reader is one input pipeline. It requires the shards that it can open next, waits for them, and lists the shards that
it needs later. Required shards stay on disk until the reader requires others. Later ones are prefetched in the
background within the budget. Shards that no reader needs are evicted first, then those that are needed last.
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
from trainer.names import escape_unprintable
from trainer.storage.base import ObjectInfo, Version
from trainer.storage.local import join_inside
from trainer.storage.path import storage_path
from trainer.storage.staging import VERSIONS
from trainer.types import LogMessage

MAX_TRANSFERS = 8  # concurrent shards; a large one is transferred in several concurrent chunks
REPORT_SECONDS = 5.0  # a longer wait is logged


def _lock_folder(cache_dir: Path, address: str) -> tuple[Path, IO[str]]:
    """Lock a local folder for the shards of `address`, and return it with the open lock file.

    Each process on a machine (several workers or runs) gets its own folder. The lock ends with the process, after which
    another process can reuse the folder and its shards.
    """
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    for index in itertools.count():
        parent = cache_dir / "shards" / f"{digest}-{index}"
        parent.mkdir(parents=True, exist_ok=True)
        lock = open(parent / ".lock", "a")  # noqa: SIM115 - locked until `close` or the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.close()
        except OSError:  # the file system has no locks
            break
    folder = parent / storage_path(address).name
    folder.mkdir(exist_ok=True)
    return folder, lock


def _make_stamp(version: Version) -> int:
    """Return a modification time in ns that identifies a version: a generation is one, an ETag is hashed."""
    return version if isinstance(version, int) else int.from_bytes(hashlib.sha256(version.encode()).digest()[:7])


class ShardCache:
    """The shards of one folder in a bucket, cached in a local folder. The public methods are thread-safe."""

    def __init__(
        self,
        address: str,
        entries: Mapping[str, ObjectInfo],
        cache_dir: Path,
        budget: int,
        note: LogMessage,
        check: Callable[[], None],
        other_files: Iterable[str],
    ) -> None:
        """Reuse cached shards of the same version, and delete all other files.

        Args:
            entries: file name -> object info of each shard in the folder `address`.
            budget: maximum bytes on disk; a shard in transfer counts with its full size.
            note: logs reused shards, and waits longer than `REPORT_SECONDS`.
            check: is called while a reader waits, and raises to cancel.
            other_files: names of other files in the local folder that are not deleted.

        Raises:
            DataError: a shard name cannot be a file name.
        """
        self.address, self.entries, self.budget, self.note, self.check = address, dict(entries), budget, note, check
        self.folder, self._lock = _lock_folder(cache_dir, address)
        for name in entries:
            join_inside(self.folder, name)
        self._changed = threading.Condition()
        self._cached: dict[str, int] = {}  # name -> bytes; least recently required first
        self._in_transfer: dict[str, int] = {}  # name -> bytes of the complete shard
        # reader -> required and later shards, ordered by the last call of `require`
        self._needs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._rank: dict[str, int] = {}  # name -> rank in the order in which shards are needed
        self._failed: dict[str, Exception] = {}
        self._closed = False
        self._reuse_cached({*other_files})

    def require(self, reader: str, names: Iterable[str], then: Iterable[str] = ()) -> float:
        """Wait until these shards are on disk, and return the seconds waited.

        They stay there until the reader requires others or is released. `then` lists the shards that the reader needs
        later, soonest first.

        Raises:
            DataError: a shard was deleted or replaced in the bucket, or the required shards of all readers together
                exceed the budget.
            Interrupted: a transfer did not succeed in time.
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
                    if self._is_intact(name):
                        self._cached[name] = size  # last: the most recently required
            self._check_budget()
            self._rank_shards()
            return self._wait(names)

    def release(self, reader: str) -> None:
        """Discard the needs of a reader that has ended."""
        with self._changed:
            self._needs.pop(reader, None)
            self._rank_shards()

    def close(self) -> None:
        """Begin no more transfers and unlock the folder, without waiting for transfers in progress."""
        with self._changed:
            self._closed = True
        self._lock.close()

    @property
    def used(self) -> int:
        """Bytes on disk or in transfer."""
        return sum(self._cached.values()) + sum(self._in_transfer.values())

    def _reuse_cached(self, other_files: set[str]) -> None:
        """Register the local shards that have the bucket's version, and delete other files."""
        for file in sorted(self.folder.iterdir()):
            if file.name in self.entries and self._is_intact(file.name):
                self._cached[file.name] = self.entries[file.name].size
            elif file.name not in other_files and file.name != VERSIONS:
                file.unlink(missing_ok=True)
        if self._cached:
            count = f"{len(self._cached):,} of {len(self.entries):,} shards"
            self.note(f"{self.address}: {count} are already in {self.folder}")

    def _is_intact(self, name: str) -> bool:
        """Return whether the file is complete and has the bucket's version, stored as its modification time."""
        try:
            status = (self.folder / name).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (
            self.entries[name].size,
            _make_stamp(self.entries[name].version),
        )

    def _required(self) -> set[str]:
        return {name for names, _ in self._needs.values() for name in names}

    def _check_budget(self) -> None:
        required = self._required()
        size = sum(self.entries[name].size for name in required)
        if size > self.budget:
            problem = f"{self.address}: {len(required)} shards of {size / 1e9:.3g} GB are needed at the same time"
            budget, fix = f"{self.budget / 1e9:.3g}", "raise it, or lower data.shuffle_window"
            raise DataError(problem, key="runtime.disk_budget_gb", value=budget, fix=fix)

    def _wait(self, names: tuple[str, ...]) -> float:
        began, reported = time.monotonic(), False
        while missing := [name for name in names if name not in self._cached]:
            for name in missing:
                if name in self._failed:
                    raise self._failed[name]
            self._changed.wait(0.1)
            self.check()
            if not reported and time.monotonic() - began > REPORT_SECONDS:
                reported = True
                first = escape_unprintable(missing[0])
                self.note(f"waiting for {len(missing)} shards of {self.address}, the first is {first}")
        waited = time.monotonic() - began
        if reported:
            self.note(f"{self.address}: continuing after {waited:.0f} s of waiting for shards")
        return waited

    def _rank_shards(self) -> None:
        """Rank the shards that readers need, required ones first, and begin transfers in this order."""
        ordered = [name for names, _ in reversed(self._needs.values()) for name in names]
        ordered += [name for _, then in reversed(self._needs.values()) for name in then]
        self._rank = {name: rank for rank, name in enumerate(dict.fromkeys(ordered))}
        self._begin_transfers()

    def _begin_transfers(self) -> None:
        for name, rank in self._rank.items():
            if self._closed or len(self._in_transfer) >= MAX_TRANSFERS:
                return
            if name in self._cached or name in self._in_transfer or name in self._failed:
                continue
            if not self._evict(self.entries[name].size, rank):
                return  # a smaller shard that is needed later must not take the space
            self._in_transfer[name] = self.entries[name].size
            # A daemon thread, not a pool: the process must be able to exit while a bucket does not respond.
            threading.Thread(target=self._fetch, args=(name,), name=f"shard {name}", daemon=True).start()

    def _evict(self, size: int, rank: int) -> bool:
        """Evict shards that rank after `rank`, last first, until `size` bytes fit. Returns False if they cannot fit."""
        excess = self.used + size - self.budget
        required, unneeded = self._required(), len(self._rank)  # a shard that no reader needs ranks last
        later = [n for n in self._cached if self._rank.get(n, unneeded) > rank and n not in required]
        if sum(self._cached[name] for name in later) < excess:
            return False
        later.sort(key=lambda name: -self._rank.get(name, unneeded))  # stable: least recently required first
        for name in later:
            if excess <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess -= self._cached.pop(name)
        return True

    def _fetch(self, name: str) -> None:
        info, file, failure = self.entries[name], self.folder / name, None
        try:
            info.path.download(file, expected=info)
            os.utime(file, ns=(time.time_ns(), _make_stamp(info.version)))
        except Exception as error:
            failure = error
        with self._changed:
            size = self._in_transfer.pop(name)
            if failure is None:
                self._cached[name] = size
                # The bucket is available again: retry the transfers that timed out.
                self._failed = {n: e for n, e in self._failed.items() if not isinstance(e, Interrupted)}
            else:
                self._failed[name] = failure
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            self._begin_transfers()
            self._changed.notify_all()
