"""Build the input pipelines of training and evaluation.

A stream of training batches can begin at any step of any epoch. It is bit-identical to the uninterrupted stream from
that step, so that a resumed run trains on the same batches.
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
from trainer.data.shard_gate import ShardGate, ShardGates, compute_max_rows_ahead
from trainer.data.sharding import UNSHARDED, Sharding

# Number of elements that a `tf.distribute` strategy or `prefetch_to_device` prefetches to each replica's device.
DEVICE_BUFFER_ELEMENTS = 2


def _build_batches(
    source: BatchSource, compute_block: Callable[[tf.Tensor], Block], num_blocks: int | None, batch_size: int
) -> tf.data.Dataset:
    """Build batches of `batch_size` rows from `num_blocks` blocks, or from infinitely many if `num_blocks` is None.

    `compute_block` computes a block from its index. A batch has the keys image, weight, index, position, epoch, label.
    """
    if isinstance(source, Pixels) and source.array is None:
        batches = build_row_dataset(source, compute_block, num_blocks).batch(batch_size, drop_remainder=True)
    else:
        batches = _build_cached_batches(source, build_block_dataset(compute_block, num_blocks), batch_size)
    labels = tf.constant(source.split.labels, tf.int32)
    return batches.map(without_autograph(lambda batch: {**batch, "label": tf.gather(labels, batch["index"])}))


def _build_cached_batches(source: BatchSource, blocks: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """Build batches of cached images or features, with one gather per batch."""
    # When TensorFlow creates an iterator, it allocates a second tensor with the shape of each tensor that a function
    # captures. This would double the memory of the images. An Optional has no shape.
    with tf.device("CPU:0"):
        cached_rows = tf.experimental.Optional.from_value(source.tensor())
    unreadable_indices = tf.constant(sorted(source.unreadable), tf.int64)

    def gather(rows: Row) -> Row:
        weight = rows["weight"]
        if source.unreadable:
            is_unreadable = tf.reduce_any(tf.equal(rows["index"][:, None], unreadable_indices[None, :]), axis=1)
            weight = tf.where(is_unreadable, 0.0, weight)
        index = tf.where(weight > 0, rows["index"], source.split.count)  # row `split.count` is for padding
        return {**rows, "weight": weight, "image": source.gather_rows(cached_rows.get_value(), index, rows["epoch"])}

    block_rows = blocks.map(without_autograph(lambda block: {name: block[name] for name in COLUMNS}))
    return block_rows.rebatch(batch_size, drop_remainder=True).map(without_autograph(gather))


@without_autograph
def _concatenate(*parts: Row) -> Row:
    """Concatenate the rows of several parts of a batch, key by key."""
    return {name: tf.concat([part[name] for part in parts], axis=0) for name in parts[0]}


def _prefetch(
    batches: tf.data.Dataset,
    source: BatchSource,
    rows_per_element: int,
    num_replicas: int,
    num_calls: int | None,
    num_elements: int,
) -> tuple[tf.data.Dataset, int]:
    """Prefetch `num_elements` elements of `rows_per_element` rows, or 2 elements per replica if `num_elements` is 0.

    Return the dataset, and the maximum number of rows that it pulls in advance (see `compute_max_rows_ahead`).
    `num_calls` is the number of elements that are augmented in parallel; None if elements are not augmented.
    """
    num_elements = num_elements or 2 * num_replicas
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # all degrees of parallelism and buffer sizes are fixed
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if source.threads:
        options.threading.private_threadpool_size = source.threads
    max_rows_ahead = compute_max_rows_ahead(
        rows_per_element, source.parallel, num_elements + DEVICE_BUFFER_ELEMENTS * num_replicas + (num_calls or 0)
    )
    return batches.prefetch(num_elements).with_options(options), max_rows_ahead


def prefetch_to_device(dataset: tf.data.Dataset, device: str) -> tf.data.Dataset:
    """Copy batches to a device, such as "GPU:0", while earlier batches are used.

    This must be the last transformation of a pipeline.
    """
    return dataset.apply(tf.data.experimental.prefetch_to_device(device, DEVICE_BUFFER_ELEMENTS))


@dataclass(frozen=True)
class Batches:
    """A dataset of batches, and a function that opens the gate at which the host waits for shards."""

    dataset: tf.data.Dataset  # infinite; an element is a `trainer.types.Batch` for one replica
    count: int | None  # number of global batches before the padding; None for training, which has no padding batches
    # Opens the gate for one iteration over `dataset`. Call the gate's `wait_for` before taking rows.
    open_gate: Callable[[], ShardGate | ShardGates]


@dataclass(frozen=True)
class EpochAugmentation:
    """The augmentation of a single pass over a split: the one that training applies in epoch `epoch`."""

    augmentation: Augmentation
    seed: int
    epoch: int


def build_training_batches(
    source: BatchSource, order: Order, *, num_replicas: int, augmentation: Augmentation, num_views: int | None = None
) -> Batches:
    """Build this worker's infinite stream of training batches.

    The last global batch of an epoch is padded with rows of weight 0. An element has batch_size / workers / replicas
    rows. `num_replicas` consecutive elements are this worker's rows of a global batch. Iterate within
    `trainer.data.images.convert_data_errors`, so that an error names the unreadable example.

    Args:
        order: the order of the examples, and the step at which the stream begins.
        num_replicas: number of replicas on this worker.
        augmentation: how images are augmented. With mixup or cutmix, elements also have the keys `other_label` and
            `mix`, and must have an even number of rows.
        num_views: number of different augmentations of each image: epoch e has the same augmentation as epoch
            e % num_views. If None, the augmentation differs in each epoch.
    """

    @without_autograph
    def augment_rows(batch: Row) -> Row:
        epoch = batch.pop("epoch")
        view = epoch % num_views if num_views else epoch
        batch["image"] = augment(batch["image"], augmentation, order.seed, view, batch["index"])
        if augmentation.mixes:
            batch |= mix_pairs(batch, augmentation, order.seed, epoch)
        return batch

    part_orders = [replace(order, sharding=sharding) for sharding in order.sharding.split_into_parts()]
    blocks = [make_training_blocks(source.split, part) for part in part_orders]
    rows_per_element = order.rows_per_worker // num_replicas
    num_calls = source.parallel if augmentation.active else None
    # Unless the cardinality is known to be infinite, a strategy makes all workers check for the end of the dataset at
    # each step.
    assert_infinite = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    if len(blocks) == 1:
        batches = _build_batches(source, blocks[0], num_blocks=None, batch_size=rows_per_element)
    else:
        parts = tf.data.Dataset.zip(
            tuple(
                _build_batches(source, block, num_blocks=None, batch_size=part_orders[0].rows_per_worker)
                for block in blocks
            )
        )
        batches = parts.map(_concatenate).rebatch(rows_per_element, drop_remainder=True)
    dataset, max_rows_ahead = _prefetch(
        batches.map(augment_rows, num_parallel_calls=num_calls).apply(assert_infinite),
        source, rows_per_element, num_replicas, num_calls, num_elements=0,
    )  # fmt: skip

    def open_gate() -> ShardGate | ShardGates:
        if len(blocks) == 1:
            return source.open_gate("training", compute_block_shards(blocks[0], count=None), max_rows_ahead)
        names = [f"training, part {part.sharding.worker_index}" for part in part_orders]
        return ShardGates(
            [
                source.open_gate(n, compute_block_shards(b, count=None), max_rows_ahead)
                for n, b in zip(names, blocks, strict=True)
            ]
        )

    return Batches(dataset, None, open_gate)


def build_evaluation_batches(
    source: BatchSource, *, batch_size: int, num_replicas: int, fraction: float = 1.0, sharding: Sharding = UNSHARDED,
    rows_per_element: int | None = None,
) -> Batches:  # fmt: skip
    """Build the batches that this worker scores. Together, the workers score each selected example once.

    Each worker scores consecutive selected examples, in index order and without augmentation. The result's `count` is 0
    if no examples remain for this worker.

    Args:
        batch_size: rows per global batch.
        num_replicas: number of replicas on this worker.
        fraction: fraction of the global batches to score; see `select_examples_to_score` in trainer/data/order.py.
        sharding: the index of this worker, and the number of workers.
        rows_per_element: number of rows of an element; defaults to batch_size / workers / replicas. If set, each worker
            scores complete elements.
    """
    indices = select_examples_to_score(source.split, batch_size, fraction, sharding, rows_per_element)
    rows_per_batch = rows_per_element * num_replicas if rows_per_element else batch_size // sharding.num_workers
    return build_indexed_batches(source, indices, rows_per_batch=rows_per_batch, num_replicas=num_replicas)


def build_indexed_batches(
    source: BatchSource,
    indices: np.ndarray,
    *,
    rows_per_batch: int,
    num_replicas: int,
    view: EpochAugmentation | None = None,
    num_prefetched: int = 0,
) -> Batches:
    """Build batches of the examples at `indices`, followed by infinitely many batches of padding.

    Args:
        indices: example indices, int64 [n], increasing.
        rows_per_batch: this worker's rows in a global batch. An element has rows_per_batch / num_replicas rows.
        num_replicas: number of replicas on this worker.
        view: how images are augmented; None for no augmentation.
        num_prefetched: number of elements to prefetch; 0 for 2 elements per replica.
    """
    num_blocks, block = make_sequence_blocks(source.split, indices, rows_per_batch)
    rows_per_element = rows_per_batch // num_replicas

    @without_autograph
    def augment_rows(batch: Row) -> Row:
        del batch["epoch"]
        if view is not None:
            epochs = tf.fill(tf.shape(batch["index"]), tf.constant(view.epoch, tf.int64))
            batch["image"] = augment(batch["image"], view.augmentation, view.seed, epochs, batch["index"])
        return batch

    num_calls = source.parallel if view is not None and view.augmentation.active else None
    batches = _build_batches(source, block, num_blocks, rows_per_element).map(
        augment_rows, num_parallel_calls=num_calls
    )
    padding = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in batches.element_spec.items()}
    # Infinite padding, so that a strategy does not check for the end of the dataset.
    endless_batches = batches.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
    dataset, max_rows_ahead = _prefetch(
        endless_batches, source, rows_per_element, num_replicas, num_calls, num_prefetched
    )
    num_batches = -(-len(indices) // rows_per_batch)

    def open_gate() -> ShardGate:
        return source.open_gate("evaluation", compute_block_shards(block, num_blocks), max_rows_ahead)

    return Batches(dataset, num_batches, open_gate)
