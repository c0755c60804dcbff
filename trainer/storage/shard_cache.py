"""Disk cache for the shards of a dataset in a bucket, with a byte budget and prefetching.

A reader is one input pipeline. By `require` it waits for the shards that it can open next (the required shards), and
lists the shards that it needs later. Required shards stay on disk until the reader requires others. Later shards are
prefetched in the background within the budget. Shards that no reader needs are evicted first, then those that are
needed last.
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

MAX_TRANSFERS = 8  # shards in transfer at the same time; a large shard is transferred in several concurrent chunks
REPORT_SECONDS = 5.0  # a wait for shards that takes longer is logged


def _lock_folder(cache_dir: Path, address: str) -> tuple[Path, IO[str]]:
    """Create or reuse a local folder for the shards of `address`, lock it, and return it with the open lock file.

    Each process on a machine (several workers or runs) gets its own folder. The lock ends with the process. Then
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
        except OSError:  # the file system does not support locks
            break
    folder = parent / storage_path(address).name
    folder.mkdir(exist_ok=True)
    return folder, lock


def _make_mtime_ns(version: Version) -> int:
    """Return a modification time in ns that identifies a version: a generation itself, or a hash of an ETag."""
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
        """Reuse shards of the same version in a local folder below `cache_dir`, and delete its other files.

        Args:
            address: folder of the shards in a bucket.
            entries: object info of each shard, by file name.
            budget: maximum bytes on disk. A shard in transfer counts with its full size.
            note: logs the number of reused shards, and waits that take longer than `REPORT_SECONDS`.
            check: called while a reader waits; can raise to cancel.
            other_files: names of files in the local folder that are not shards and are not deleted.

        Raises:
            DataError: a shard name cannot be a file name.
        """
        self.address, self.entries, self.budget, self.note, self.check = address, dict(entries), budget, note, check
        self.folder, self._lock = _lock_folder(cache_dir, address)
        for name in entries:
            join_inside(self.folder, name)
        self._changed = threading.Condition()
        self._cached: dict[str, int] = {}  # name -> bytes of each shard on disk; least recently required first
        self._in_transfer: dict[str, int] = {}  # name -> bytes of the complete shard
        # reader -> names of required and of later shards; the reader that called `require` last comes last
        self._needs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._rank: dict[str, int] = {}  # name -> rank in the order in which shards are needed, from 0
        self._errors: dict[str, Exception] = {}  # name -> error of the last transfer
        self._closed = False
        self._reuse_cached({*other_files})

    def require(self, reader: str, names: Iterable[str], then: Iterable[str] = ()) -> float:
        """Wait until shards are on disk, and return the seconds waited.

        The shards stay on disk until the reader requires others or is released.

        Args:
            reader: name of the input pipeline that reads the shards.
            names: file names of the shards to wait for.
            then: file names of the shards that the reader needs later, soonest first. They are prefetched.

        Raises:
            DataError: a shard was deleted or replaced in the bucket, or the required shards of all readers together
                exceed the budget.
            Interrupted: a transfer did not succeed in time.
            OSError: a shard cannot be written, for example because the disk is full.
        """
        names = tuple(dict.fromkeys(names))
        with self._changed:
            self._needs.pop(reader, None)
            self._needs[reader] = names, tuple(then)
            for name in names:
                self._errors.pop(name, None)
                if name in self._cached:
                    size = self._cached.pop(name)
                    if self._is_intact(name):
                        self._cached[name] = size  # inserted last, as the most recently required
            self._check_budget()
            self._rank_shards()
            return self._wait(names)

    def release(self, reader: str) -> None:
        """Discard the needs of a reader that has ended."""
        with self._changed:
            self._needs.pop(reader, None)
            self._rank_shards()

    def close(self) -> None:
        """Start no more transfers, and unlock the folder without waiting for transfers in progress."""
        with self._changed:
            self._closed = True
        self._lock.close()

    @property
    def used(self) -> int:
        """Bytes of all shards on disk or in transfer."""
        return sum(self._cached.values()) + sum(self._in_transfer.values())

    def _reuse_cached(self, other_files: set[str]) -> None:
        """Register the local shards that have the bucket's version. Delete all other files except `other_files`."""
        for file in sorted(self.folder.iterdir()):
            if file.name in self.entries and self._is_intact(file.name):
                self._cached[file.name] = self.entries[file.name].size
            elif file.name not in other_files and file.name != VERSIONS:
                file.unlink(missing_ok=True)
        if self._cached:
            count = f"{len(self._cached):,} of {len(self.entries):,} shards"
            self.note(f"{self.address}: {count} are already in {self.folder}")

    def _is_intact(self, name: str) -> bool:
        """Return whether the local file is complete and its modification time identifies the bucket's version."""
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (
            self.entries[name].size,
            _make_mtime_ns(self.entries[name].version),
        )

    def _get_required_names(self) -> set[str]:
        """Return the names of the shards that any reader requires now."""
        return {name for names, _ in self._needs.values() for name in names}

    def _check_budget(self) -> None:
        """Raise a DataError if the required shards of all readers exceed the budget."""
        required = self._get_required_names()
        size = sum(self.entries[name].size for name in required)
        if size > self.budget:
            problem = f"{self.address}: {len(required)} shards of {size / 1e9:.3g} GB are needed at the same time"
            budget, fix = f"{self.budget / 1e9:.3g}", "raise it, or lower data.shuffle_window"
            raise DataError(problem, key="runtime.disk_budget_gb", value=budget, fix=fix)

    def _wait(self, names: tuple[str, ...]) -> float:
        """Wait until shards are on disk, and return the seconds waited. Raise the error of a failed transfer."""
        start, has_logged = time.monotonic(), False
        while missing := [name for name in names if name not in self._cached]:
            for name in missing:
                if name in self._errors:
                    raise self._errors[name]
            self._changed.wait(0.1)
            self.check()
            if not has_logged and time.monotonic() - start > REPORT_SECONDS:
                has_logged = True
                first = escape_unprintable(missing[0])
                self.note(f"waiting for {len(missing)} shards of {self.address}, the first is {first}")
        seconds = time.monotonic() - start
        if has_logged:
            self.note(f"{self.address}: continuing after {seconds:.0f} s of waiting for shards")
        return seconds

    def _rank_shards(self) -> None:
        """Rank the shards that readers need, required shards first, and start transfers in this order."""
        ordered_names = [name for required, _ in reversed(self._needs.values()) for name in required]
        ordered_names += [name for _, later in reversed(self._needs.values()) for name in later]
        self._rank = {name: rank for rank, name in enumerate(dict.fromkeys(ordered_names))}
        self._begin_transfers()

    def _begin_transfers(self) -> None:
        """Start the transfers of the shards of lowest rank for which there are threads and space."""
        for name, rank in self._rank.items():
            if self._closed or len(self._in_transfer) >= MAX_TRANSFERS:
                return
            if name in self._cached or name in self._in_transfer or name in self._errors:
                continue
            if not self._evict(self.entries[name].size, rank):
                return  # a smaller shard that is needed later must not take the space
            self._in_transfer[name] = self.entries[name].size
            # A daemon thread, not a pool: the process must be able to exit while a bucket does not respond.
            threading.Thread(target=self._transfer, args=(name,), name=f"shard {name}", daemon=True).start()

    def _evict(self, size: int, rank: int) -> bool:
        """Evict shards that rank after `rank`, last first, until a shard of `size` bytes fits.

        Return False, and evict nothing, if it cannot fit.
        """
        excess = self.used + size - self.budget
        required, unneeded_rank = self._get_required_names(), len(self._rank)  # a shard that no reader needs ranks last
        evictable = [
            name for name in self._cached if self._rank.get(name, unneeded_rank) > rank and name not in required
        ]
        if sum(self._cached[name] for name in evictable) < excess:
            return False
        evictable.sort(key=lambda name: -self._rank.get(name, unneeded_rank))  # stable: least recently required first
        for name in evictable:
            if excess <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess -= self._cached.pop(name)
        return True

    def _transfer(self, name: str) -> None:
        """Transfer one shard in this thread, then start the next transfers and wake up the readers that wait."""
        info, file, transfer_error = self.entries[name], self.folder / name, None
        try:
            info.path.download(file, expected=info)
            os.utime(file, ns=(time.time_ns(), _make_mtime_ns(info.version)))
        except Exception as error:
            transfer_error = error
        with self._changed:
            size = self._in_transfer.pop(name)
            if transfer_error is None:
                self._cached[name] = size
                # The bucket is available again, so that the transfers that timed out are retried.
                self._errors = {shard: e for shard, e in self._errors.items() if not isinstance(e, Interrupted)}
            else:
                self._errors[name] = transfer_error
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            self._begin_transfers()
            self._changed.notify_all()
