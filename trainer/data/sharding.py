"""Sharding of the training data over the workers of a run, by record or by file, and the steps of an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.errors import ConfigError
from trainer.types import Split

By = Literal["record", "file"]
Facts = Mapping[str, Any]  # of a `ShardingPlan`


@dataclass(frozen=True)
class Sharding:
    """The subset of the training split that one worker reads.

    By record: the global batches are those of a run on one worker, and each worker takes its rows of each of them. By
    file: each worker has its own shards, the same in every epoch, and fills its rows of each global batch from them; no
    record is read twice, but records are shuffled only among the shards of one worker.
    """

    worker: int = 0
    workers: int = 1
    by: By = "record"

    @property
    def own_files(self) -> bool:
        return self.by == "file" and self.workers > 1


UNSHARDED = Sharding()


def shard_sizes(split: Split) -> np.ndarray:
    """Return the number of records of each shard that the split uses, int64 [shards]."""
    return np.array([shard.stop - shard.start for shard in split.shards], np.int64)


def shards_of_workers(split: Split, workers: int) -> list[np.ndarray]:
    """Return increasing int64 shard numbers per worker, balanced by the longest-processing-time rule (Graham 1969)."""
    sizes = shard_sizes(split)
    loads, owner = np.zeros(workers, np.int64), np.zeros(len(sizes), np.int64)
    for shard in np.argsort(-sizes, kind="stable"):
        owner[shard] = np.argmin(loads)
        loads[owner[shard]] += sizes[shard]
    return [np.flatnonzero(owner == worker) for worker in range(workers)]


def own_examples(split: Split, sharding: Sharding) -> np.ndarray:
    """Return the training examples that a worker may read in an epoch, increasing int64 indices; by record all."""
    if not sharding.own_files:
        return np.arange(split.count, dtype=np.int64)
    own, sizes = shards_of_workers(split, sharding.workers)[sharding.worker], shard_sizes(split)
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(sizes)), sizes), own))


def steps_per_epoch(split: Split, batch_size: int, sharding: Sharding = UNSHARDED) -> int:
    """Return the global batches per epoch, the last one padded; by file those of the worker with most records."""
    if sharding.own_files:
        sizes, rows = shard_sizes(split), batch_size // sharding.workers
        return max(-(-int(sizes[own].sum()) // rows) for own in shards_of_workers(split, sharding.workers))
    return -(-split.count // batch_size)


@dataclass(frozen=True)
class ShardingPlan:
    """Sharding of the training split over all workers, with its reason."""

    by: By
    workers: int
    steps_per_epoch: int
    reason: str

    def of_worker(self, worker: int) -> Sharding:
        return Sharding(worker, self.workers, self.by)

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of a checkpoint that `check_resumable` compares."""
        return {"by": self.by, "workers": self.workers, "steps_per_epoch": self.steps_per_epoch}

    def describe(self, split: Split, worker: int) -> str:
        """Return the log line of a worker."""
        if self.by == "record":
            return f"sharding: by record ({self.reason}); every worker takes its rows of each global batch"
        own, sizes = shards_of_workers(split, self.workers)[worker], shard_sizes(split)
        paths = [shard.path for shard in split.shards]  # a split may use several ranges of a file
        files, records = len({paths[shard] for shard in own}), sizes[own].sum()
        return (
            f"sharding: by file ({self.reason}); worker {worker} has {files} of {len(set(paths))} shards with "
            f"{records:,} of {sizes.sum():,} records"
        )


def plan_sharding(
    shard_by: By | Literal["auto"], split: Split, workers: int, batch_size: int, image_cache: str, before: Facts
) -> ShardingPlan:
    """Choose the sharding of the training split.

    By file requires at least one shard per worker. `auto` uses the sharding of the run's checkpoint, `before` (empty
    for a new run). A new run is sharded by file if `image_cache` (memory | disk | none; `features`: images are read
    once) is none, so that each record is read and decoded by one worker only.
    """
    by: By = "record"
    if workers > 1 and len(split.shards) >= workers:
        by = before.get("by") or ("file" if image_cache == "none" else "record") if shard_by == "auto" else shard_by
    if shard_by == by:
        reason = "data.shard_by"
    elif not split.shards:
        reason = "image files have no shards"
    elif len(split.shards) < workers:
        reason = f"{len(split.shards)} shards are too few for {workers} workers"
    elif image_cache == "features":
        reason = "chosen since features are cached"
    else:
        reason = f"chosen since {'no decoded' if image_cache == 'none' else 'decoded'} images are cached"
    return ShardingPlan(by, workers, steps_per_epoch(split, batch_size, Sharding(0, workers, by)), reason)


def check_resumable(plan: ShardingPlan, before: dict[str, Any], epoch_step: int) -> None:
    """Raise a ConfigError if a checkpoint cannot resume with this plan.

    `before`: its `ShardingPlan.facts`, empty for a new run; `epoch_step`: steps that it has taken of its epoch.
    """
    now = plan.facts
    if not before or before == now or "file" not in (plan.by, before["by"]):
        return
    is_longer = before["steps_per_epoch"] != now["steps_per_epoch"]
    if epoch_step or is_longer:
        why = "other steps per epoch" if is_longer else f"the checkpoint is {epoch_step} steps into an epoch"
        raise ConfigError(
            f"cannot resume with another sharding: the checkpoint used {before['by']} on {before['workers']} workers, "
            f"this start uses {plan.by} on {plan.workers} ({why})",
            fix=f"resume with {before['workers']} workers",
        )
