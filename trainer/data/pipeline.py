"""Build the input pipelines of training and evaluation.

A stream of training batches that begins at any (epoch, step) equals the uninterrupted stream bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mix_pairs
from trainer.data.decoding import COLUMNS, Row, build_block_dataset, without_autograph
from trainer.data.images import BatchSource, Pixels, build_row_dataset
from trainer.data.order import (
    Block,
    Order,
    compute_block_shards,
    make_sequence_blocks,
    make_training_blocks,
    select_examples_to_score,
)
from trainer.data.shard_gate import ShardGate, ShardGates, max_rows_ahead
from trainer.data.sharding import UNSHARDED, Sharding

DEVICE_BUFFER = 2  # elements per replica that a `tf.distribute` strategy prefetches to its device


def _build_batches(
    source: BatchSource, block: Callable[[tf.Tensor], Block], count: int | None, size: int
) -> tf.data.Dataset:
    """Build batches of `size` rows of blocks 0 to `count` - 1: image, weight, index, position, epoch and label."""
    if isinstance(source, Pixels) and source.array is None:
        batches = build_row_dataset(source, block, count).batch(size, drop_remainder=True)
    else:
        batches = _build_cached_batches(source, build_block_dataset(block, count), size)
    labels = tf.constant(source.split.labels, tf.int32)
    return batches.map(without_autograph(lambda batch: {**batch, "label": tf.gather(labels, batch["index"])}))


def _build_cached_batches(source: BatchSource, blocks: tf.data.Dataset, size: int) -> tf.data.Dataset:
    """Build batches of rows that are in an array, with one gather per batch."""
    # When TensorFlow creates an iterator it allocates a second tensor of the shape of each tensor that a function has
    # captured, which would double the memory of the images. An Optional has no shape.
    with tf.device("CPU:0"):
        content = tf.experimental.Optional.from_value(source.tensor())
    bad_indices = tf.constant(sorted(source.bad), tf.int64)

    def gather(rows: Row) -> Row:
        weight = rows["weight"]
        if source.bad:
            is_bad = tf.reduce_any(tf.equal(rows["index"][:, None], bad_indices[None, :]), axis=1)
            weight = tf.where(is_bad, 0.0, weight)
        index = tf.where(weight > 0, rows["index"], source.split.count)
        return {**rows, "weight": weight, "image": source.gather_rows(content.get_value(), index, rows["epoch"])}

    rows = blocks.map(without_autograph(lambda block: {name: block[name] for name in COLUMNS}))
    return rows.rebatch(size, drop_remainder=True).map(without_autograph(gather))


@without_autograph
def _concatenate(*parts: Row) -> Row:
    """Concatenate the rows of the parts of a batch."""
    return {name: tf.concat([part[name] for part in parts], axis=0) for name in parts[0]}


def _prefetch(
    batches: tf.data.Dataset, source: BatchSource, rows: int, replicas: int, parallel: int | None, elements: int
) -> tuple[tf.data.Dataset, int]:
    """Prefetch elements of `rows` rows, with a fixed order and parallelism. Return also `max_rows_ahead`."""
    elements = elements or 2 * replicas
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # all degrees of parallelism and buffer sizes are fixed
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if source.threads:
        options.threading.private_threadpool_size = source.threads
    ahead = max_rows_ahead(rows, source.parallel, elements + DEVICE_BUFFER * replicas + (parallel or 0))
    return batches.prefetch(elements).with_options(options), ahead


def prefetch_to_device(dataset: tf.data.Dataset, device: str) -> tf.data.Dataset:
    """Copy batches to a device, such as GPU:0, while earlier ones are used. Nothing can be applied to the result."""
    return dataset.apply(tf.data.experimental.prefetch_to_device(device, DEVICE_BUFFER))


@dataclass(frozen=True)
class Batches:
    """A dataset of batches, and the gate at which the host waits for its shards."""

    dataset: tf.data.Dataset  # infinite; an element is a `trainer.types.Batch` of one replica
    count: int | None  # global batches, after which only padding follows; None for training
    open_gate: Callable[[], ShardGate | ShardGates]  # for one iteration; call `wait_for` before taking rows


@dataclass(frozen=True)
class View:
    """The augmentation of one training epoch, for a single pass over a split."""

    augmentation: Augmentation
    seed: int
    epoch: int


def build_training_batches(
    source: BatchSource, order: Order, *, replicas: int, augmentation: Augmentation, views: int | None = None
) -> Batches:
    """Build the infinite stream of training batches in this order.

    An epoch has `steps_per_epoch` global batches; the last one is padded with rows of weight 0. An element has
    batch_size / workers / replicas rows; `replicas` consecutive elements are this worker's rows of a global batch.
    Iterate within `images.convert_data_errors`, so that an error names the unreadable example.

    Args:
        augmentation: with mixup or cutmix, elements also have `other_label` and `mix`, and need an even number of rows.
        views: number of augmentations per image. Epoch e repeats that of epoch e % views. None: each epoch differs.
    """

    @without_autograph
    def change(batch: Row) -> Row:
        epoch = batch.pop("epoch")
        view = epoch % views if views else epoch
        batch["image"] = augment(batch["image"], augmentation, order.seed, view, batch["index"])
        if augmentation.mixes:
            batch |= mix_pairs(batch, augmentation, order.seed, epoch)
        return batch

    orders = [replace(order, sharding=part) for part in order.sharding.of_parts()]
    blocks, rows = [make_training_blocks(source.split, part) for part in orders], order.rows // replicas
    parallel = source.parallel if augmentation.active else None
    # Without a known infinite cardinality, a strategy makes all workers check for the end of the dataset at each step.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    if len(blocks) == 1:
        batches = _build_batches(source, blocks[0], None, rows)
    else:
        parts = tf.data.Dataset.zip(tuple(_build_batches(source, block, None, orders[0].rows) for block in blocks))
        batches = parts.map(_concatenate).rebatch(rows, drop_remainder=True)
    dataset, ahead = _prefetch(
        batches.map(change, num_parallel_calls=parallel).apply(endless), source, rows, replicas, parallel, 0
    )

    def open_gate() -> ShardGate | ShardGates:
        if len(blocks) == 1:
            return source.open_gate("training", compute_block_shards(blocks[0], None), ahead)
        names = [f"training, part {part.sharding.worker}" for part in orders]
        return ShardGates(
            [source.open_gate(n, compute_block_shards(b, None), ahead) for n, b in zip(names, blocks, strict=True)]
        )

    return Batches(dataset, None, open_gate)


def build_evaluation_batches(
    source: BatchSource, *, batch_size: int, replicas: int, fraction: float = 1.0, sharding: Sharding = UNSHARDED,
    rows: int | None = None,
) -> Batches:  # fmt: skip
    """Build the batches that this worker scores. Together the workers score each example of the split once.

    Each worker has consecutive examples in index order, without augmentation. A worker without any has `count` 0.
    See `select_examples_to_score` for a `fraction` below 1. `rows` of an element, by default those of a replica's part
    of `batch_size`.
    """
    indices = select_examples_to_score(source.split, batch_size, fraction, sharding, rows)
    rows = rows * replicas if rows else batch_size // sharding.workers
    return build_chosen_batches(source, indices, rows=rows, replicas=replicas)


def build_chosen_batches(
    source: BatchSource, indices: np.ndarray, *, rows: int, replicas: int, view: View | None = None, prefetched: int = 0
) -> Batches:
    """Build batches of the given examples, followed by infinite padding.

    Args:
        indices: the examples, int64 [n], increasing.
        rows: rows of this worker in a global batch. An element has rows / replicas rows.
        prefetched: number of elements to prefetch. 0: 2 per replica.
    """
    count, block = make_sequence_blocks(source.split, indices, rows)

    @without_autograph
    def change(batch: Row) -> Row:
        del batch["epoch"]
        if view is not None:
            views = tf.fill(tf.shape(batch["index"]), tf.constant(view.epoch, tf.int64))
            batch["image"] = augment(batch["image"], view.augmentation, view.seed, views, batch["index"])
        return batch

    parallel = source.parallel if view is not None and view.augmentation.active else None
    batches = _build_batches(source, block, count, rows // replicas).map(change, num_parallel_calls=parallel)
    padding = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in batches.element_spec.items()}
    # Infinite, so that a strategy does not check for the end of the dataset.
    endless = batches.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
    dataset, ahead = _prefetch(endless, source, rows // replicas, replicas, parallel, prefetched)
    batch_count = -(-len(indices) // rows)
    return Batches(
        dataset, batch_count, lambda: source.open_gate("evaluation", compute_block_shards(block, count), ahead)
    )
