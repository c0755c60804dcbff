"""Disk cache for the shards of a dataset in a bucket, with a byte budget and prefetching.

A reader is one input pipeline. It calls `require` to wait for the shards that it can open next (the required shards),
and to list the shards that it needs later. Required shards stay on disk until the reader requires other shards. Later
shards are prefetched in the background, within the budget. Shards that no reader needs are evicted first, then the
shards that are needed last.
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

from trainer.errors import DataError, Interrupted, format_count
from trainer.names import escape_unprintable
from trainer.storage.base import ObjectInfo, Version
from trainer.storage.local import safe_join
from trainer.storage.path import storage_path
from trainer.storage.staging import VERSIONS
from trainer.types import LogMessage

MAX_TRANSFERS = 8  # shards in transfer at the same time; a large shard is transferred in several concurrent chunks
REPORT_SECONDS = 5.0  # a wait for shards that takes longer is logged


def _lock_folder(cache_dir: Path, address: str) -> tuple[Path, IO[str]]:
    """Create or reuse a local folder for the shards of `address`, lock it, and return it with the open lock file.

    Each process on a machine (several workers or runs) gets a separate folder. When the process ends, the lock is
    released, and another process can reuse the folder and its shards.
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
    """Return a modification time in ns that identifies a version: the generation itself, or a hash of the ETag."""
    return version if isinstance(version, int) else int.from_bytes(hashlib.sha256(version.encode()).digest()[:7])


class ShardCache:
    """The shards of one folder in a bucket, cached in a local folder. The public methods are thread-safe."""

    def __init__(
        self,
        address: str,
        infos: Mapping[str, ObjectInfo],
        cache_dir: Path,
        budget: int,
        log_message: LogMessage,
        check_cancelled: Callable[[], None],
        other_files: Iterable[str],
    ) -> None:
        """Choose a local folder below `cache_dir`, reuse the shards in it that are current, and delete other files.

        Args:
            address: folder of the shards in a bucket.
            infos: object info of each shard, by file name.
            budget: maximum size of the shards on disk, in bytes. A shard in transfer counts with its full size.
            log_message: logs the number of reused shards, and waits that take longer than `REPORT_SECONDS`.
            check_cancelled: called while a reader waits; may raise an error to cancel.
            other_files: names of files in the local folder that are not shards and must not be deleted.

        Raises:
            DataError: a shard's name is not a valid file name.
        """
        self.address, self.infos, self.budget, self.log_message, self.check_cancelled = (
            address,
            dict(infos),
            budget,
            log_message,
            check_cancelled,
        )
        self.folder, self._lock = _lock_folder(cache_dir, address)
        for name in infos:
            safe_join(self.folder, name)
        self._changed = threading.Condition()
        self._cached: dict[str, int] = {}  # name -> bytes of each shard on disk; least recently required first
        self._in_transfer: dict[str, int] = {}  # name -> bytes of the complete shard
        # reader -> names of its required and its later shards; the most recent caller of `require` comes last
        self._needs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._rank: dict[str, int] = {}  # name -> rank in the order in which shards are needed, from 0
        self._errors: dict[str, Exception] = {}  # name -> error of the last transfer, if it failed
        self._closed = False
        self._reuse_cached({*other_files})

    def require(self, reader: str, names: Iterable[str], later_names: Iterable[str] = ()) -> float:
        """Wait until shards are on disk, and return the waiting time in seconds.

        The shards stay on disk until the reader requires other shards or is released.

        Args:
            reader: name of the input pipeline that reads the shards.
            names: file names of the shards to wait for.
            later_names: file names of the shards that the reader needs later, soonest first. They are prefetched.

        Raises:
            DataError: a shard was deleted or replaced in the bucket, or all readers' required shards together exceed
                the budget.
            Interrupted: a transfer did not succeed in time.
            OSError: a shard cannot be written, for example because the disk is full.
        """
        names = tuple(dict.fromkeys(names))
        with self._changed:
            self._needs.pop(reader, None)
            self._needs[reader] = names, tuple(later_names)
            for name in names:
                self._errors.pop(name, None)
                if name in self._cached:
                    size = self._cached.pop(name)
                    if self._is_intact(name):
                        self._cached[name] = size  # inserted last, as the most recently required shard
            self._check_budget()
            self._rank_shards()
            return self._wait(names)

    def release(self, reader: str) -> None:
        """Discard the needs of a reader, which has ended."""
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
        """Total size of the shards on disk and in transfer, in bytes."""
        return sum(self._cached.values()) + sum(self._in_transfer.values())

    def _reuse_cached(self, other_files: set[str]) -> None:
        """Register the local shards that have the bucket's version. Delete all other files but not `other_files`."""
        for file in sorted(self.folder.iterdir()):
            if file.name in self.infos and self._is_intact(file.name):
                self._cached[file.name] = self.infos[file.name].size
            elif file.name not in other_files and file.name != VERSIONS:
                file.unlink(missing_ok=True)
        if self._cached:
            reused_shards = f"{len(self._cached):,} of {len(self.infos):,} shards"
            self.log_message(f"{self.address}: {reused_shards} are already in {self.folder}")

    def _is_intact(self, name: str) -> bool:
        """Return whether the local file is complete and its modification time identifies the bucket's version."""
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (
            self.infos[name].size,
            _make_mtime_ns(self.infos[name].version),
        )

    def _get_required_names(self) -> set[str]:
        """Return the names of the shards that at least one reader currently requires."""
        return {name for names, _ in self._needs.values() for name in names}

    def _check_budget(self) -> None:
        """Raise a DataError if all readers' required shards together exceed the budget."""
        required_names = self._get_required_names()
        size = sum(self.infos[name].size for name in required_names)
        if size > self.budget:
            problem = f"{self.address}: {len(required_names)} shards of {size / 1e9:.3g} GB are needed at the same time"
            budget_gb, fix = f"{self.budget / 1e9:.3g}", "raise it, or lower data.shuffle_window"
            raise DataError(problem, key="runtime.disk_budget_gb", value=budget_gb, fix=fix)

    def _wait(self, names: tuple[str, ...]) -> float:
        """Wait until shards are on disk, and return the waiting time in seconds. Raise a failed transfer's error."""
        start = time.monotonic()
        has_logged = False
        while missing_names := [name for name in names if name not in self._cached]:
            for name in missing_names:
                if name in self._errors:
                    raise self._errors[name]
            self._changed.wait(0.1)
            self.check_cancelled()
            if not has_logged and time.monotonic() - start > REPORT_SECONDS:
                has_logged = True
                first_name = escape_unprintable(missing_names[0])
                shards = format_count(len(missing_names), "shard")
                self.log_message(f"waiting for {shards} of {self.address}, the first is {first_name}")
        seconds = time.monotonic() - start
        if has_logged:
            self.log_message(f"{self.address}: continuing after {seconds:.0f} s of waiting for shards")
        return seconds

    def _rank_shards(self) -> None:
        """Rank the shards that readers need, required shards before later shards, and start transfers in this order."""
        ordered_names = [name for required_names, _ in reversed(self._needs.values()) for name in required_names]
        ordered_names += [name for _, later_names in reversed(self._needs.values()) for name in later_names]
        self._rank = {name: rank for rank, name in enumerate(dict.fromkeys(ordered_names))}
        self._begin_transfers()

    def _begin_transfers(self) -> None:
        """Start transfers in the order of rank while there are free threads and there is space."""
        for name, rank in self._rank.items():
            if self._closed or len(self._in_transfer) >= MAX_TRANSFERS:
                return
            if name in self._cached or name in self._in_transfer or name in self._errors:
                continue
            if not self._evict(self.infos[name].size, rank):
                return  # a smaller shard that is needed later must not use the space
            self._in_transfer[name] = self.infos[name].size
            # A daemon thread, not a pool: the process must be able to exit while a bucket does not respond.
            threading.Thread(target=self._transfer, args=(name,), name=f"shard {name}", daemon=True).start()

    def _evict(self, size: int, rank: int) -> bool:
        """Evict shards that rank after `rank`, the last one first, until a shard of `size` bytes fits. Return True.

        If it cannot fit, evict nothing and return False.
        """
        excess_bytes = self.used + size - self.budget
        required_names, unneeded_rank = self._get_required_names(), len(self._rank)  # shards without a reader rank last
        evictable_names = [
            name for name in self._cached if self._rank.get(name, unneeded_rank) > rank and name not in required_names
        ]
        if sum(self._cached[name] for name in evictable_names) < excess_bytes:
            return False
        # The sort is stable: of shards with equal rank, the least recently required one remains first.
        evictable_names.sort(key=lambda name: -self._rank.get(name, unneeded_rank))
        for name in evictable_names:
            if excess_bytes <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess_bytes -= self._cached.pop(name)
        return True

    def _transfer(self, name: str) -> None:
        """Transfer one shard in the calling thread, then start the next transfers and wake up waiting readers."""
        info = self.infos[name]
        file = self.folder / name
        transfer_error = None
        try:
            info.path.download(file, expected=info)
            os.utime(file, ns=(time.time_ns(), _make_mtime_ns(info.version)))
        except Exception as error:
            transfer_error = error
        with self._changed:
            size = self._in_transfer.pop(name)
            if transfer_error is None:
                self._cached[name] = size
                # The bucket is available again, so the transfers that timed out are retried.
                self._errors = {shard: e for shard, e in self._errors.items() if not isinstance(e, Interrupted)}
            else:
                self._errors[name] = transfer_error
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            self._begin_transfers()
            self._changed.notify_all()
