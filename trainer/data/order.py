"""The order of the training examples: order and position as pure functions of (seed, epoch, step).

All of it is in the graph. One Python function in a dataset would do the same, but where ops are deterministic
(`runtime.deterministic`) TensorFlow then takes every parallel call and prefetch out of the whole pipeline: it cannot
know what a stateful op does (grappler's make_deterministic).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data.sharding import UNSHARDED, Sharding, shard_sizes, shards_of_workers, steps_per_epoch
from trainer.stateless_random import ORDER, SHARDS, SUBSET, bits
from trainer.types import Split

STRETCH = 1024  # records that are read together where no shuffling asks for more
ROWS_PER_WORKER = 1 << 40  # far more than any worker has: keeps the random numbers of workers apart


@dataclass(frozen=True)
class Order:
    """The settings of the order of training examples, and the step at which a stream of them begins."""

    batch_size: int  # of the global batch; the number of workers divides it
    seed: int
    window: int  # records that are shuffled together; see `windows`
    first_epoch: int = 0
    first_step: int = 0  # of that epoch
    shuffle: bool = True  # False keeps the order of the indices
    sharding: Sharding = UNSHARDED

    @property
    def rows(self) -> int:
        """Rows of a global batch that are this worker's."""
        return self.batch_size // self.sharding.workers


# A stretch of an epoch: r rows in order, and the records that have to be read for them.
#   pieces   int64 [k, 3]  shard number, first record, count; none for image files
#   offset   int64 [r]     index of the row's example among those records
#   index    int64 [r]     the row's example (0 in padding)
#   weight   float32 [r]   1 for an example, 0 for padding
#   position int64 [r]     index in the global batch
#   epoch    int64 [r]
Block = dict[str, tf.Tensor]


class Part(NamedTuple):
    """Some rows of an epoch in the order in which they are trained on; as in a block, without its padding."""

    pieces: tf.Tensor
    offset: tf.Tensor
    index: tf.Tensor


def _shuffle(keys: tf.Tensor) -> tf.Tensor:
    """The permutation that sorts random bits, int64 [n]."""
    return tf.cast(tf.argsort(keys), tf.int64)


class _Records:
    """The records of a split in its shards, laid end to end in some order."""

    def __init__(self, split: Split, chosen: np.ndarray | None = None) -> None:
        """`chosen`: int64 [c], the shards to count with; all of them when None."""
        self.chosen = np.arange(len(split.shards)) if chosen is None else chosen
        starts = np.array([shard.start for shard in split.shards], np.int64)
        sizes = shard_sizes(split)
        self.starts, self.sizes, self.first_index = starts, sizes, np.cumsum(sizes) - sizes
        self.total = int(sizes[self.chosen].sum())

    def stretch(self, shards: tf.Tensor, start: tf.Tensor, stop: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Positions [start, stop) of these shards: the pieces to read, and the indices of their examples."""
        sizes = tf.gather(tf.constant(self.sizes), shards)
        ends = tf.cumsum(sizes)
        begins = ends - sizes
        touched = tf.logical_and(tf.logical_and(ends > start, begins < stop), sizes > 0)
        shards, begins, ends = (tf.boolean_mask(x, touched) for x in (shards, begins, ends))
        low, high = tf.maximum(begins, start), tf.minimum(ends, stop)
        pieces = tf.stack([shards, tf.gather(tf.constant(self.starts), shards) + low - begins, high - low], axis=1)
        index_less_place = tf.gather(tf.constant(self.first_index), shards) - begins
        return pieces, tf.repeat(index_less_place, high - low) + tf.range(start, stop)


def _nothing_to_read() -> tf.Tensor:
    return tf.zeros([0, 3], tf.int64)


def windows(
    split: Split, seed: int, window: int, shuffle: bool = True, chosen: np.ndarray | None = None, worker: int = 0
) -> tuple[int, Callable[..., Part]]:
    """The number of windows in an epoch, and a function of (epoch, number) to the part that one of them is.

    Shards are permuted and laid end to end, then cut into windows of `window` records of which each is shuffled whole.
    Image files can be opened in any order at no cost (and lie sorted by class), so they are one window. Without
    `shuffle` the examples come in the order of their indices.
    """

    def of_files(epoch: tf.Tensor, _number: tf.Tensor) -> Part:
        index = tf.range(split.count, dtype=tf.int64)
        if shuffle:
            index = _shuffle(bits(seed, ORDER, epoch, index))
        return Part(_nothing_to_read(), tf.zeros_like(index), index)

    if not split.shards:
        return 1, of_files
    records = _Records(split, chosen)

    def of_records(epoch: tf.Tensor, number: tf.Tensor) -> Part:
        shards = tf.constant(records.chosen, tf.int64)
        if shuffle:
            shards = tf.gather(shards, _shuffle(bits(seed, SHARDS, epoch, shards)))
        start, stop = number * window, tf.minimum((number + 1) * window, records.total)
        pieces, index = records.stretch(shards, start, stop)
        if not shuffle:
            return Part(pieces, tf.range(stop - start), index)
        offset = _shuffle(bits(seed, ORDER, epoch, worker * ROWS_PER_WORKER + tf.range(start, stop)))
        return Part(pieces, offset, tf.gather(index, offset))

    return -(-records.total // window), of_records


def _block(part: Part, start: tf.Tensor, total: int, batch: int, epoch: tf.Tensor, padding: int) -> Block:
    """A block whose first row is row `start` of the epoch; the one that ends it is padded by `padding` rows."""
    pieces, offset, index = part
    rows = tf.size(index, tf.int64)
    padding = tf.where(start + rows >= total, tf.constant(padding, tf.int64), 0)
    behind = tf.stack([tf.constant(0, tf.int64), padding])[None, :]
    return {
        "pieces": pieces,
        "offset": tf.pad(offset, behind),
        "index": tf.pad(index, behind),
        "weight": tf.pad(tf.ones_like(index, tf.float32), behind),
        "position": (start + tf.range(rows + padding)) % batch,
        "epoch": tf.fill([rows + padding], epoch),
    }


def training_blocks(split: Split, order: Order) -> Callable[[tf.Tensor], Block]:
    """Block number 0, 1, ... of the endless stream of epochs that begins at the order's first step.

    What lies before is jumped over by arithmetic: of the first block only the records of its own window are read. Of
    several workers each gets the rows that are its own; a block may then be empty. By file, a worker with fewer records
    than the others ends its epoch with padding alone.
    """
    sharding, own_files, rows = order.sharding, order.sharding.own_files, order.rows
    chosen = shards_of_workers(split, sharding.workers)[sharding.worker] if own_files else None
    total, batch = (int(shard_sizes(split)[chosen].sum()), rows) if own_files else (split.count, order.batch_size)
    steps = steps_per_epoch(split, order.batch_size, sharding)
    shuffle = order.shuffle or own_files
    window = (order.window if shuffle else STRETCH) if split.shards else total
    worker = sharding.worker if own_files else 0
    per_epoch, part = windows(split, order.seed, window, shuffle, chosen, worker)
    first_epoch, first_row = order.first_epoch + order.first_step // steps, order.first_step % steps * batch
    # A first step that lies in the padding begins with the last window, of which only padding is left.
    first_number = min(first_row // window, per_epoch - 1)

    def block(number: tf.Tensor) -> Block:
        number = tf.cast(number, tf.int64) + first_number
        since, number = number // per_epoch, number % per_epoch
        epoch, start = first_epoch + since, number * window
        whole = _block(part(epoch, number), start, total, batch, epoch, steps * batch - total)
        done = tf.where(tf.equal(since, 0), tf.maximum(first_row - start, 0), 0)
        own = {name: value if name == "pieces" else value[done:] for name, value in whole.items()}
        if own_files:
            return {**own, "position": own["position"] + worker * rows}
        if sharding.workers == 1:
            return own
        mine = tf.equal(own["position"] // rows, sharding.worker)
        return {name: value if name == "pieces" else tf.boolean_mask(value, mine) for name, value in own.items()}

    return block


def sequence_blocks(split: Split, chosen: np.ndarray, batch_size: int) -> tuple[int, Callable[[tf.Tensor], Block]]:
    """The examples `chosen` (increasing indices) once each, padded to whole batches: number of blocks, and each one."""
    edges = np.array([0, len(chosen)], np.int64)
    if split.shards:  # a block spans at most STRETCH records, however few of them are chosen
        edges = np.unique(np.searchsorted(chosen, np.arange(0, split.count + STRETCH, STRETCH))).astype(np.int64)
    records, zero = _Records(split), tf.zeros([], tf.int64)

    def block(number: tf.Tensor) -> Block:
        first, last = tf.gather(tf.constant(edges), number), tf.gather(tf.constant(edges), number + 1)
        index = tf.constant(chosen, tf.int64)[first:last]
        pieces, offset = _nothing_to_read(), index - index[0]
        if split.shards:
            pieces, _ = records.stretch(tf.constant(records.chosen, tf.int64), index[0], index[-1] + 1)
        return _block(Part(pieces, offset, index), first, len(chosen), batch_size, zero, -len(chosen) % batch_size)

    return len(edges) - 1 if len(chosen) else 0, block


Read = tuple[int, np.ndarray]  # a block as the host sees it: rows of this worker, int64 numbers of its shards


def block_reads(block: Callable[[tf.Tensor], Block], count: int | None) -> Iterator[Read]:
    """The reads of blocks 0, 1, ... (endless without a count) on the host, by the very function that the pipeline maps;
    blocks without a row of this worker are left out, as the pipeline leaves them out.
    """

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64)], autograph=False)
    def read(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        made = block(number)
        return tf.size(made["index"]), made["pieces"][:, 0]

    for number in itertools.count() if count is None else range(count):
        with tf.device("CPU:0"):
            rows, shards = read(tf.constant(number, tf.int64))
        if int(rows):
            yield int(rows), shards.numpy()


def share_of(split: Split, batch_size: int, fraction: float) -> np.ndarray:
    """The examples of the first ceil(fraction * batches) batches of a fixed shuffle: indices may lie sorted by class.

    Returns:
        increasing int64 indices; all of them for fraction 1.
    """
    indices = np.arange(split.count, dtype=np.int64)
    if fraction >= 1:
        return indices
    batches = int(np.ceil(fraction * steps_per_epoch(split, batch_size)))
    mixed = _shuffle(bits(SUBSET, tf.constant(indices))).numpy()
    return np.sort(mixed[: batches * batch_size])
