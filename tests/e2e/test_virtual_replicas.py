"""With virtual replicas a run has the same bits on 1, 2 and 4 workers, also if their number changes between starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import assert_same_run, kill_at, program, train
from tests.e2e.workers import SHARED, start_workers
from trainer.errors import WRONG_INPUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

BATCH = tuple(override for override in SHARED if not override.startswith("training.batch_size"))
VIRTUAL = (*BATCH, "training.batch_size=16", "training.virtual_replicas=4", "training.clip_norm=1", "model.dropout=0.2")
FEATURES = (
    "augmentation=none", "phases.fine_tune.batch_norm=train", "model.hidden=[16,8]", "model.hidden_batch_norm=true",
    "phases.head.optimizer.name=nadam", "phases.fine_tune.optimizer={name: adagrad, learning_rate: 1e-3}",
)  # fmt: skip
LIVE = ("augmentation=light", "augmentation.mixup=0.3", "training.class_weights=balanced")
BY_FILE = ("data=tfds", "data.shard_by=file", "data.cache=none", "debug.max_examples=200", "augmentation=light")


def train_by(workers: int, folder: Path, *overrides: str, kill_after: str | None = None) -> Path:
    """Train with several workers, to the end or until worker 0 logs a text; then all are killed. Return the folder."""
    out, caches = folder / "run", [folder.parent / f"cache-{index}" for index in range(workers)]
    for cache in caches:  # the same paths for each run, because predictions.csv has them, but nothing of another run
        shutil.rmtree(cache, ignore_errors=True)
    own = [f"runtime.cache_dir={cache}" for cache in caches]
    if workers == 1:
        arguments = (*overrides, own[0], f"output_dir={out}")
        kill_at(kill_after, *arguments) if kill_after else train(*arguments)
        return out
    started = start_workers(folder, workers, *overrides, f"output_dir={out}", own={i: [x] for i, x in enumerate(own)})
    if kill_after:
        started.wait_for(kill_after, seconds=600)
        started.kill()
    else:
        assert started.wait(1200) == [0] * workers, started.output(0)
    return out


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as a dataset of four training shards."""
    folder = tmp_path_factory.mktemp("records") / "digits"
    program("prepare", "data=digits", f"output={folder}", "data.shards=4")
    return folder


@pytest.mark.parametrize("options", [FEATURES, LIVE, BY_FILE], ids=["features", "live", "by file"])
def test_one_two_and_four_workers_end_with_the_same_bits(
    tmp_path: Path, records: Path, options: tuple[str, ...]
) -> None:
    if options == BY_FILE:
        options = (*options, f"data.root={records}")
    one = train_by(1, tmp_path / "one", *VIRTUAL, *options)
    for workers in (2, 4):
        assert_same_run(one, train_by(workers, tmp_path / str(workers), *VIRTUAL, *options))


def test_kills_and_another_number_of_workers_after_each_change_nothing(tmp_path: Path) -> None:
    calm, changing, rng = (
        train_by(1, tmp_path / "calm", *VIRTUAL, *LIVE),
        tmp_path / "changing",
        np.random.default_rng(5),
    )
    for step in (4, 8, 16, 20):  # within epochs of six steps
        train_by(int(rng.choice([1, 2, 4])), changing, *VIRTUAL, *LIVE, kill_after=f"step {step}/")
    assert_same_run(calm, train_by(2, changing, *VIRTUAL, *LIVE))


def test_a_number_of_workers_that_does_not_divide_them_is_rejected(tmp_path: Path) -> None:
    workers = start_workers(tmp_path, 3, *VIRTUAL, f"output_dir={tmp_path / 'run'}")
    assert workers.wait(240) == [WRONG_INPUT] * 3
    assert "training.virtual_replicas=4: is not divisible by 3 replicas; start 1, 2, 4 replicas" in workers.output(0)
    assert not (tmp_path / "run").exists()
