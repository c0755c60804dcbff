"""Input pipelines: a stream of batches that starts at any (epoch, step) equals the uninterrupted one bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.data.decoding import COLUMNS, Row, block_dataset, plain
from trainer.data.images import BatchSource, Pixels, live_rows
from trainer.data.order import Block, Order, block_reads, examples_to_score, sequence_blocks, training_blocks
from trainer.data.shard_gate import ShardGate, rows_ahead
from trainer.data.sharding import UNSHARDED, Sharding

DEVICE_BUFFER = 2  # elements per replica in the device buffers of a strategy


def _batches(source: BatchSource, block: Callable[[tf.Tensor], Block], count: int | None, size: int) -> tf.data.Dataset:
    """Return batches of `size` rows: image, weight, index, position, epoch and label."""
    if isinstance(source, Pixels) and source.array is None:
        batches = live_rows(source, block, count).batch(size, drop_remainder=True)
    else:
        batches = _cached_batches(source, block_dataset(block, count), size)
    labels = tf.constant(source.split.labels, tf.int32)
    return batches.map(plain(lambda batch: {**batch, "label": tf.gather(labels, batch["index"])}))


def _cached_batches(source: BatchSource, blocks: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Return batches out of an array, with one gather per batch."""
    # Creating an iterator, TensorFlow allocates a second tensor of the shape of each one that a function has captured,
    # which doubles the memory of the images. An Optional has no shape.
    with tf.device("CPU:0"):
        content = tf.experimental.Optional.from_value(source.tensor())
    bad = tf.constant(sorted(source.bad), tf.int64)

    def pick(rows: Row) -> Row:
        weight = rows["weight"]
        if source.bad:
            is_bad = tf.reduce_any(tf.equal(rows["index"][:, None], bad[None, :]), axis=1)
            weight = tf.where(is_bad, 0.0, weight)
        index = tf.where(weight > 0, rows["index"], source.split.count)
        return {**rows, "weight": weight, "image": source.rows_of(content.get_value(), index, rows["epoch"])}

    rows = blocks.map(plain(lambda block: {name: block[name] for name in COLUMNS}))
    return rows.rebatch(size, drop_remainder=True).map(plain(pick))


def _finished(batches: tf.data.Dataset, threads: int | None, ahead: int) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # every degree of parallelism and buffer is given
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if threads:
        options.threading.private_threadpool_size = threads
    return batches.prefetch(ahead).with_options(options)


@dataclass(frozen=True)
class Batches:
    """A dataset of batches, and the gate that waits for its shards."""

    dataset: tf.data.Dataset  # infinite; an element is the batch of one replica, a `trainer.types.Batch`
    count: int | None  # global batches until only padding follows; None: training, infinite
    gate: Callable[[], ShardGate]  # makes the gate of one iteration; call its `wait_for` before rows are taken


@dataclass(frozen=True)
class View:
    """Augmentation as in training epoch `number`, for a pass over chosen examples."""

    augmentation: Augmentation
    seed: int
    number: int


def training_batches(
    source: BatchSource, order: Order, *, replicas: int, augmentation: Augmentation, views: int | None = None
) -> Batches:
    """Return the infinite stream of training batches in this order.

    An epoch has `steps_per_epoch` global batches, the last one padded with weight 0. An element has batch_size /
    workers / replicas rows; `replicas` consecutive ones are this worker's rows of a global batch. Iterate within
    `images.data_errors`.

    Args:
        replicas: of this worker; divides the worker's rows of a global batch.
        augmentation: with mixup or cutmix, elements hold `other_label` and `mix` too and have an even number of rows.
        views: epoch e augments images as epoch e % views; None: as epoch e.
    """

    @plain
    def change(batch: Row) -> Row:
        epoch = batch.pop("epoch")
        if augmentation.active:
            view = epoch % views if views else epoch
            batch["image"] = augment(batch["image"], augmentation, order.seed, view, batch["index"])
        if augmentation.mixes:
            batch |= mixed(batch, augmentation, order.seed, epoch)
        return batch

    block, rows = training_blocks(source.split, order), order.rows // replicas
    parallel = source.parallel if augmentation.active else None
    # Otherwise a strategy checks at every step, over all workers, for the end of the data.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    dataset = _batches(source, block, None, rows).map(change, num_parallel_calls=parallel).apply(endless)
    prefetched = 2 * replicas
    ahead = rows_ahead(rows, source.parallel, prefetched + DEVICE_BUFFER * replicas + (parallel or 0))
    dataset = _finished(dataset, source.threads, prefetched)
    return Batches(dataset, None, lambda: source.gate("training", block_reads(block, None), ahead))


def evaluation_batches(
    source: BatchSource, *, batch_size: int, replicas: int, part: float = 1.0, sharding: Sharding = UNSHARDED
) -> Batches:
    """Return each example of a split once over all workers, in the order of the indices, elements as in training.

    A `part` below 1 is the fraction of the batches to use, filled from a fixed shuffle: always the same examples, of
    all classes. Each worker has consecutive examples; the count is 0 on a worker without any.
    """
    own = examples_to_score(source.split, batch_size, part, sharding)
    return chosen_batches(source, own, rows=batch_size // sharding.workers, replicas=replicas)


def chosen_batches(
    source: BatchSource, chosen: np.ndarray, *, rows: int, replicas: int, view: View | None = None, prefetched: int = 0
) -> Batches:
    """Return the examples `chosen`, increasing indices, `rows` at a time, followed by infinite padding.

    With a `view` images are augmented. `prefetched`: elements to prefetch; 0: 2 per replica.
    """
    count, block = sequence_blocks(source.split, chosen, rows)

    @plain
    def change(batch: Row) -> Row:
        del batch["epoch"]
        if view is not None:
            views = tf.fill(tf.shape(batch["index"]), tf.constant(view.number, tf.int64))
            batch["image"] = augment(batch["image"], view.augmentation, view.seed, views, batch["index"])
        return batch

    parallel = source.parallel if view is not None and view.augmentation.active else None
    batches = _batches(source, block, count, rows // replicas).map(change, num_parallel_calls=parallel)
    padding = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in batches.element_spec.items()}
    # Infinite, so that no strategy polls for the end of the data.
    endless = batches.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
    prefetched = prefetched or 2 * replicas
    ahead = rows_ahead(rows // replicas, source.parallel, prefetched + DEVICE_BUFFER * replicas + (parallel or 0))
    dataset = _finished(endless, source.threads, prefetched)
    steps = -(-len(chosen) // rows)
    return Batches(dataset, steps, lambda: source.gate("evaluation", block_reads(block, count), ahead))
