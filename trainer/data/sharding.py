"""Shard the training data over a run's workers, by record or by file, and compute the number of steps per epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.errors import ConfigError, format_count
from trainer.types import Split

ShardingMode = Literal["record", "file"]
ShardBy = ShardingMode | Literal["auto"]  # data.shard_by
CheckpointState = Mapping[str, Any]  # `ShardingPlan.checkpoint_state`; empty for a new run


@dataclass(frozen=True)
class Sharding:
    """The subset of the training split that one worker reads.

    If the split is sharded by record, the global batches are the same as on one worker, and each worker takes its rows
    of each batch. If it is sharded by file, each worker has its own shards, the same in every epoch, and fills its rows
    of each global batch from them. Each record is then read by one worker only, but shuffled only with records from the
    same worker's shards.

    With virtual replicas, a global batch has one part per virtual replica. If the split is sharded by file, each part
    has its own shards, and a worker reads the shards of consecutive parts, so that the global batches do not depend on
    the number of workers.
    """

    worker_index: int = 0
    num_workers: int = 1
    mode: ShardingMode = "record"
    virtual_replicas: int | None = None  # number of them, a multiple of `num_workers`; None if each worker is one part

    @property
    def by_file(self) -> bool:
        """Whether the examples are sharded by file. A single part reads all shards, so it counts as by record."""
        return self.mode == "file" and (self.virtual_replicas or self.num_workers) > 1

    def split_into_parts(self) -> list["Sharding"]:
        """Return the sharding of each part that this worker reads, as if each part were a worker.

        The list has only this sharding if it is by record or without virtual replicas.
        """
        if not self.by_file or self.virtual_replicas is None:
            return [self]
        parts_per_worker = self.virtual_replicas // self.num_workers
        first_part = self.worker_index * parts_per_worker
        return [Sharding(i, self.virtual_replicas, self.mode) for i in range(first_part, first_part + parts_per_worker)]


UNSHARDED = Sharding()


def count_shard_records(split: Split) -> np.ndarray:
    """Return the number of records that a split uses from each of its shards, int64 [s]."""
    return np.array([shard.stop - shard.start for shard in split.shards], np.int64)


def assign_shards(split: Split, num_workers: int) -> list[np.ndarray]:
    """Assign each shard to a worker, and return a list of each worker's shard indices, int64 [k], increasing.

    The workers' numbers of records are balanced by longest-processing-time-first scheduling (Graham 1969).
    """
    sizes = count_shard_records(split)
    loads, worker_of_shard = np.zeros(num_workers, np.int64), np.zeros(len(sizes), np.int64)
    for shard in np.argsort(-sizes, kind="stable"):
        worker_of_shard[shard] = np.argmin(loads)
        loads[worker_of_shard[shard]] += sizes[shard]
    return [np.flatnonzero(worker_of_shard == worker) for worker in range(num_workers)]


def select_worker_shards(split: Split, sharding: Sharding) -> np.ndarray:
    """Return the indices of the shards that a worker reads if the split is sharded by file, int64 [k], increasing."""
    parts = sharding.split_into_parts()
    shards_by_part = assign_shards(split, parts[0].num_workers)
    return np.sort(np.concatenate([shards_by_part[part.worker_index] for part in parts]))


def select_worker_examples(split: Split, sharding: Sharding) -> np.ndarray:
    """Return the indices of the training examples that a worker can read, int64 [n], increasing.

    If the split is sharded by record, the result is all examples, because a worker reads different ones in each epoch.
    """
    if not sharding.by_file:
        return np.arange(split.count, dtype=np.int64)
    shards, sizes = select_worker_shards(split, sharding), count_shard_records(split)
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(sizes)), sizes), shards))


def count_steps_per_epoch(split: Split, batch_size: int, sharding: Sharding = UNSHARDED) -> int:
    """Return the number of global batches per epoch, each of `batch_size` rows. The last one can be padded.

    If the split is sharded by file, the worker or part with the most batches determines the number, and the others end
    the epoch with padding.
    """
    if sharding.by_file:
        num_parts = sharding.virtual_replicas or sharding.num_workers
        sizes = count_shard_records(split)
        rows = batch_size // num_parts
        return max(-(-int(sizes[shards].sum()) // rows) for shards in assign_shards(split, num_parts))
    return -(-split.count // batch_size)


@dataclass(frozen=True)
class ShardingPlan:
    """The sharding of the training split over all workers, and the reason for it."""

    mode: ShardingMode
    num_workers: int
    steps_per_epoch: int
    reason: str  # a clause for the log line
    virtual_replicas: int | None = None  # number of them; None if each worker is one part

    def for_worker(self, worker_index: int) -> Sharding:
        """Return the sharding with which a worker trains."""
        return Sharding(worker_index, self.num_workers, self.mode, self.virtual_replicas)

    def for_scoring(self, worker_index: int) -> Sharding:
        """Return the sharding with which a worker scores examples and computes features.

        With virtual replicas, the sharding is by record, because each worker then gets examples for complete device
        calls.
        """
        return Sharding(worker_index, self.num_workers, "record" if self.virtual_replicas else self.mode)

    @property
    def checkpoint_state(self) -> dict[str, Any]:
        """The values that a checkpoint stores, which `require_resumable` compares with the plan of a resumed run."""
        # With virtual replicas, the batches depend on their number instead of the number of workers.
        num_parts = self.virtual_replicas or self.num_workers
        return {"by": self.mode, "workers": num_parts, "steps_per_epoch": self.steps_per_epoch}

    def describe(self, split: Split, worker_index: int) -> str:
        """Format the log line about the sharding, with the worker's numbers of shards and records if it is by file."""
        if self.mode == "record":
            return f"sharding: by record ({self.reason}); every worker takes its rows of each global batch"
        shards, sizes = select_worker_shards(split, self.for_worker(worker_index)), count_shard_records(split)
        paths = [shard.path for shard in split.shards]  # a split can use several ranges of a file
        num_files, num_records = len({paths[shard] for shard in shards}), sizes[shards].sum()
        return (
            f"sharding: by file ({self.reason}); worker {worker_index} has {num_files} of {len(set(paths))} shards "
            f"with {num_records:,} of {sizes.sum():,} records"
        )


def plan_sharding(
    shard_by: ShardBy, split: Split, num_workers: int, batch_size: int, image_cache: str, checkpoint: CheckpointState,
    virtual_replicas: int | None = None,
) -> ShardingPlan:  # fmt: skip
    """Choose the sharding of the training split.

    Sharding by file requires at least two workers or virtual replicas, and at least one shard for each of them.
    Otherwise the split is sharded by record. If both conditions hold, "auto" retains the checkpoint's sharding. For a
    new run, "auto" shards by file if decoded images are not cached, so that only one worker reads and decodes each
    record. With virtual replicas, "auto" shards a new run by record, because the cache can depend on the number of
    workers, and the batches must not.

    Args:
        shard_by: data.shard_by.
        split: the training split.
        batch_size: rows per global batch.
        image_cache: where decoded images are cached: "memory", "disk" or "none". It is "features" if training reads
            images only once, to compute features.
        checkpoint: `ShardingPlan.checkpoint_state` of the checkpoint to resume from; empty for a new run.
        virtual_replicas: training.virtual_replicas.
    """
    mode: ShardingMode = "record"
    num_parts = virtual_replicas or num_workers
    if num_parts > 1 and len(split.shards) >= num_parts:
        auto_mode: ShardingMode = "file" if image_cache == "none" and not virtual_replicas else "record"
        mode = checkpoint.get("by") or auto_mode if shard_by == "auto" else shard_by
    if shard_by == mode:
        reason = "as configured"
    elif num_parts == 1:
        reason = "there is one worker"
    elif not split.shards:
        reason = "image files have no shards"
    elif len(split.shards) < num_parts:
        reader_phrase = f"{num_parts} virtual replicas" if virtual_replicas else f"{num_parts} workers"
        shards = format_count(len(split.shards), "shard")
        reason = f"{shards} {'is' if len(split.shards) == 1 else 'are'} too few for {reader_phrase}"
    elif checkpoint.get("by"):
        reason = "as in the checkpoint"
    elif virtual_replicas:
        reason = "with virtual replicas, unless configured"
    elif image_cache == "features":
        reason = "features are cached"
    else:
        reason = f"{'no decoded' if image_cache == 'none' else 'decoded'} images are cached"
    steps = count_steps_per_epoch(split, batch_size, Sharding(0, num_workers, mode, virtual_replicas))
    return ShardingPlan(mode, num_workers, steps, reason, virtual_replicas)


def require_resumable(plan: ShardingPlan, checkpoint: CheckpointState, epoch_step: int) -> None:
    """Check that a run can resume from a checkpoint with this plan.

    A run that is or was sharded by file can change its sharding only at the beginning of an epoch, and only if the
    steps per epoch remain the same.

    Args:
        checkpoint: `ShardingPlan.checkpoint_state` of the checkpoint; empty for a new run.
        epoch_step: number of steps of the current epoch that the checkpoint has completed; 0 at the beginning.

    Raises:
        ConfigError: the run cannot resume with this plan.
    """
    if not checkpoint or checkpoint == plan.checkpoint_state or "file" not in (plan.mode, checkpoint["by"]):
        return
    steps_differ = checkpoint["steps_per_epoch"] != plan.steps_per_epoch
    if epoch_step or steps_differ:
        cause = "the steps per epoch differ" if steps_differ else f"the checkpoint is {epoch_step} steps into an epoch"
        state = f"the checkpoint used {checkpoint['by']} on {checkpoint['workers']} workers"
        problem = (
            f"cannot resume with another sharding: {state}, this start uses {plan.mode} on {plan.num_workers} ({cause})"
        )
        raise ConfigError(problem, fix=f"resume with {checkpoint['workers']} workers")
