"""The shard cache: required shards are on disk, the others fit the budget, and every byte is right."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.errors import raises
from tests.storage.emulator import Emulator
from tests.storage.s3_server import S3Server
from tests.waiting import PATIENCE, wait_until
from trainer.errors import DataError, Interrupted
from trainer.storage import retries, shard_cache
from trainer.storage.bucket import ReplacedError
from trainer.storage.path import StoragePath
from trainer.storage.shard_cache import ShardCache

SIZE = 10_000
NAMES = [f"s{i:02d}" for i in range(12)]


def content(name: str) -> bytes:
    return name.encode() * (SIZE // len(name)) + b"." * (SIZE % len(name))


@pytest.fixture
def shards(in_bucket: StoragePath) -> StoragePath:
    for name in NAMES:
        (in_bucket / name).write(content(name))
    return in_bucket


@contextmanager
def opened(shards: StoragePath, cache: Path, holds: float, notes: list[str] | None = None) -> Iterator[ShardCache]:
    """A cache with a budget for `holds` shards."""
    entries = {info.path.name: info for info in shards.list()}
    note = (notes if notes is not None else []).append
    opened = ShardCache(str(shards), entries, cache, int(holds * SIZE), note, lambda: None, ["info.json"])
    try:
        yield opened
    finally:
        opened.close()
        settled(opened)


def settled(cache: ShardCache) -> set[str]:
    """The shards on disk once all transfers have ended."""

    def has_no_transfer() -> bool:
        with cache._changed:  # the thread that ends a transfer begins the next one under this lock
            return not cache._in_transfer

    wait_until(has_no_transfer, lambda: f"{sorted(cache._in_transfer)} are in transfer")
    return on_disk(cache.folder)


def on_disk(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def require_without_waiting(cache: ShardCache, names: list[str], then: Sequence[str] = ()) -> None:
    """Require shards that are on disk: `check_cancelled`, which a waiting reader calls, is not called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "check_cancelled", lambda: pytest.fail("it waits"))
        cache.require("a", names, then)


def test_required_shards_and_prefetching_in_the_order_of_need(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=5) as cache:
        assert cache.require("a", NAMES[:2], NAMES[2:]) > 0
        assert {"s00", "s01"} <= on_disk(cache.folder)
        assert settled(cache) == set(NAMES[:5])
        assert all((cache.folder / name).read_bytes() == content(name) for name in NAMES[:5])
        require_without_waiting(cache, NAMES[2:4], NAMES[4:])
        assert settled(cache) == set(NAMES[2:7])  # the ones needed before are evicted
        cache.require("a", NAMES[10:12], NAMES[:10])  # the second epoch begins with the first shard
        assert settled(cache) == {"s10", "s11", "s00", "s01", "s02"}


def test_the_budget_holds_at_every_moment(shards: StoragePath, tmp_path: Path) -> None:
    sizes: list[int] = []
    over = threading.Event()
    with opened(shards, tmp_path, holds=4.5) as cache:

        def watch() -> None:
            while not over.is_set():
                with cache._changed:  # files are deleted only under this lock
                    by_shard = {}  # one in transfer has another name
                    for entry in os.scandir(cache.folder):
                        with suppress(FileNotFoundError):
                            by_shard[entry.name.lstrip(".").split(".")[0]] = entry.stat().st_size
                    sizes.append(sum(by_shard.values()))
                time.sleep(0.0005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for epoch in range(8):
            order = NAMES[epoch:] + NAMES[:epoch]
            for at in range(len(order)):
                cache.require("a", order[at : at + 2], order[at + 2 :])
                assert set(order[at : at + 2]) <= on_disk(cache.folder)
                with cache._changed:
                    assert cache.used <= cache.budget
        over.set()
        watcher.join()
    assert len(sizes) > 20
    assert 3 * SIZE < max(sizes) <= 4.5 * SIZE


def test_no_reader_evicts_the_shards_of_another_one(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=4) as cache:
        cache.require("training", ["s00", "s01"], NAMES[2:])
        for name in NAMES[4:]:
            cache.require("evaluation", [name])
            assert {"s00", "s01", name} <= on_disk(cache.folder)
        cache.release("evaluation")
        cache.require("training", ["s02"])
        assert "s02" in on_disk(cache.folder)


def test_more_than_the_budget_at_once_is_rejected(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=3) as cache:
        cache.require("evaluation", ["s11"])
        problem = "4 shards of 4e-05 GB are needed at the same time"
        with raises(DataError, key="runtime.disk_budget_gb", value="3e-05", problem=problem, fix="raise it"):
            cache.require("training", NAMES[:3])


def test_a_restart_reuses_no_damaged_or_old_shards(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=20) as cache:
        cache.require("a", NAMES)
        folder = cache.folder
    (folder / "s01").write_bytes(content("s01")[:-1])  # cut off
    (folder / "s02").write_bytes(b"x" * SIZE)  # written over
    (shards / "s03").write(content("new"))  # another version in the bucket
    (folder / "s99").write_bytes(b"of a dataset before")
    (folder / ".s05.12-000000000000034").write_bytes(b"a transfer that was killed")
    (folder / "info.json").write_text("{}")
    notes: list[str] = []
    with opened(shards, tmp_path, holds=20, notes=notes) as cache:
        assert cache.folder == folder
        assert notes == [f"{shards}: 9 of 12 shards are already in {folder}"]
        assert {file.name for file in folder.iterdir()} == {*NAMES, "info.json"} - {"s01", "s02", "s03"}
        require_without_waiting(cache, ["s00", *NAMES[4:]])
        cache.require("a", NAMES)
        expected = {name: content(name) for name in NAMES} | {"s03": content("new")}
        assert {name: (folder / name).read_bytes() for name in NAMES} == expected


def test_a_deleted_or_damaged_file_is_fetched_again(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=20) as cache:
        cache.require("a", ["s00", "s01"])
        (cache.folder / "s00").unlink()
        (cache.folder / "s01").write_bytes(b"short")
        cache.require("a", ["s00", "s01"])
        assert (cache.folder / "s01").read_bytes() == content("s01")
        assert (cache.folder / "s00").read_bytes() == content("s00")


def test_two_processes_have_different_folders(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=2) as one:
        with opened(shards, tmp_path, holds=2) as two:
            assert one.folder != two.folder
            assert one.folder.name == two.folder.name == shards.name
        with opened(shards, tmp_path, holds=2) as three:
            assert three.folder == two.folder


def test_an_outage_interrupts_only_readers_that_need_the_bucket(
    emulator: Emulator | S3Server, shards: StoragePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with opened(shards, tmp_path, holds=20, notes=notes) as cache:
        cache.require("a", NAMES[:3])
        monkeypatch.setattr(retries, "DEADLINE_SECONDS", 0.5)
        monkeypatch.setattr(shard_cache, "REPORT_SECONDS", 0.0)
        emulator.stop()
        try:
            require_without_waiting(cache, NAMES[1:3], NAMES[3:])
            with raises(Interrupted, problem="s05: no request succeeded within 0.5 s", fix="same command"):
                cache.require("a", ["s05"])
            assert notes == [f"waiting for 1 shard of {shards}, the first is s05"]
        finally:
            emulator.start()
        monkeypatch.setattr(retries, "DEADLINE_SECONDS", PATIENCE)
        assert cache.require("a", ["s05"], NAMES) > 0
        assert settled(cache) == set(NAMES)


def test_a_deleted_shard_is_named_when_it_is_needed(shards: StoragePath, tmp_path: Path) -> None:
    with opened(shards, tmp_path, holds=20) as cache:
        (shards / "s07").delete()
        cache.require("a", NAMES[:7], NAMES[7:])
        assert settled(cache) == {*NAMES} - {"s07"}
        with raises(ReplacedError, problem="s07: was replaced or deleted while it was read", fix="same command"):
            cache.require("a", ["s07"])


def test_waiting_can_be_cancelled(emulator: Emulator | S3Server, shards: StoragePath, tmp_path: Path) -> None:
    class Stop(Exception): ...

    def cancel() -> None:
        raise Stop

    with opened(shards, tmp_path, holds=20) as cache:
        cache.check_cancelled = cancel
        emulator.stop()
        try:
            with pytest.raises(Stop):
                cache.require("a", ["s00"])
        finally:
            emulator.start()
