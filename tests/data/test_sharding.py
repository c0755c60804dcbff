"""Sharding of the training data over workers: the choice, its reason, and the resume of a checkpoint."""

from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from trainer.data.sharding import (
    ShardingPlan,
    plan_sharding,
    require_resumable,
    select_worker_examples,
    select_worker_shards,
)
from trainer.errors import ConfigError
from trainer.types import Shard, Split

WHOLE = tuple(Shard(f"{name}.tfrecord", 10, 0, 10) for name in "abcd")
# As with debug.max_examples: single records of two files.
RANGES = tuple(Shard(f"{name}.tfrecord", 10, start, start + 1) for name in "ab" for start in (0, 3, 5, 9))
RECORDS = Split("train", np.zeros(40, np.int32), shards=WHOLE)
FILES = Split("train", np.zeros(40, np.int32), files=("x",) * 40)
BEFORE = {"by": "file", "workers": 2, "steps_per_epoch": 5}


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        (WHOLE, "2 of 4 shards with 20 of 40 records"),
        (RANGES, "2 of 2 shards with 4 of 8 records"),
        (RANGES[:4], "1 of 1 shards with 2 of 4 records"),
    ],
)
def test_shards_are_counted_by_file(shards: tuple[Shard, ...], expected: str) -> None:
    records = sum(shard.stop - shard.start for shard in shards)
    split = Split("train", np.zeros(records, np.int32), shards=shards)
    assert ShardingPlan("file", 2, 5, "").describe(split, 0).endswith(f"worker 0 has {expected}")


@pytest.mark.parametrize(
    ("shard_by", "split", "workers", "cache", "before", "by", "reason"),
    [
        ("auto", RECORDS, 1, "none", BEFORE, "record", "there is one worker"),
        ("auto", RECORDS, 2, "none", {}, "file", "no decoded images are cached"),
        ("auto", RECORDS, 2, "memory", {}, "record", "decoded images are cached"),
        ("auto", RECORDS, 2, "features", {}, "record", "features are cached"),
        ("auto", RECORDS, 2, "memory", BEFORE, "file", "as in the checkpoint"),
        ("auto", RECORDS, 5, "none", {}, "record", "4 shards are too few for 5 workers"),
        ("auto", FILES, 2, "none", {}, "record", "image files have no shards"),
        ("file", RECORDS, 2, "memory", {}, "file", "as configured"),
        ("file", FILES, 2, "memory", {}, "record", "image files have no shards"),
        ("record", RECORDS, 2, "none", BEFORE, "record", "as configured"),
    ],
)
def test_the_choice_and_its_reason(
    shard_by: Any, split: Split, workers: int, cache: str, before: dict[str, Any], by: str, reason: str
) -> None:
    plan = plan_sharding(shard_by, split, workers, 8, cache, before)
    assert plan == ShardingPlan(by, workers, 5, reason)  # type: ignore[arg-type]
    assert f"by {by} ({reason})" in plan.describe(split, 0)


@pytest.mark.parametrize(
    ("shard_by", "split", "replicas", "cache", "before", "by", "reason"),
    [
        ("auto", RECORDS, 4, "none", {}, "record", "with virtual replicas, unless configured"),
        ("auto", RECORDS, 4, "none", BEFORE, "file", "as in the checkpoint"),
        ("file", RECORDS, 4, "memory", {}, "file", "as configured"),
        ("file", RECORDS, 8, "none", {}, "record", "4 shards are too few for 8 virtual replicas"),
        ("file", FILES, 4, "none", {}, "record", "image files have no shards"),
    ],
)
def test_virtual_replicas_have_the_same_sharding_on_any_number_of_workers(
    shard_by: Any, split: Split, replicas: int, cache: str, before: dict[str, Any], by: str, reason: str
) -> None:
    plans = [plan_sharding(shard_by, split, workers, 8, cache, before, replicas) for workers in (1, 2, 4)]
    assert [plan.reason for plan in plans] == [reason] * 3
    assert [plan.mode for plan in plans] == [by] * 3
    assert len({tuple(plan.checkpoint_state.items()) for plan in plans}) == 1
    for plan in plans:
        require_resumable(plan, plans[0].checkpoint_state, epoch_step=3)


def test_a_worker_reads_the_shards_of_its_virtual_replicas() -> None:
    plans = {workers: plan_sharding("file", RECORDS, workers, 8, "none", {}, 4) for workers in (1, 2, 4)}
    four = [select_worker_shards(RECORDS, plans[4].for_worker(worker)).tolist() for worker in range(4)]
    assert sorted(shard for shards in four for shard in shards) == [0, 1, 2, 3]
    two = [select_worker_shards(RECORDS, plans[2].for_worker(worker)).tolist() for worker in range(2)]
    assert two == [sorted(four[0] + four[1]), sorted(four[2] + four[3])]
    assert select_worker_shards(RECORDS, plans[1].for_worker(0)).tolist() == [0, 1, 2, 3]


def test_workers_by_file_read_each_example_once() -> None:
    plan = plan_sharding("file", RECORDS, 2, 8, "none", {})
    own = [select_worker_examples(RECORDS, plan.for_worker(worker)) for worker in range(2)]
    assert sorted(np.concatenate(own).tolist()) == list(range(40))
    by_record = plan_sharding("record", RECORDS, 2, 8, "none", {})
    assert len(select_worker_examples(RECORDS, by_record.for_worker(1))) == 40


def test_a_checkpoint_between_epochs_resumes_with_the_same_steps() -> None:
    require_resumable(ShardingPlan("file", 2, 5, ""), BEFORE, epoch_step=3)
    require_resumable(ShardingPlan("record", 2, 5, ""), BEFORE, epoch_step=0)


@pytest.mark.parametrize(
    ("now", "epoch_step", "why"),
    [
        (ShardingPlan("record", 2, 5, ""), 3, "3 steps into an epoch"),
        (ShardingPlan("file", 4, 6, ""), 0, "the steps per epoch differ"),
    ],
)
def test_a_checkpoint_inside_an_epoch_needs_the_same_sharding(now: ShardingPlan, epoch_step: int, why: str) -> None:
    problem = f"used file on 2 workers, this start uses {now.mode} on {now.num_workers} .*{why}"
    with raises(ConfigError, fix="resume with 2 workers", problem=problem):
        require_resumable(now, BEFORE, epoch_step)
