"""Compute the order of examples in blocks of consecutive rows.

A block is a pure function of its index, so a stream of training examples can begin at any step.

Everything is computed in the graph, without `tf.py_function`, which is a stateful op. Under op determinism
(`runtime.deterministic`), TensorFlow removes all parallelism and prefetching from a pipeline with a stateful op
(grappler's make_deterministic).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.data.sharding import UNSHARDED, Sharding, assign_shards, count_shard_records, count_steps_per_epoch
from trainer.stateless_random import ORDER, SHARDS, SUBSET, random_bits
from trainer.types import Split

MAX_BLOCK_RECORDS = 1024  # maximum number of records that a block spans, if they are not shuffled
WORKER_STREAM_OFFSET = 1 << 40  # offset between two workers' random streams; no worker has as many rows


@dataclass(frozen=True)
class Order:
    """The order of the training examples, and the step at which their stream begins."""

    batch_size: int  # rows of a global batch; a multiple of the number of workers
    seed: int
    window: int  # number of records that are shuffled together (data.shuffle_window); see `plan_windows`
    first_epoch: int = 0
    first_step: int = 0  # counted from the beginning of `first_epoch`; can exceed the steps of an epoch
    shuffle: bool = True  # False: in index order, except with sharding by file, which always shuffles
    sharding: Sharding = UNSHARDED

    @property
    def rows_per_worker(self) -> int:
        """Number of rows that each worker has in a global batch."""
        return self.batch_size // self.sharding.num_workers


# A block: r consecutive rows of an epoch, and the record ranges to read for them.
#   ranges   int64 [k, 3]  shard index, first record, record count; k = 0 for image files
#   offset   int64 [r]     index of the row's record in the concatenated ranges (unused for image files)
#   index    int64 [r]     example index in the split (0 in padding)
#   weight   float32 [r]   1 for an example, 0 for padding
#   position int64 [r]     index of the row in the global batch
#   epoch    int64 [r]     epoch in which the row is read
Block = dict[str, tf.Tensor]

Window = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # `ranges`, `offset` and `index`, as in a block without padding


def _sort_permutation(keys: tf.Tensor) -> tf.Tensor:
    """Return the permutation, int64 [n], that sorts random keys, int64 [n]."""
    return tf.cast(tf.argsort(keys), tf.int64)


class _ShardRecords:
    """Maps positions in the concatenated records of a split's shards to record ranges and example indices."""

    def __init__(self, split: Split, shards: np.ndarray | None = None) -> None:
        """`shards` are shard indices in the split, int64 [s], which default to all shards."""
        self.shards = np.arange(len(split.shards)) if shards is None else shards
        self.starts = np.array([shard.start for shard in split.shards], np.int64)
        self.sizes = count_shard_records(split)
        self.first_index = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes[self.shards].sum())

    def locate(self, shards: tf.Tensor, start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Locate the records [start, stop) in the concatenation of the shards with the indices `shards`, int64 [s].

        Returns:
            The record ranges, int64 [k, 3], as in a `Block`, and the example indices, int64 [stop - start].
        """
        sizes = tf.gather(tf.constant(self.sizes), shards)
        ends = tf.cumsum(sizes)
        begins = ends - sizes
        overlaps = tf.logical_and(tf.logical_and(ends > start, begins < stop), sizes > 0)
        shards, begins, ends = (tf.boolean_mask(tensor, overlaps) for tensor in (shards, begins, ends))
        low, high = tf.maximum(begins, start), tf.minimum(ends, stop)
        ranges = tf.stack([shards, tf.gather(tf.constant(self.starts), shards) + low - begins, high - low], axis=1)
        index_shift = tf.gather(tf.constant(self.first_index), shards) - begins
        return ranges, tf.repeat(index_shift, high - low) + tf.range(start, stop)


def plan_windows(
    split: Split, seed: int, window: int, shuffle: bool = True, shards: np.ndarray | None = None, worker: int = 0
) -> tuple[int, Callable[..., Window]]:
    """Divide an epoch into windows, which are ranges of examples that are shuffled together.

    In each epoch the shards are permuted, concatenated and divided into windows. All image files are one window,
    because opening files in random order costs nothing extra.

    Args:
        window: number of records per window. It has no effect on image files.
        shuffle: whether shards and examples are shuffled. If False, the examples are in index order.
        shards: indices of the shards to read, int64 [s]. Defaults to all shards.
        worker: index that selects the random stream. It must differ between workers that read different shards.

    Returns:
        The number of windows per epoch, and a function of epoch and window index, both int64, that computes a `Window`.
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
        offset = _sort_permutation(
            random_bits(seed, ORDER, epoch, worker * WORKER_STREAM_OFFSET + tf.range(start, stop))
        )
        return ranges, offset, tf.gather(index, offset)

    return -(-records.total // window), record_window


def _build_block(
    window: Window, start: tf.Tensor, epoch_rows: int, batch_rows: int, epoch: tf.Tensor, padding: int
) -> Block:
    """Build the block of a window. If the window is the last one of its epoch, append `padding` rows.

    The window's first row is row `start` of the epoch's `epoch_rows` rows. Positions are counted modulo `batch_rows`.
    """
    ranges, offset, index = window
    num_rows = tf.size(index, tf.int64)
    padding = tf.where(start + num_rows >= epoch_rows, tf.constant(padding, tf.int64), 0)
    paddings = tf.stack([tf.constant(0, tf.int64), padding])[None, :]
    return {
        "ranges": ranges,
        "offset": tf.pad(offset, paddings),
        "index": tf.pad(index, paddings),
        "weight": tf.pad(tf.ones_like(index, tf.float32), paddings),
        "position": (start + tf.range(num_rows + padding)) % batch_rows,
        "epoch": tf.fill([num_rows + padding], epoch),
    }


def make_training_blocks(split: Split, order: Order) -> Callable[[tf.Tensor], Block]:
    """Return a function that computes a block of an infinite stream of training examples from the block's index, int64.

    The stream begins at `order.first_step`. Block 0 comes from the window of this step, so that earlier windows of the
    epoch are not read. A block has only this worker's rows, so it can be empty. With sharding by file, a worker with
    fewer records than others ends each epoch with padding.
    """
    sharding, by_file, rows = order.sharding, order.sharding.by_file, order.rows_per_worker
    shards = assign_shards(split, sharding.num_workers)[sharding.worker_index] if by_file else None
    # Number of rows per epoch and per step in the stream from which this worker takes its rows.
    epoch_rows, step_rows = split.count, order.batch_size
    if by_file:
        epoch_rows, step_rows = int(count_shard_records(split)[shards].sum()), rows
    step_count = count_steps_per_epoch(split, order.batch_size, sharding)
    shuffle = order.shuffle or by_file
    window_size = (order.window if shuffle else MAX_BLOCK_RECORDS) if split.shards else epoch_rows
    worker = sharding.worker_index if by_file else 0
    num_windows, make_window = plan_windows(split, order.seed, window_size, shuffle, shards, worker)
    first_epoch = order.first_epoch + order.first_step // step_count
    first_row = order.first_step % step_count * step_rows
    # If the first step is only padding, the stream begins in the last window, whose examples all precede the step.
    first_window = min(first_row // window_size, num_windows - 1)

    def compute_block(block_index: tf.Tensor) -> Block:
        windows_done = tf.cast(block_index, tf.int64) + first_window
        epochs_done, window_index = windows_done // num_windows, windows_done % num_windows
        epoch, start = first_epoch + epochs_done, window_index * window_size
        padding = step_count * step_rows - epoch_rows
        columns = _build_block(make_window(epoch, window_index), start, epoch_rows, step_rows, epoch, padding)
        rows_done = tf.where(tf.equal(epochs_done, 0), tf.maximum(first_row - start, 0), 0)
        block = {name: value if name == "ranges" else value[rows_done:] for name, value in columns.items()}
        if by_file:
            return {**block, "position": block["position"] + worker * rows}
        if sharding.num_workers == 1:
            return block
        mask = tf.equal(block["position"] // rows, sharding.worker_index)
        return {name: value if name == "ranges" else tf.boolean_mask(value, mask) for name, value in block.items()}

    return compute_block


def make_sequence_blocks(
    split: Split, indices: np.ndarray, batch_size: int
) -> tuple[int, Callable[[tf.Tensor], Block]]:
    """Divide selected examples into blocks, in index order and in epoch 0.

    Args:
        indices: indices of the examples, int64 [n], increasing.
        batch_size: rows per batch. The last block is padded so that all batches are complete.

    Returns:
        The number of blocks, and a function that computes a block from its index, int64.
    """
    edges = np.array([0, len(indices)], np.int64)
    if split.shards:  # a block reads all records from its first to its last one, even if it uses few of them
        record_edges = np.arange(0, split.count + MAX_BLOCK_RECORDS, MAX_BLOCK_RECORDS)
        edges = np.unique(np.searchsorted(indices, record_edges)).astype(np.int64)
    records = _ShardRecords(split)
    zero = tf.zeros([], tf.int64)

    def compute_block(block_index: tf.Tensor) -> Block:
        first, last = tf.gather(tf.constant(edges), block_index), tf.gather(tf.constant(edges), block_index + 1)
        index = tf.constant(indices, tf.int64)[first:last]
        ranges, offset = tf.zeros([0, 3], tf.int64), index - index[0]
        if split.shards:
            ranges, _ = records.locate(tf.constant(records.shards, tf.int64), index[0], index[-1] + 1)
        return _build_block((ranges, offset, index), first, len(indices), batch_size, zero, -len(indices) % batch_size)

    return len(edges) - 1 if len(indices) else 0, compute_block


BlockShards = tuple[int, np.ndarray]  # number of rows in a block, and the indices of its shards, int64 [k]


def compute_block_shards(block: Callable[[tf.Tensor], Block], count: int | None) -> Iterator[BlockShards]:
    """Yield the number of rows and the shard indices of each nonempty block, computed on the host.

    Args:
        block: function that computes a block from its index, int64.
        count: number of blocks; None for an infinite number.
    """

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
    def compute(block_index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        columns = block(block_index)
        return tf.size(columns["index"]), columns["ranges"][:, 0]

    with tf.device("CPU:0"):
        # `compute` is not called directly, because TensorFlow would warn that each of many pipelines traces it again.
        concrete_function = compute.get_concrete_function()
    for block_index in itertools.count() if count is None else range(count):
        with tf.device("CPU:0"):
            num_rows, shards = concrete_function(tf.constant(block_index, tf.int64))
        if int(num_rows):
            yield int(num_rows), shards.numpy()


def split_by_device_calls(indices: np.ndarray, rows_per_call: int, num_workers: int) -> list[np.ndarray]:
    """Split `indices`, int64 [n], into one array per worker, each with complete device calls of `rows_per_call` images.

    Only the last worker's last call can have fewer images. No array is larger than the first.

    On some processors the bits of a result depend on its image's position in the call, because a kernel computes the
    last elements of a batch with other instructions. With complete calls, positions do not depend on `num_workers`.
    """
    call_starts = np.arange(0, len(indices), rows_per_call)
    edges = [starts[0] if len(starts) else len(indices) for starts in np.array_split(call_starts, num_workers)]
    return np.split(indices, edges[1:])


def select_examples_to_score(
    split: Split, batch_size: int, fraction: float, sharding: Sharding = UNSHARDED, rows_per_call: int | None = None
) -> np.ndarray:
    """Return the indices, int64 [n], increasing, of the examples that this worker scores.

    Args:
        batch_size: examples per global batch.
        fraction: fraction of the batches to score, rounded up. Below 1, the examples are a random sample, which is the
            same in each call of this function.
        rows_per_call: images per device call, so that workers get complete calls (`split_by_device_calls`); None to
            divide the examples evenly.
    """
    indices = np.arange(split.count, dtype=np.int64)
    if fraction < 1:
        num_batches = int(np.ceil(fraction * count_steps_per_epoch(split, batch_size)))
        shuffled = _sort_permutation(random_bits(SUBSET, tf.constant(indices))).numpy()
        indices = np.sort(shuffled[: num_batches * batch_size])
    if rows_per_call:
        return split_by_device_calls(indices, rows_per_call, sharding.num_workers)[sharding.worker_index]
    return np.array_split(indices, sharding.num_workers)[sharding.worker_index]
