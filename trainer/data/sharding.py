"""Sharding of the training data over the workers of a run, by record or by file, and the steps of an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.errors import ConfigError
from trainer.types import Split

By = Literal["record", "file"]


@dataclass(frozen=True)
class Sharding:
    """The part of the training split that one of several workers reads.

    By record: the global batches are those of one worker alone, and each worker takes its rows of each of them. By
    file: each worker has shards of its own, the same ones in every epoch, and fills its part of each global batch from
    them; nobody reads what another one trains on, but records meet only records of the same worker's shards.
    """

    worker: int = 0
    workers: int = 1
    by: By = "record"

    @property
    def own_files(self) -> bool:
        return self.by == "file" and self.workers > 1


UNSHARDED = Sharding()


def shard_sizes(split: Split) -> np.ndarray:
    """Records of each shard that the split uses, int64 [shards]."""
    return np.array([shard.stop - shard.start for shard in split.shards], np.int64)


def shards_of_workers(split: Split, workers: int) -> list[np.ndarray]:
    """The shards of each worker, as equal in records as may be: the largest first, each to who has least so far.

    Returns:
        for each worker int64 shard numbers, increasing. (Longest-processing-time rule: Graham 1969.)
    """
    sizes = shard_sizes(split)
    loads, owner = np.zeros(workers, np.int64), np.zeros(len(sizes), np.int64)
    for shard in np.argsort(-sizes, kind="stable"):
        owner[shard] = np.argmin(loads)
        loads[owner[shard]] += sizes[shard]
    return [np.flatnonzero(owner == worker) for worker in range(workers)]


def own_examples(split: Split, sharding: Sharding) -> np.ndarray:
    """The training examples that a worker reads in an epoch, increasing int64 indices; by record it may read any."""
    if not sharding.own_files:
        return np.arange(split.count, dtype=np.int64)
    own, sizes = shards_of_workers(split, sharding.workers)[sharding.worker], shard_sizes(split)
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(sizes)), sizes), own))


def steps_per_epoch(split: Split, batch_size: int, sharding: Sharding = UNSHARDED) -> int:
    """Global batches of an epoch; the last one may be padded. By file, the worker with most records decides."""
    if sharding.own_files:
        sizes, rows = shard_sizes(split), batch_size // sharding.workers
        return max(-(-int(sizes[own].sum()) // rows) for own in shards_of_workers(split, sharding.workers))
    return -(-split.count // batch_size)


@dataclass(frozen=True)
class ShardingPlan:
    """The sharding of the training split over all workers, and its reason."""

    by: By
    workers: int
    steps_per_epoch: int
    reason: str

    def of_worker(self, worker: int) -> Sharding:
        return Sharding(worker, self.workers, self.by)

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of a checkpoint, by which `check_resumable` compares."""
        return {"by": self.by, "workers": self.workers, "steps_per_epoch": self.steps_per_epoch}

    def describe(self, split: Split, worker: int) -> str:
        """The line for the log of a worker."""
        if self.by == "record":
            return f"sharding: by record ({self.reason}); every worker takes its rows of each global batch"
        files, all_files, records, all_records = count_own_shards(split, self.workers, worker)
        return (
            f"sharding: by file ({self.reason}); worker {worker} has {files} of {all_files} shards with "
            f"{records:,} of {all_records:,} records"
        )


def plan_sharding(
    asked: Literal["auto", "record", "file"],
    split: Split,
    workers: int,
    batch_size: int,
    images_kept: str,
    before: Mapping[str, Any],
) -> ShardingPlan:
    """Choose the sharding of the training split.

    By file only where there are shards for all of them; `auto` takes it where images are decoded whenever they are
    read, so that nobody reads a record in vain, and stays with what the run did before.

    Args:
        asked: `data.shard_by`.
        images_kept: where decoded training images are kept: memory | disk | none; `features` where they are read once.
        before: `ShardingPlan.facts` of the run's checkpoint; empty: it has not trained yet.
    """
    by: By = "record"
    if workers > 1 and len(split.shards) >= workers:
        by = before.get("by") or ("file" if images_kept == "none" else "record") if asked == "auto" else asked
    if asked == by:
        reason = "data.shard_by"
    elif not split.shards:
        reason = "image files have no shards"
    elif len(split.shards) < workers:
        reason = f"{len(split.shards)} shards cannot be shared by {workers} workers"
    elif images_kept == "features":
        reason = "chosen since features are kept"
    else:
        reason = f"chosen since {'no decoded' if images_kept == 'none' else 'decoded'} images are kept"
    return ShardingPlan(by, workers, steps_per_epoch(split, batch_size, Sharding(0, workers, by)), reason)


def check_resumable(plan: ShardingPlan, before: dict[str, Any], epoch_step: int) -> None:
    """Raise a ConfigError where a checkpoint cannot go on with this plan.

    Args:
        before: `ShardingPlan.facts` of the run until then; empty: it has not trained yet.
        epoch_step: steps that the checkpoint has taken of its epoch.
    """
    now = plan.facts
    if not before or before == now or "file" not in (plan.by, before["by"]):
        return
    longer = before["steps_per_epoch"] != now["steps_per_epoch"]
    if epoch_step or longer:
        why = "another number of steps" if longer else f"the checkpoint is {epoch_step} steps inside one"
        raise ConfigError(
            f"the run shared its data by {before['by']} among {before['workers']} workers, and now would by {plan.by} "
            f"among {plan.workers}, which changes what an epoch is ({why}); go on with {before['workers']} workers"
        )


def count_own_shards(split: Split, workers: int, worker: int) -> tuple[int, int, int, int]:
    """Files that a worker reads, all files, its records, all records. The split may hold a file in many pieces."""
    own, sizes = shards_of_workers(split, workers)[worker], shard_sizes(split)
    files = {split.shards[shard].path for shard in own}
    return len(files), len({shard.path for shard in split.shards}), int(sizes[own].sum()), int(sizes.sum())
