"""Shard prefetch from a bucket in whole runs: equal, bit for bit, to a local run, with less disk than the data."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import SMALL, assert_same_run, with_data_at
from tests.e2e.workers import Workers, start_workers
from tests.storage.emulator import Emulator, running
from trainer.errors import WRONG_INPUT
from trainer.storage.path import storage_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("server")]

DATA, SHARDS = "gs://bucket/digits", 30
# All 1,257 training digits in 30 shards, not cached; two shuffle windows are a sixth of them.
LIVE = (
    *SMALL, "data=tfds", "debug.max_examples=null", "data.cache=none", "data.shuffle_window=100", "phases.head.epochs=1",
    "phases.fine_tune.epochs=1", "runtime.checkpoint_every='20 steps'", "runtime.log_every='20 steps'",
    "runtime.data_threads=2", "seed=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with running(tmp_path_factory.mktemp("objects")) as emulator:
        for file in prepared.iterdir():
            (storage_path(DATA) / file.name).upload(file)
        yield emulator


def start(folder: Path, data: object, cache: Path, *overrides: str) -> Workers:
    return start_workers(
        folder, 1, *LIVE, f"data.root={data}", f"runtime.cache_dir={cache}", f"output_dir={folder / 'run'}", *overrides
    )


def test_a_disk_budget_of_half_the_data_is_equal_to_a_local_run(prepared: Path, tmp_path: Path) -> None:
    local = start(tmp_path / "local", prepared, tmp_path / "c1")
    assert local.wait(400) == [0], local.output(0)
    shards = list(prepared.glob("*.tfrecord*"))
    size = sum(file.stat().st_size for file in shards)
    half = f"runtime.disk_budget_gb={size * 0.55 / 1024**3}"
    first = start(tmp_path / "there", DATA, tmp_path / "c2", half)
    first.wait_for("head  epoch 1")
    first.terminate()
    assert f"{DATA}: {len(shards)} shards" in first.output(0)
    (home,) = (tmp_path / "c2" / "shards").iterdir()
    (folder,) = (path for path in home.iterdir() if path.is_dir())
    assert 0 < sum(file.stat().st_size for file in folder.glob("*.tfrecord*")) <= size * 0.55
    second = start(tmp_path / "there", DATA, tmp_path / "c2", half)
    assert second.wait(400) == [0], second.output(0)
    assert f"{len(shards)} shards are in {folder}" in second.output(0)
    with_data_at(tmp_path / "there" / "run", DATA, str(prepared))
    assert_same_run(tmp_path / "local" / "run", tmp_path / "there" / "run")


def test_workers_sharded_by_file_fetch_their_own_shards(prepared: Path, tmp_path: Path) -> None:
    runs = {}
    for name, data in (("local", str(prepared)), ("there", DATA)):
        folder = tmp_path / name
        own = {i: (f"runtime.cache_dir={folder}/cache-{i}",) for i in range(2)}
        runs[name] = start_workers(
            folder, 2, *LIVE, "data.shard_by=file", f"data.root={data}", f"output_dir={folder / 'run'}", own=own
        )
        assert runs[name].wait(400) == [0, 0], runs[name].output(0)
    held = []
    for i in range(2):
        assert "sharding: by file" in runs["there"].output(i)
        (home,) = (tmp_path / "there" / f"cache-{i}" / "shards").iterdir()
        held.append({file.name for file in home.rglob("*-train.tfrecord*")})
    assert len(held[1]) == 15  # of 30; the chief also fetches those of the images in the report
    assert held[0] | held[1] == {file.name for file in prepared.glob("*-train.tfrecord*")}
    with_data_at(tmp_path / "there" / "run", DATA, str(prepared))
    assert_same_run(tmp_path / "local" / "run", tmp_path / "there" / "run")


def test_changed_shards_and_a_budget_that_is_too_small_are_rejected(prepared: Path, tmp_path: Path) -> None:
    tight = start(tmp_path / "1", DATA, tmp_path / "c1", "runtime.disk_budget_gb=0.00002")
    changed = tmp_path / "changed"
    shutil.copytree(prepared, changed)
    (shard, *_) = sorted(changed.glob("*train.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    for file in changed.iterdir():
        (storage_path("gs://bucket/changed") / file.name).upload(file)
    other = start(tmp_path / "2", "gs://bucket/changed", tmp_path / "c2")
    assert other.wait(120) == [WRONG_INPUT]
    assert f"gs://bucket/changed/{shard.name}" in other.output(0)
    assert tight.wait(120) == [WRONG_INPUT]
    assert "runtime.disk_budget_gb" in tight.output(0)
