"""Shard the training data over the workers of a run, by record or by file, and compute the steps of an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.errors import ConfigError
from trainer.types import Split

ShardingMode = Literal["record", "file"]
ShardBy = ShardingMode | Literal["auto"]  # data.shard_by
CheckpointState = Mapping[str, Any]  # `ShardingPlan.checkpoint_state`; empty for a new run


@dataclass(frozen=True)
class Sharding:
    """The subset of the training split that one worker reads.

    By record, the global batches are those of a run on one worker, and each worker takes its rows of them. By file,
    each worker has its own shards, the same in every epoch, and fills its rows of each global batch from them: a record
    is read by one worker only, but is shuffled only within the shards of that worker.

    With virtual replicas by file, each of their `parts` of a global batch has its own shards, and a worker reads those
    of consecutive parts. So the global batches do not depend on the number of workers.
    """

    worker: int = 0
    workers: int = 1
    by: ShardingMode = "record"
    parts: int | None = None  # virtual replicas, a multiple of `workers`; None: each worker is one part

    @property
    def by_file(self) -> bool:
        return self.by == "file" and (self.parts or self.workers) > 1

    def of_parts(self) -> list["Sharding"]:
        """Return the sharding of each part that this worker reads, as if each part were one worker."""
        if not self.by_file or self.parts is None:
            return [self]
        own = self.parts // self.workers
        return [Sharding(part, self.parts, self.by) for part in range(self.worker * own, (self.worker + 1) * own)]


UNSHARDED = Sharding()


def count_shard_records(split: Split) -> np.ndarray:
    """Count the records of each shard that the split uses, int64 [shards]."""
    return np.array([shard.stop - shard.start for shard in split.shards], np.int64)


def assign_shards(split: Split, workers: int) -> list[np.ndarray]:
    """Return the shard indices of each worker, increasing, int64.

    The record counts are balanced by longest-processing-time-first scheduling (Graham 1969).
    """
    sizes = count_shard_records(split)
    loads, owner = np.zeros(workers, np.int64), np.zeros(len(sizes), np.int64)
    for shard in np.argsort(-sizes, kind="stable"):
        owner[shard] = np.argmin(loads)
        loads[owner[shard]] += sizes[shard]
    return [np.flatnonzero(owner == worker) for worker in range(workers)]


def select_worker_shards(split: Split, sharding: Sharding) -> np.ndarray:
    """Return the shard indices of a worker with sharding by file, increasing, int64."""
    parts = sharding.of_parts()
    assigned = assign_shards(split, parts[0].workers)
    return np.sort(np.concatenate([assigned[part.worker] for part in parts]))


def select_worker_examples(split: Split, sharding: Sharding) -> np.ndarray:
    """Return the indices, int64 [n], increasing, of the training examples that a worker can read: all if by record."""
    if not sharding.by_file:
        return np.arange(split.count, dtype=np.int64)
    shards, sizes = select_worker_shards(split, sharding), count_shard_records(split)
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(sizes)), sizes), shards))


def steps_per_epoch(split: Split, batch_size: int, sharding: Sharding = UNSHARDED) -> int:
    """Count the global batches per epoch, the last one padded. By file, the worker or part with most decides."""
    if sharding.by_file:
        parts = sharding.parts or sharding.workers
        sizes, rows = count_shard_records(split), batch_size // parts
        return max(-(-int(sizes[shards].sum()) // rows) for shards in assign_shards(split, parts))
    return -(-split.count // batch_size)


@dataclass(frozen=True)
class ShardingPlan:
    """Sharding of the training split over all workers, and the reason for it."""

    by: ShardingMode
    workers: int
    steps_per_epoch: int
    reason: str
    parts: int | None = None  # see `Sharding`

    def of_worker(self, worker: int) -> Sharding:
        return Sharding(worker, self.workers, self.by, self.parts)

    def of_scoring(self, worker: int) -> Sharding:
        """Return the sharding of scoring and features. With virtual replicas the workers divide whole device calls."""
        return Sharding(worker, self.workers, "record" if self.parts else self.by)

    @property
    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint stores, so that `check_resumable` can compare the plan of a later start with it."""
        workers = self.parts or self.workers  # any number of workers has the batches of these parts
        return {"by": self.by, "workers": workers, "steps_per_epoch": self.steps_per_epoch}

    def describe(self, split: Split, worker: int) -> str:
        """Format the log line about the records of a worker."""
        if self.by == "record":
            return f"sharding: by record ({self.reason}); every worker takes its rows of each global batch"
        shards, sizes = select_worker_shards(split, self.of_worker(worker)), count_shard_records(split)
        paths = [shard.path for shard in split.shards]  # a split can use several ranges of a file
        files, records = len({paths[shard] for shard in shards}), sizes[shards].sum()
        return (
            f"sharding: by file ({self.reason}); worker {worker} has {files} of {len(set(paths))} shards with "
            f"{records:,} of {sizes.sum():,} records"
        )


def plan_sharding(
    shard_by: ShardBy, split: Split, workers: int, batch_size: int, image_cache: str, checkpoint: CheckpointState,
    virtual_replicas: int | None = None,
) -> ShardingPlan:  # fmt: skip
    """Choose the sharding of the training split.

    Sharding by file requires at least one shard per worker or virtual replica. "auto" keeps the sharding of the
    checkpoint. It shards a new run by file if decoded images are not cached, so that each record is read and decoded by
    one worker only; with virtual replicas it does not, because what is cached can differ between numbers of workers.

    `image_cache` is where decoded images are cached: "memory", "disk" or "none". It is "features" if training reads
    images only once, to compute features.
    """
    by: ShardingMode = "record"
    parts = virtual_replicas or workers
    if parts > 1 and len(split.shards) >= parts:
        automatic: ShardingMode = "file" if image_cache == "none" and not virtual_replicas else "record"
        by = checkpoint.get("by") or automatic if shard_by == "auto" else shard_by
    if shard_by == by:
        reason = "as configured"
    elif parts == 1:
        reason = "there is one worker"
    elif not split.shards:
        reason = "image files have no shards"
    elif len(split.shards) < parts:
        readers = f"{parts} virtual replicas" if virtual_replicas else f"{parts} workers"
        reason = f"{len(split.shards)} shards are too few for {readers}"
    elif checkpoint.get("by"):
        reason = "as in the checkpoint"
    elif virtual_replicas:
        reason = "with virtual replicas, unless configured"
    elif image_cache == "features":
        reason = "features are cached"
    else:
        reason = f"{'no decoded' if image_cache == 'none' else 'decoded'} images are cached"
    steps = steps_per_epoch(split, batch_size, Sharding(0, workers, by, virtual_replicas))
    return ShardingPlan(by, workers, steps, reason, virtual_replicas)


def check_resumable(plan: ShardingPlan, checkpoint: CheckpointState, epoch_step: int) -> None:
    """Raise a ConfigError if a run cannot resume from a checkpoint with this plan.

    Sharding by file can change only between epochs, and only to equal steps per epoch. `epoch_step` is the
    number of steps of the current epoch in the checkpoint.
    """
    if not checkpoint or checkpoint == plan.checkpoint_state or "file" not in (plan.by, checkpoint["by"]):
        return
    steps_differ = checkpoint["steps_per_epoch"] != plan.steps_per_epoch
    if epoch_step or steps_differ:
        why = "the steps per epoch differ" if steps_differ else f"the checkpoint is {epoch_step} steps into an epoch"
        used = f"the checkpoint used {checkpoint['by']} on {checkpoint['workers']} workers"
        problem = f"cannot resume with another sharding: {used}, this start uses {plan.by} on {plan.workers} ({why})"
        raise ConfigError(problem, fix=f"resume with {checkpoint['workers']} workers")
