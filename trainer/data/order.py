"""The order of examples, computed in blocks.

A block is a pure function of its index, so a stream can begin at any step.

Everything is computed in the graph, without `tf.py_function`. Under op determinism (`runtime.deterministic`),
TensorFlow removes all parallelism and prefetching from a pipeline with a stateful op (grappler's make_deterministic).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.data.sharding import UNSHARDED, Sharding, assign_shards, count_shard_records, steps_per_epoch
from trainer.stateless_random import ORDER, SHARDS, SUBSET, random_bits
from trainer.types import Split

BLOCK_RECORDS = 1024  # span of a block in records, if they are not shuffled
ROWS_PER_WORKER = 1 << 40  # more than any worker has; offset between the random streams of two workers


@dataclass(frozen=True)
class Order:
    """The order of the training examples, and the step at which their stream begins."""

    batch_size: int  # rows of a global batch; a multiple of the number of workers
    seed: int
    window: int  # records that are shuffled together (data.shuffle_window); see `plan_windows`
    first_epoch: int = 0
    first_step: int = 0  # counted from the beginning of `first_epoch`; can exceed its length
    shuffle: bool = True  # False: in index order, except with sharding by file
    sharding: Sharding = UNSHARDED

    @property
    def rows(self) -> int:
        """Rows of each worker in a global batch."""
        return self.batch_size // self.sharding.workers


# A block: r consecutive rows of an epoch, and the record ranges to read for them.
#   ranges   int64 [k, 3]  shard index, first record, record count; k = 0 for image files
#   offset   int64 [r]     index of the row's record in the concatenated ranges (unused for image files)
#   index    int64 [r]     example index (0 in padding)
#   weight   float32 [r]   1 for an example, 0 for padding
#   position int64 [r]     row of the global batch
#   epoch    int64 [r]
Block = dict[str, tf.Tensor]

Window = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # ranges, offset and index of a block, without padding


def _sort_permutation(keys: tf.Tensor) -> tf.Tensor:
    """Return the permutation that sorts random keys, int64 [n]."""
    return tf.cast(tf.argsort(keys), tf.int64)


class _ShardRecords:
    """Map the concatenated records of some shards of a split to record ranges and example indices."""

    def __init__(self, split: Split, shards: np.ndarray | None = None) -> None:
        """`shards` are indices of the split's shards, int64 [s], by default all."""
        self.shards = np.arange(len(split.shards)) if shards is None else shards
        self.starts = np.array([shard.start for shard in split.shards], np.int64)
        self.sizes = count_shard_records(split)
        self.first_index = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes[self.shards].sum())

    def locate(self, shards: tf.Tensor, start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the record ranges and example indices of records [start, stop) of the concatenated `shards`."""
        sizes = tf.gather(tf.constant(self.sizes), shards)
        ends = tf.cumsum(sizes)
        begins = ends - sizes
        overlaps = tf.logical_and(tf.logical_and(ends > start, begins < stop), sizes > 0)
        shards, begins, ends = (tf.boolean_mask(x, overlaps) for x in (shards, begins, ends))
        low, high = tf.maximum(begins, start), tf.minimum(ends, stop)
        ranges = tf.stack([shards, tf.gather(tf.constant(self.starts), shards) + low - begins, high - low], axis=1)
        index_shift = tf.gather(tf.constant(self.first_index), shards) - begins
        return ranges, tf.repeat(index_shift, high - low) + tf.range(start, stop)


def plan_windows(
    split: Split, seed: int, window: int, shuffle: bool = True, shards: np.ndarray | None = None, worker: int = 0
) -> tuple[int, Callable[..., Window]]:
    """Return the number of windows per epoch, and a function (epoch, window index) that computes a window.

    A window is a range of examples that are shuffled together. In each epoch the shards are permuted, concatenated and
    divided into windows of `window` records. All image files are one window, since opening them in random order costs
    nothing extra. Without `shuffle`, the examples are in index order. If workers read different `shards` (None: all),
    `worker` selects the random stream.
    """

    def file_window(epoch: tf.Tensor, _index: tf.Tensor) -> Window:
        index = tf.range(split.count, dtype=tf.int64)
        if shuffle:
            index = _sort_permutation(random_bits(seed, ORDER, epoch, index))
        return tf.zeros([0, 3], tf.int64), tf.zeros_like(index), index

    if not split.shards:
        return 1, file_window
    records = _ShardRecords(split, shards)

    def record_window(epoch: tf.Tensor, window_index: tf.Tensor) -> Window:
        order = tf.constant(records.shards, tf.int64)
        if shuffle:
            order = tf.gather(order, _sort_permutation(random_bits(seed, SHARDS, epoch, order)))
        start, stop = window_index * window, tf.minimum((window_index + 1) * window, records.total)
        ranges, index = records.locate(order, start, stop)
        if not shuffle:
            return ranges, tf.range(stop - start), index
        offset = _sort_permutation(random_bits(seed, ORDER, epoch, worker * ROWS_PER_WORKER + tf.range(start, stop)))
        return ranges, offset, tf.gather(index, offset)

    return -(-records.total // window), record_window


def _build_block(window: Window, start: tf.Tensor, total: int, batch: int, epoch: tf.Tensor, padding: int) -> Block:
    """Build the block of a window, whose first row is row `start` of `total`. The last block of an epoch is padded."""
    ranges, offset, index = window
    rows = tf.size(index, tf.int64)
    padding = tf.where(start + rows >= total, tf.constant(padding, tf.int64), 0)
    paddings = tf.stack([tf.constant(0, tf.int64), padding])[None, :]
    return {
        "ranges": ranges,
        "offset": tf.pad(offset, paddings),
        "index": tf.pad(index, paddings),
        "weight": tf.pad(tf.ones_like(index, tf.float32), paddings),
        "position": (start + tf.range(rows + padding)) % batch,
        "epoch": tf.fill([rows + padding], epoch),
    }


def make_training_blocks(split: Split, order: Order) -> Callable[[tf.Tensor], Block]:
    """Make a function from the index of a block to the block, for an infinite stream that begins at the first step.

    Block 0 is in the window of the first step, so earlier windows of its epoch are not read. A block has only the rows
    of this worker, so it can be empty. With sharding by file, a worker with fewer records than others ends each epoch
    with padding.
    """
    sharding, by_file, rows = order.sharding, order.sharding.by_file, order.rows
    shards = assign_shards(split, sharding.workers)[sharding.worker] if by_file else None
    total, batch = (int(count_shard_records(split)[shards].sum()), rows) if by_file else (split.count, order.batch_size)
    steps = steps_per_epoch(split, order.batch_size, sharding)
    shuffle = order.shuffle or by_file
    window_size = (order.window if shuffle else BLOCK_RECORDS) if split.shards else total
    worker = sharding.worker if by_file else 0
    per_epoch, make_window = plan_windows(split, order.seed, window_size, shuffle, shards, worker)
    first_epoch, first_row = order.first_epoch + order.first_step // steps, order.first_step % steps * batch
    # If the first step is only padding, the stream begins in the last window, whose examples all precede the step.
    first_window = min(first_row // window_size, per_epoch - 1)

    def compute_block(block_index: tf.Tensor) -> Block:
        windows_done = tf.cast(block_index, tf.int64) + first_window
        epochs_done, window_index = windows_done // per_epoch, windows_done % per_epoch
        epoch, start = first_epoch + epochs_done, window_index * window_size
        padded = _build_block(make_window(epoch, window_index), start, total, batch, epoch, steps * batch - total)
        rows_done = tf.where(tf.equal(epochs_done, 0), tf.maximum(first_row - start, 0), 0)
        block = {name: value if name == "ranges" else value[rows_done:] for name, value in padded.items()}
        if by_file:
            return {**block, "position": block["position"] + worker * rows}
        if sharding.workers == 1:
            return block
        mask = tf.equal(block["position"] // rows, sharding.worker)
        return {name: value if name == "ranges" else tf.boolean_mask(value, mask) for name, value in block.items()}

    return compute_block


def make_sequence_blocks(
    split: Split, indices: np.ndarray, batch_size: int
) -> tuple[int, Callable[[tf.Tensor], Block]]:
    """Return the number of blocks for given examples, and a function from the index of a block to the block.

    `indices` are increasing, int64 [n]. The last block is padded to whole batches.
    """
    edges = np.array([0, len(indices)], np.int64)
    if split.shards:  # a block spans at most BLOCK_RECORDS records, however few of them it has
        limits = np.arange(0, split.count + BLOCK_RECORDS, BLOCK_RECORDS)
        edges = np.unique(np.searchsorted(indices, limits)).astype(np.int64)
    records, zero = _ShardRecords(split), tf.zeros([], tf.int64)

    def compute_block(block_index: tf.Tensor) -> Block:
        first, last = tf.gather(tf.constant(edges), block_index), tf.gather(tf.constant(edges), block_index + 1)
        index = tf.constant(indices, tf.int64)[first:last]
        ranges, offset = tf.zeros([0, 3], tf.int64), index - index[0]
        if split.shards:
            ranges, _ = records.locate(tf.constant(records.shards, tf.int64), index[0], index[-1] + 1)
        return _build_block((ranges, offset, index), first, len(indices), batch_size, zero, -len(indices) % batch_size)

    return len(edges) - 1 if len(indices) else 0, compute_block


BlockShards = tuple[int, np.ndarray]  # rows of this worker in a block, and the indices of its shards, int64 [k]


def compute_block_shards(block: Callable[[tf.Tensor], Block], count: int | None) -> Iterator[BlockShards]:
    """Compute on the host the rows and shards of nonempty blocks 0 to `count` - 1, infinite if None."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
    def compute(block_index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        columns = block(block_index)
        return tf.size(columns["index"]), columns["ranges"][:, 0]

    with tf.device("CPU:0"):
        computed = compute.get_concrete_function()  # a run has many pipelines, each with a trace: no warning of it
    for block_index in itertools.count() if count is None else range(count):
        with tf.device("CPU:0"):
            rows, shards = computed(tf.constant(block_index, tf.int64))
        if int(rows):
            yield int(rows), shards.numpy()


def split_by_calls(indices: np.ndarray, rows: int, workers: int) -> list[np.ndarray]:
    """Split `indices`, int64 [n], among `workers` into parts of whole device calls of `rows` images.

    On some processors the bits of a result depend on the position of its image in the call, because a kernel computes
    the last elements of a batch with other instructions. With whole calls the position does not depend on `workers`.
    No part is larger than the first.
    """
    calls = np.arange(0, len(indices), rows)
    edges = [part[0] if len(part) else len(indices) for part in np.array_split(calls, workers)]
    return np.split(indices, edges[1:])


def select_examples_to_score(
    split: Split, batch_size: int, fraction: float, sharding: Sharding = UNSHARDED, rows: int | None = None
) -> np.ndarray:
    """Return the indices, int64 [n], increasing, of the examples that this worker scores.

    A `fraction` below 1 selects that fraction of the batches, from a random permutation that is always the same.
    With `rows`, the workers divide whole device calls of that many images.
    """
    indices = np.arange(split.count, dtype=np.int64)
    if fraction < 1:
        batches = int(np.ceil(fraction * steps_per_epoch(split, batch_size)))
        shuffled = _sort_permutation(random_bits(SUBSET, tf.constant(indices))).numpy()
        indices = np.sort(shuffled[: batches * batch_size])
    if rows:
        return split_by_calls(indices, rows, sharding.workers)[sharding.worker]
    return np.array_split(indices, sharding.workers)[sharding.worker]
