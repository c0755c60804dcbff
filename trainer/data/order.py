"""The order of the training examples: order and position as pure functions of (seed, epoch, step).

All of it is in the graph, without `tf.py_function`: under op determinism (`runtime.deterministic`) TensorFlow removes
every parallel call and prefetch from a pipeline that has a stateful op (grappler's make_deterministic).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.data.sharding import UNSHARDED, Sharding, shard_sizes, shards_of_workers, steps_per_epoch
from trainer.stateless_random import ORDER, SHARDS, SUBSET, bits
from trainer.types import Split

BLOCK_RECORDS = 1024  # records per block without shuffling
ROWS_PER_WORKER = 1 << 40  # more than any worker has: offset between the random numbers of two workers


@dataclass(frozen=True)
class Order:
    """Order of the training examples, and the step at which a stream of them begins."""

    batch_size: int  # of the global batch; a multiple of the number of workers
    seed: int
    window: int  # records that are shuffled together; see `windows`
    first_epoch: int = 0
    first_step: int = 0  # of that epoch
    shuffle: bool = True  # False: in the order of the indices
    sharding: Sharding = UNSHARDED

    @property
    def rows(self) -> int:
        """Rows of this worker in each global batch."""
        return self.batch_size // self.sharding.workers


# Consecutive rows of an epoch (r of them), and the record ranges to read for them.
#   ranges   int64 [k, 3]  shard number, first record, count; k = 0 for image files
#   offset   int64 [r]     position of the row's example in the records of all ranges
#   index    int64 [r]     example index (0 in padding)
#   weight   float32 [r]   1 for an example, 0 for padding
#   position int64 [r]     index in the global batch
#   epoch    int64 [r]
Block = dict[str, tf.Tensor]


Window = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # ranges, offset and index of a block without padding


def _shuffle(keys: tf.Tensor) -> tf.Tensor:
    """Return the permutation that sorts random bits, int64 [n]."""
    return tf.cast(tf.argsort(keys), tf.int64)


class _Records:
    """Concatenated records of the shards of a split."""

    def __init__(self, split: Split, chosen: np.ndarray | None = None) -> None:
        """`chosen`: int64 [c], numbers of the shards to use; None: all of them."""
        self.chosen = np.arange(len(split.shards)) if chosen is None else chosen
        self.starts = np.array([shard.start for shard in split.shards], np.int64)
        self.sizes = shard_sizes(split)
        self.first_index = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes[self.chosen].sum())

    def read(self, shards: tf.Tensor, start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return record ranges and example indices of positions [start, stop) in these concatenated shards."""
        sizes = tf.gather(tf.constant(self.sizes), shards)
        ends = tf.cumsum(sizes)
        begins = ends - sizes
        touched = tf.logical_and(tf.logical_and(ends > start, begins < stop), sizes > 0)
        shards, begins, ends = (tf.boolean_mask(x, touched) for x in (shards, begins, ends))
        low, high = tf.maximum(begins, start), tf.minimum(ends, stop)
        ranges = tf.stack([shards, tf.gather(tf.constant(self.starts), shards) + low - begins, high - low], axis=1)
        index_minus_position = tf.gather(tf.constant(self.first_index), shards) - begins
        return ranges, tf.repeat(index_minus_position, high - low) + tf.range(start, stop)


def windows(
    split: Split, seed: int, window: int, shuffle: bool = True, chosen: np.ndarray | None = None, worker: int = 0
) -> tuple[int, Callable[..., Window]]:
    """Return the number of windows per epoch, and a function of (epoch, number) that computes a window.

    Shards are permuted and concatenated, then divided into windows of `window` records, each shuffled as a whole. Image
    files, which can be opened in any order at no cost and are often sorted by class, form one window. Without `shuffle`
    the order is that of the indices.
    """

    def file_window(epoch: tf.Tensor, _number: tf.Tensor) -> Window:
        index = tf.range(split.count, dtype=tf.int64)
        if shuffle:
            index = _shuffle(bits(seed, ORDER, epoch, index))
        return tf.zeros([0, 3], tf.int64), tf.zeros_like(index), index

    if not split.shards:
        return 1, file_window
    records = _Records(split, chosen)

    def record_window(epoch: tf.Tensor, number: tf.Tensor) -> Window:
        shards = tf.constant(records.chosen, tf.int64)
        if shuffle:
            shards = tf.gather(shards, _shuffle(bits(seed, SHARDS, epoch, shards)))
        start, stop = number * window, tf.minimum((number + 1) * window, records.total)
        ranges, index = records.read(shards, start, stop)
        if not shuffle:
            return ranges, tf.range(stop - start), index
        offset = _shuffle(bits(seed, ORDER, epoch, worker * ROWS_PER_WORKER + tf.range(start, stop)))
        return ranges, offset, tf.gather(index, offset)

    return -(-records.total // window), record_window


def _block(window: Window, start: tf.Tensor, total: int, batch: int, epoch: tf.Tensor, padding: int) -> Block:
    """Return the block whose first row is row `start` of the epoch; the last one is padded by `padding` rows."""
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


def training_blocks(split: Split, order: Order) -> Callable[[tf.Tensor], Block]:
    """Return a function that computes block 0, 1, ... of the infinite stream that begins at the order's first step.

    A resume reads only the window of its first step. Each worker gets its own rows, so a block may be empty. By file, a
    worker with fewer records than the others ends each epoch with padding.
    """
    sharding, own_files, rows = order.sharding, order.sharding.own_files, order.rows
    chosen = shards_of_workers(split, sharding.workers)[sharding.worker] if own_files else None
    total, batch = (int(shard_sizes(split)[chosen].sum()), rows) if own_files else (split.count, order.batch_size)
    steps = steps_per_epoch(split, order.batch_size, sharding)
    shuffle = order.shuffle or own_files
    window_size = (order.window if shuffle else BLOCK_RECORDS) if split.shards else total
    worker = sharding.worker if own_files else 0
    per_epoch, make_window = windows(split, order.seed, window_size, shuffle, chosen, worker)
    first_epoch, first_row = order.first_epoch + order.first_step // steps, order.first_step % steps * batch
    # A first step within the padding begins with the last window, of which only padding is left.
    first_number = min(first_row // window_size, per_epoch - 1)

    def block(number: tf.Tensor) -> Block:
        number = tf.cast(number, tf.int64) + first_number
        epochs_done, number = number // per_epoch, number % per_epoch
        epoch, start = first_epoch + epochs_done, number * window_size
        whole = _block(make_window(epoch, number), start, total, batch, epoch, steps * batch - total)
        rows_done = tf.where(tf.equal(epochs_done, 0), tf.maximum(first_row - start, 0), 0)
        own = {name: value if name == "ranges" else value[rows_done:] for name, value in whole.items()}
        if own_files:
            return {**own, "position": own["position"] + worker * rows}
        if sharding.workers == 1:
            return own
        mine = tf.equal(own["position"] // rows, sharding.worker)
        return {name: value if name == "ranges" else tf.boolean_mask(value, mine) for name, value in own.items()}

    return block


def sequence_blocks(split: Split, chosen: np.ndarray, batch_size: int) -> tuple[int, Callable[[tf.Tensor], Block]]:
    """Return the number of blocks of `chosen` (increasing indices), padded to whole batches, and their function."""
    edges = np.array([0, len(chosen)], np.int64)
    if split.shards:  # a block spans at most BLOCK_RECORDS records, however few of them are chosen
        limits = np.arange(0, split.count + BLOCK_RECORDS, BLOCK_RECORDS)
        edges = np.unique(np.searchsorted(chosen, limits)).astype(np.int64)
    records, zero = _Records(split), tf.zeros([], tf.int64)

    def block(number: tf.Tensor) -> Block:
        first, last = tf.gather(tf.constant(edges), number), tf.gather(tf.constant(edges), number + 1)
        index = tf.constant(chosen, tf.int64)[first:last]
        ranges, offset = tf.zeros([0, 3], tf.int64), index - index[0]
        if split.shards:
            ranges, _ = records.read(tf.constant(records.chosen, tf.int64), index[0], index[-1] + 1)
        return _block((ranges, offset, index), first, len(chosen), batch_size, zero, -len(chosen) % batch_size)

    return len(edges) - 1 if len(chosen) else 0, block


Read = tuple[int, np.ndarray]  # rows of this worker in a block, int64 numbers of the shards that it reads


def block_reads(block: Callable[[tf.Tensor], Block], count: int | None) -> Iterator[Read]:
    """Compute the reads of blocks 0, 1, ... that have rows of this worker, on the host; infinite if `count` is None."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
    def read(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        made = block(number)
        return tf.size(made["index"]), made["ranges"][:, 0]

    for number in itertools.count() if count is None else range(count):
        with tf.device("CPU:0"):
            rows, shards = read(tf.constant(number, tf.int64))
        if int(rows):
            yield int(rows), shards.numpy()


def examples_to_score(split: Split, batch_size: int, fraction: float, sharding: Sharding = UNSHARDED) -> np.ndarray:
    """Return the examples that this worker scores, increasing int64 indices; a fraction comes from a fixed shuffle."""
    indices = np.arange(split.count, dtype=np.int64)
    if fraction < 1:
        batches = int(np.ceil(fraction * steps_per_epoch(split, batch_size)))
        shuffled = _shuffle(bits(SUBSET, tf.constant(indices))).numpy()
        indices = np.sort(shuffled[: batches * batch_size])
    return np.array_split(indices, sharding.workers)[sharding.worker]
