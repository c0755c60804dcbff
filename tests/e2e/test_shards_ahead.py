"""A run whose shards come from a bucket while it trains: the bits of a local run, in a small part of the disk."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import SMALL, assert_same_run, with_data_at
from tests.e2e.workers import Workers, start_workers
from tests.storage.emulator import Emulator, running
from trainer.errors import INTERRUPTED, WRONG_INPUT
from trainer.storage.path import storage_path

DATA, SHARDS = "gs://bucket/digits", 30
# All 1,257 training digits in 30 shards, nothing of them kept; two windows are a sixth of them.
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_half_of_the_disk_gives_the_bits_of_a_local_run(prepared: Path, tmp_path: Path) -> None:
    local = start(tmp_path / "local", prepared, tmp_path / "c1")
    assert local.wait(400) == [0], local.said(0)
    shards = list(prepared.glob("*.tfrecord*"))
    whole = sum(file.stat().st_size for file in shards)
    half = f"runtime.disk_budget_gb={whole * 0.55 / 1024**3}"
    first = start(tmp_path / "there", DATA, tmp_path / "c2", half)
    first.wait_for("head  epoch 1")
    first[0].send_signal(signal.SIGTERM)
    assert first.wait(60) == [INTERRUPTED], first.said(0)
    assert f"{DATA}: {len(shards)} shards, " in first.said(0)
    (home,) = (tmp_path / "c2" / "shards").iterdir()
    (folder,) = (path for path in home.iterdir() if path.is_dir())
    held = list(folder.glob("*.tfrecord*"))
    assert 0 < sum(file.stat().st_size for file in held) <= whole * 0.55
    second = start(tmp_path / "there", DATA, tmp_path / "c2", half)
    assert second.wait(400) == [0], second.said(0)
    assert f" of {len(shards)} shards are in {folder}, fetched before" in second.said(0)
    with_data_at(tmp_path / "there" / "run", DATA, str(prepared))
    assert_same_run(tmp_path / "local" / "run", tmp_path / "there" / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_workers_that_share_by_file_fetch_their_own_shards(prepared: Path, tmp_path: Path) -> None:
    """Two workers in step; what they train is what they would train on local shards, to the bit."""
    runs = {}
    for name, data in (("local", str(prepared)), ("there", DATA)):
        folder = tmp_path / name
        own = {i: (f"runtime.cache_dir={folder}/cache-{i}",) for i in range(2)}
        runs[name] = start_workers(
            folder, 2, *LIVE, "data.shard_by=file", f"data.root={data}",
            f"output_dir={folder / 'run'}", own=own,
        )  # fmt: skip
        assert runs[name].wait(400) == [0, 0], runs[name].said(0)
    held = []
    for i in range(2):
        assert "sharding: by file" in runs["there"].said(i)
        (home,) = (tmp_path / "there" / f"cache-{i}" / "shards").iterdir()
        held.append({file.name for file in home.rglob("*-train.tfrecord*")})
    assert len(held[1]) == 15  # of 30; the chief fetches also those whose images the report shows
    assert held[0] | held[1] == {file.name for file in prepared.glob("*-train.tfrecord*")}
    with_data_at(tmp_path / "there" / "run", DATA, str(prepared))
    assert_same_run(tmp_path / "local" / "run", tmp_path / "there" / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_what_cannot_be_is_said_before_anything_is_trained(prepared: Path, tmp_path: Path) -> None:
    tight = start(tmp_path / "1", DATA, tmp_path / "c1", "runtime.disk_budget_gb=0.00002")
    changed = tmp_path / "changed"
    shutil.copytree(prepared, changed)
    (shard, *_) = sorted(changed.glob("*train.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    for file in changed.iterdir():
        (storage_path("gs://bucket/changed") / file.name).upload(file)
    other = start(tmp_path / "2", "gs://bucket/changed", tmp_path / "c2")
    assert other.wait(120) == [WRONG_INPUT]
    assert f"gs://bucket/changed/{shard.name} is not what kubetune_shards.json says any more" in other.said(0)
    assert tight.wait(120) == [WRONG_INPUT]
    assert "are needed at the same time, more than the" in tight.said(0)
