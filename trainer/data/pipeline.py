"""Batches with exact positions: any (epoch, step) can be the first, and the bits are those of the unbroken stream."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.data.decoding import COLUMNS, Row, block_dataset, plain
from trainer.data.images import BatchSource, Pixels, live_rows
from trainer.data.order import Block, Order, block_reads, sequence_blocks, share_of, training_blocks
from trainer.data.shard_gate import ShardGate, rows_ahead
from trainer.data.sharding import UNSHARDED, Sharding
from trainer.types import Split

DEVICE_BUFFER = 2  # elements that wait for each replica in the buffers of a strategy's devices


def _batches(source: BatchSource, block: Callable[[tf.Tensor], Block], count: int | None, size: int) -> tf.data.Dataset:
    """Dicts of image, weight, index, position, epoch and label, `size` rows each."""
    if isinstance(source, Pixels) and source.array is None:
        batches = live_rows(source, block, count).batch(size, drop_remainder=True)
    else:
        batches = _cached_batches(source, block_dataset(block, count), size)
    labels = tf.constant(source.split.labels, tf.int32)
    return batches.map(plain(lambda batch: {**batch, "label": tf.gather(labels, batch["index"])}))


def _cached_batches(source: BatchSource, blocks: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Batches out of an array: one gather each."""
    # When an iterator is made TensorFlow feeds each tensor that a function has captured with another one of its shape,
    # to optimize the pipeline, and keeps that memory: as much again as all images. An Optional around it has no shape.
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
    """A dataset of batches, and the gate that waits for the shards that it opens.

    Attributes:
        dataset: an element is what one replica gets, a `trainer.types.Batch`; without end.
        count: of this worker's parts of a global batch until only padding comes; None: of training, endless.
        gate: makes the gate of one iteration over `dataset`: call its `wait_for` before rows are taken.
    """

    dataset: tf.data.Dataset
    count: int | None
    gate: Callable[[], ShardGate]


@dataclass(frozen=True)
class View:
    """The augmentation of a pass over chosen examples: that of epoch `number` of training."""

    augmentation: Augmentation
    seed: int
    number: int


def training_batches(
    source: BatchSource, order: Order, *, replicas: int, augmentation: Augmentation, views: int | None = None
) -> Batches:
    """The endless stream of training batches in this order.

    Each epoch is `steps_per_epoch` global batches, the last one padded with weight 0. An element has batch_size /
    workers / replicas rows; `replicas` of them in a row make this worker's part of a global batch. Iterate within
    `images.data_errors`.

    Args:
        replicas: of this worker; their number divides the worker's rows of a global batch.
        augmentation: where it mixes, elements hold `other_label` and `mix` too, and have an even number of rows.
        views: epoch e changes images as epoch e % views; None: each epoch in its own way.
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
    # It cannot be seen, and a strategy would else ask all workers at every step whether any is at its end.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    dataset = _batches(source, block, None, rows).map(change, num_parallel_calls=parallel).apply(endless)
    prefetched = 2 * replicas
    ahead = rows_ahead(rows, source.parallel, prefetched + DEVICE_BUFFER * replicas + (parallel or 0))
    dataset = _finished(dataset, source.threads, prefetched)
    return Batches(dataset, None, lambda: source.gate("training", block_reads(block, None), ahead))


def evaluation_batches(
    source: BatchSource, *, batch_size: int, replicas: int, part: float = 1.0, sharding: Sharding = UNSHARDED
) -> Batches:
    """Each example of a split once over all workers, in the order of the indices, in batches of uint8 images.

    Elements are as in `training_batches`. A `part` below 1 takes that part of the batches, filled with the examples
    that one fixed shuffle puts first: every class is in it, and always the same examples. Of several workers each has
    a run of neighbouring examples; the count is 0 where there are fewer examples than workers.
    """
    own = examples_to_score(source.split, batch_size, part, sharding)
    return chosen_batches(source, own, rows=batch_size // sharding.workers, replicas=replicas)


def chosen_batches(
    source: BatchSource,
    chosen: np.ndarray,
    *,
    rows: int,
    replicas: int,
    view: View | None = None,
    prefetched: int | None = None,
) -> Batches:
    """The examples `chosen`, increasing indices, in their order, and then padding without end, `rows` at a time.

    With a `view` images are augmented. `prefetched`: elements that are made before they are wanted.
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
    # Without end, so that no strategy polls for the end of the data.
    endless = batches.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
    prefetched = prefetched or 2 * replicas
    ahead = rows_ahead(rows // replicas, source.parallel, prefetched + DEVICE_BUFFER * replicas + (parallel or 0))
    dataset = _finished(endless, source.threads, prefetched)
    return Batches(
        dataset, -(-len(chosen) // rows), lambda: source.gate("evaluation", block_reads(block, count), ahead)
    )


def examples_to_score(split: Split, batch_size: int, part: float, sharding: Sharding) -> np.ndarray:
    """Increasing indices of the examples that this worker scores."""
    return np.array_split(share_of(split, batch_size, part), sharding.workers)[sharding.worker]
