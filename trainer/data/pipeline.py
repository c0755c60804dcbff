"""Batches with exact positions: any (epoch, step) can be the first, and the bits are those of the unbroken stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mixed
from trainer.data.decoding import COLUMNS, Row, block_dataset, plain
from trainer.data.images import Pixels, live_rows
from trainer.data.order import ALONE, Block, Order, Share, sequence_blocks, share_of, training_blocks
from trainer.data.shard_gate import Gate, rows_ahead, sequence_reads, training_reads
from trainer.features.store import Features
from trainer.types import Split

Kept = Pixels | Features  # what batches are made of


def _kept_batches(pixels: Kept, block: Callable[[tf.Tensor], Block], count: int | None, size: int) -> tf.data.Dataset:
    """Batches out of an array: one gather each."""
    # When an iterator is made TensorFlow feeds each tensor that a function has captured with another one of its shape,
    # to optimize the pipeline, and keeps that memory: as much again as all images. An Optional around it has no shape.
    with tf.device("CPU:0"):
        content = tf.experimental.Optional.from_value(pixels.tensor())
    blank = pixels.split.count
    bad = tf.constant(sorted(pixels.bad), tf.int64)

    def rows(fields: Block) -> Row:
        return {k: fields[k] for k in COLUMNS}

    def pick(rows: Row) -> Row:
        weight = rows["weight"]
        if pixels.bad:
            is_bad = tf.reduce_any(tf.equal(rows["index"][:, None], bad[None, :]), axis=1)
            weight = tf.where(is_bad, 0.0, weight)
        image = pixels.rows_of(content.get_value(), tf.where(weight > 0, rows["index"], blank), rows["epoch"])
        return {**rows, "weight": weight, "image": image}

    blocks = block_dataset(block, count)
    return blocks.map(plain(rows)).rebatch(size, drop_remainder=True).map(plain(pick))


def _live_batches(pixels: Pixels, block: Callable[[tf.Tensor], Block], count: int | None, size: int) -> tf.data.Dataset:
    """Batches of images decoded now."""
    return live_rows(pixels, block, count).batch(size, drop_remainder=True)


def _batches(pixels: Kept, block: Callable[[tf.Tensor], Block], count: int | None, size: int) -> tf.data.Dataset:
    """Dicts of image, weight, index, position, epoch and label, `size` rows each."""
    if isinstance(pixels, Pixels) and pixels.array is None:
        batches = _live_batches(pixels, block, count, size)
    else:
        batches = _kept_batches(pixels, block, count, size)
    labels = tf.constant(pixels.split.labels, tf.int32)
    return batches.map(plain(lambda batch: {**batch, "label": tf.gather(labels, batch["index"])}))


def _finished(batches: tf.data.Dataset, threads: int | None, ahead: int) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # every degree of parallelism and buffer is given
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if threads:
        options.threading.private_threadpool_size = threads
    return batches.prefetch(ahead).with_options(options)


def training_batches(
    pixels: Kept,
    order: Order,
    *,
    replicas: int,
    augmentation: Augmentation,
    views: int | None = None,
    threads: int | None = None,
) -> tf.data.Dataset:
    """The endless stream of training batches in this order.

    Each epoch is `order.steps_per_epoch` global batches, the last one padded with weight 0. An element is what one
    replica gets, a `trainer.types.Batch` of batch_size / workers / replicas rows; `replicas` of them in a row make
    this worker's part of a global batch. Iterate within `pixels.data_errors`.

    Args:
        replicas: of this worker; their number divides the worker's rows of a global batch.
        augmentation: where it mixes, elements hold `other_label` and `mix` too, and have an even number of rows.
        views: epoch e changes images as epoch e % views; None: each epoch in its own way.
        threads: of a pool of its own; None shares TensorFlow's.
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

    batches = _batches(pixels, training_blocks(pixels.split, order), None, order.rows // replicas)
    parallel = pixels.threads if augmentation.active else None
    # It cannot be seen, and a strategy would else ask all workers at every step whether any is at its end.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    return _finished(batches.map(change, num_parallel_calls=parallel).apply(endless), threads, _ahead(replicas))


def evaluation_batches(
    pixels: Kept,
    *,
    batch_size: int,
    replicas: int,
    part: float = 1.0,
    threads: int | None = None,
    share: Share = ALONE,
) -> tuple[tf.data.Dataset, int]:
    """Each example of a split once over all workers, in the order of the indices, in batches of uint8 images.

    Elements are as in `training_batches`. A `part` below 1 takes that part of the batches, filled with the examples
    that one fixed shuffle puts first: every class is in it, and always the same examples. Of several workers each has
    a run of neighbouring examples.

    Returns:
        the batches, and padding without end after the last one, so that no strategy looks for it; and how many of this
        worker's part of a global batch they are; 0 where there are fewer examples than workers.
    """
    mine = to_score(pixels.split, batch_size, part, share)
    rows = batch_size // share.workers
    return chosen_batches(pixels, mine, rows=rows, replicas=replicas, threads=threads), -(-len(mine) // rows)


def chosen_batches(
    pixels: Kept,
    chosen: np.ndarray,
    *,
    rows: int,
    replicas: int,
    threads: int | None = None,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    view: int = 0,
    ahead: int | None = None,
) -> tf.data.Dataset:
    """The examples `chosen`, increasing indices, in their order, and then padding without end, `rows` at a time.

    With an `augmentation` images are changed as epoch `view` of training does. `ahead`: elements that are made before
    they are wanted.
    """
    count, block = sequence_blocks(pixels.split, chosen, rows)

    @plain
    def change(batch: Row) -> Row:
        del batch["epoch"]
        if augmentation is not None:
            views = tf.fill(tf.shape(batch["index"]), tf.constant(view, tf.int64))
            batch["image"] = augment(batch["image"], augmentation, seed, views, batch["index"])
        return batch

    parallel = pixels.threads if augmentation is not None and augmentation.active else None
    batches = _batches(pixels, block, count, rows // replicas).map(change, num_parallel_calls=parallel)
    padding = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in batches.element_spec.items()}
    endless = batches.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
    return _finished(endless, threads, ahead or _ahead(replicas))


def training_gate(pixels: Kept, order: Order, *, replicas: int, augmentation: Augmentation) -> Gate:
    """What waits, before each device call, for the shards that `training_batches` of the same arguments opens."""
    buffered = _buffered(replicas) + (pixels.threads if augmentation.active else 0)
    ahead = rows_ahead(order.rows // replicas, pixels.threads, buffered)
    return pixels.gate("training", training_reads(pixels.split, order), ahead)


def evaluation_gate(pixels: Kept, *, batch_size: int, replicas: int, part: float = 1.0, share: Share = ALONE) -> Gate:
    """What waits, before each batch, for the shards that `evaluation_batches` of the same arguments opens."""
    mine = to_score(pixels.split, batch_size, part, share)
    return chosen_gate(pixels, mine, rows=batch_size // share.workers, replicas=replicas)


def chosen_gate(
    pixels: Kept, chosen: np.ndarray, *, rows: int, replicas: int, augmented: bool = False, ahead: int | None = None
) -> Gate:
    """What waits, before each batch, for the shards that `chosen_batches` of the same arguments opens."""
    buffered = _buffered(replicas, ahead) + (pixels.threads if augmented else 0)
    reads = sequence_reads(pixels.split, chosen, rows)
    return pixels.gate("evaluation", reads, rows_ahead(rows // replicas, pixels.threads, buffered))


def to_score(split: Split, batch_size: int, part: float, share: Share) -> np.ndarray:
    """Increasing indices of the examples that this worker scores."""
    return np.array_split(share_of(split, batch_size, part), share.workers)[share.worker]


def _ahead(replicas: int) -> int:
    """Elements that our `prefetch` holds: two for each replica."""
    return 2 * replicas


def _buffered(replicas: int, ahead: int | None = None) -> int:
    """Elements that wait: those of our `prefetch`, and two for each replica in the buffers of a strategy's devices."""
    return (ahead or _ahead(replicas)) + 2 * replicas
