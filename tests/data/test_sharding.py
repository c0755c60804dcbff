"""How workers share the training data: the choice, its reason, and when a checkpoint can go on with it."""

from typing import Any

import numpy as np
import pytest

from trainer.data.sharding import ShardingPlan, check_resumable, count_own_shards, own_examples, plan_sharding
from trainer.errors import ConfigError
from trainer.types import Shard, Split

WHOLE = tuple(Shard(f"{name}.tfrecord", 10, 0, 10) for name in "abcd")
# As debug.max_examples leaves it: single records out of two files.
PIECES = tuple(Shard(f"{name}.tfrecord", 10, at, at + 1) for name in "ab" for at in (0, 3, 5, 9))
RECORDS = Split("train", np.zeros(40, np.int32), shards=WHOLE)
FILES = Split("train", np.zeros(40, np.int32), files=("x",) * 40)
BEFORE = {"by": "file", "workers": 2, "steps_per_epoch": 5}


@pytest.mark.parametrize(
    ("shards", "expected"), [(WHOLE, (2, 4, 20, 40)), (PIECES, (2, 2, 4, 8)), (PIECES[:4], (1, 1, 2, 4))]
)
def test_shards_are_counted_by_file(shards: tuple[Shard, ...], expected: tuple[int, int, int, int]) -> None:
    records = sum(shard.stop - shard.start for shard in shards)
    assert count_own_shards(Split("train", np.zeros(records, np.int32), shards=shards), 2, 0) == expected


@pytest.mark.parametrize(
    ("asked", "split", "workers", "kept", "before", "by", "reason"),
    [
        ("auto", RECORDS, 1, "none", {}, "record", "chosen since no decoded images are kept"),
        ("auto", RECORDS, 2, "none", {}, "file", "chosen since no decoded images are kept"),
        ("auto", RECORDS, 2, "memory", {}, "record", "chosen since decoded images are kept"),
        ("auto", RECORDS, 2, "features", {}, "record", "chosen since features are kept"),
        ("auto", RECORDS, 2, "memory", BEFORE, "file", "chosen since decoded images are kept"),
        ("auto", RECORDS, 5, "none", {}, "record", "4 shards cannot be shared by 5 workers"),
        ("auto", FILES, 2, "none", {}, "record", "image files have no shards"),
        ("file", RECORDS, 2, "memory", {}, "file", "data.shard_by"),
        ("file", FILES, 2, "memory", {}, "record", "image files have no shards"),
        ("record", RECORDS, 2, "none", BEFORE, "record", "data.shard_by"),
    ],
)
def test_the_choice_and_its_reason(
    asked: Any, split: Split, workers: int, kept: str, before: dict[str, Any], by: str, reason: str
) -> None:
    plan = plan_sharding(asked, split, workers, 8, kept, before)
    assert (plan.by, plan.workers, plan.steps_per_epoch, plan.reason) == (by, workers, 5, reason)
    assert f"by {by} ({reason})" in plan.describe(split, 0)


def test_workers_with_files_of_their_own_read_each_example_once() -> None:
    plan = plan_sharding("file", RECORDS, 2, 8, "none", {})
    parts = [own_examples(RECORDS, plan.of_worker(worker)) for worker in range(2)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    by_record = plan_sharding("record", RECORDS, 2, 8, "none", {})
    assert len(own_examples(RECORDS, by_record.of_worker(1))) == 40


@pytest.mark.parametrize(
    ("now", "epoch_step", "why"),
    [
        (ShardingPlan("file", 2, 5, ""), 3, None),
        (ShardingPlan("record", 2, 5, ""), 0, None),
        (ShardingPlan("record", 2, 5, ""), 3, "the checkpoint is 3 steps inside one"),
        (ShardingPlan("file", 4, 6, ""), 0, "another number of steps"),
    ],
)
def test_a_checkpoint_inside_an_epoch_needs_the_same_sharding(
    now: ShardingPlan, epoch_step: int, why: str | None
) -> None:
    if why is None:
        return check_resumable(now, BEFORE, epoch_step)
    with pytest.raises(ConfigError) as refused:
        check_resumable(now, BEFORE, epoch_step)
    assert f"shared its data by file among 2 workers, and now would by {now.by} among {now.workers}" in str(
        refused.value
    )
    assert f"({why}); go on with 2 workers" in str(refused.value)
