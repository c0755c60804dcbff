"""Shards of a bucket on a bounded part of the local disk: fetched ahead of their readers, in the order of need.

A reader says which shards it may open next (`require`, which waits until they are here) and which ones come after
those. The first stay until the reader asks for others; the rest is fetched behind its back as far as the budget goes.
What gives way is what is needed latest, or by nobody.
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

TRANSFERS = 8  # shards at once; a large one comes in several chunks at a time
STALL_SECONDS = 5.0  # of waiting, after which it is reported

Note = Callable[[str], None]


def _lock_folder(cache_dir: Path, address: str) -> tuple[Path, IO[str]]:
    """A local folder for the shards that one process caches of an address, and the open file that locks it.

    Several processes of one machine (workers, other runs) get one each: nobody deletes what another one reads. The lock
    ends with the process, and the next process to start finds the folder again.
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
        beside: Iterable[str] = (),
    ) -> None:
        """Takes what is there in the same version, and deletes what is not of these shards.

        Args:
            budget: bytes of disk; unfinished transfers count as the whole shard.
            note: given reports of waits of more than `STALL_SECONDS`.
            check: called while a reader waits; raises to leave.
            beside: names of other files that stay.
        """
        self.address, self.entries, self.budget, self.note, self.check = address, dict(entries), budget, note, check
        self.folder, self._lock = _lock_folder(cache_dir, address)
        self._changed = threading.Condition()
        self._here: dict[str, int] = {}  # name -> bytes; the one required longest ago comes first
        self._coming: dict[str, int] = {}
        # reader -> what it may open now, and what it needs after that; the last to ask comes last
        self._needs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._order: dict[str, int] = {}  # name -> position in the order of need; absent where nobody needs it
        self._failed: dict[str, Exception] = {}
        self._closed = False
        self._take_stock({*beside})

    def require(self, reader: str, names: Iterable[str], then: Iterable[str] = ()) -> float:
        """Wait until these shards are here; they stay until the same reader requires others or releases them.

        Args:
            then: what it needs after them, soonest first.

        Returns:
            seconds waited.

        Raises:
            DataError: one of them is gone or changed in the bucket, or they do not fit the budget together.
            Interrupted: the bucket does not answer.
            OSError: the disk cannot hold them though the budget could.
        """
        names = tuple(dict.fromkeys(names))
        with self._changed:
            self._needs.pop(reader, None)
            self._needs[reader] = names, tuple(then)
            for name in names:
                self._failed.pop(name, None)
                if name in self._here:
                    size = self._here.pop(name)
                    if self._is_whole(name):
                        self._here[name] = size  # last in line now
            self._check_budget()
            self._plan()
            return self._wait(names)

    def release(self, reader: str) -> None:
        """The reader has ended."""
        with self._changed:
            self._needs.pop(reader, None)
            self._plan()

    def close(self) -> None:
        """Begin no more transfers, and let another process have the folder."""
        with self._changed:
            self._closed = True
        self._lock.close()

    @property
    def used(self) -> int:
        """Bytes that are here or on their way."""
        return sum(self._here.values()) + sum(self._coming.values())

    def _take_stock(self, beside: set[str]) -> None:
        for file in sorted(self.folder.iterdir()):
            if file.name in self.entries and self._is_whole(file.name):
                self._here[file.name] = self.entries[file.name].size
            elif file.name not in beside and file.name != ".versions.json":
                file.unlink(missing_ok=True)
        if self._here:
            count = f"{len(self._here):,} of {len(self.entries):,} shards"
            self.note(f"{self.address}: {count} are in {self.folder}, fetched before")

    def _is_whole(self, name: str) -> bool:
        """Whether the file is the bucket's version: its time of change is set to that number once it is complete."""
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
                f"{self.address}: {len(pinned)} shards of {needed / 1e9:.3g} GB are needed at the same time, more than "
                f"the {self.budget / 1e9:.3g} GB of runtime.disk_budget_gb; raise it, or lower data.shuffle_window"
            )

    def _wait(self, names: tuple[str, ...]) -> float:
        began, reported = time.monotonic(), False
        while missing := [name for name in names if name not in self._here]:
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
            self.note(f"{self.address}: went on after {waited:.0f} s of waiting for shards")
        return waited

    def _plan(self) -> None:
        """Put everything that readers named into one order: what they may open now, then what they need next."""
        soon = [name for names, _ in reversed(self._needs.values()) for name in names]
        soon += [name for _, then in reversed(self._needs.values()) for name in then]
        self._order = {name: position for position, name in enumerate(dict.fromkeys(soon))}
        self._begin_transfers()

    def _begin_transfers(self) -> None:
        for name, position in self._order.items():
            if self._closed or len(self._coming) >= TRANSFERS:
                return
            if name in self._here or name in self._coming or name in self._failed:
                continue
            if not self._make_room(self.entries[name].size, position):
                return  # a smaller one behind it must not take the room that it waits for
            self._coming[name] = self.entries[name].size
            # No pool: the process must be able to end while a transfer waits for a bucket that does not answer.
            threading.Thread(target=self._fetch, args=(name,), name=f"shard {name}", daemon=True).start()

    def _make_room(self, size: int, position: int) -> bool:
        """Delete what is needed later than `position`, the latest first, until `size` bytes fit; or nothing at all."""
        excess = self.used + size - self.budget
        if excess <= 0:
            return True
        pinned, nobody = self._pinned(), len(self._order)
        later = [n for n in self._here if self._order.get(n, nobody) > position and n not in pinned]
        if sum(self._here[name] for name in later) < excess:
            return False
        later.sort(key=lambda name: -self._order.get(name, nobody))  # stable: of equals the least recently used
        for name in later:
            (self.folder / name).unlink(missing_ok=True)
            excess -= self._here.pop(name)
            if excess <= 0:
                break
        return True

    def _fetch(self, name: str) -> None:
        entry, file, failure = self.entries[name], self.folder / name, None
        try:
            entry.path.download(file, expected=entry)
            os.utime(file, ns=(time.time_ns(), entry.version))
        except Exception as error:
            failure = error
        with self._changed:
            size = self._coming.pop(name)
            if failure is None:
                self._here[name] = size
                # The bucket answers: what failed because it did not is tried again.
                self._failed = {n: e for n, e in self._failed.items() if not isinstance(e, Interrupted)}
            else:
                self._failed[name] = failure
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            self._begin_transfers()
            self._changed.notify_all()
