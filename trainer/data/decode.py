"""From blocks of row numbers to decoded images, in the graph: nothing here runs Python for an example."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.contracts import Split
from trainer.data.order import Block
from trainer.imaging import Resize, decode_image

Row = dict[str, tf.Tensor]
_TYPES = {
    "pieces": tf.int64,
    "place": tf.int64,
    "index": tf.int64,
    "weight": tf.float32,
    "position": tf.int64,
    "epoch": tf.int64,
}


def block_dataset(block: Callable[[int], Block], count: int | None) -> tf.data.Dataset:
    """Blocks 0, 1, ... as a dataset of dicts with the fields of `Block`; endless without a count."""

    def made(number: np.ndarray) -> tuple[np.ndarray, ...]:
        made_block = block(int(number))
        return tuple(getattr(made_block, name) for name in _TYPES)

    def fields(number: tf.Tensor) -> Row:
        values = tf.numpy_function(made, [number], list(_TYPES.values()))
        for (name, _), value in zip(_TYPES.items(), values, strict=True):
            value.set_shape([None, 3] if name == "pieces" else [None])
        return dict(zip(_TYPES, values, strict=True))

    return tf.data.Dataset.range(np.iinfo(np.int64).max if count is None else count).map(fields)


def _read_records(pieces: tf.Tensor, paths: tf.Tensor) -> tf.Tensor:
    """The raw records of a block, string [records]."""
    total = tf.reduce_sum(pieces[:, 2])

    def piece(row: tf.Tensor) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(tf.gather(paths, row[0])).skip(row[1]).take(row[2])

    records = tf.data.Dataset.from_tensor_slices(pieces).flat_map(piece).batch(total).get_single_element()
    tf.debugging.assert_equal(tf.size(records, tf.int64), total, "a shard has fewer records than it had")
    return records


def encoded_rows(blocks: tf.data.Dataset, split: Split) -> tf.data.Dataset:
    """One element a row: index, weight, position, epoch, and for records `record`, its raw bytes.

    The records of the next block are read while those of this one are used, so that two blocks are in memory.
    """
    if not split.shards:
        return blocks.map(lambda block: {k: block[k] for k in ("index", "weight", "position", "epoch")}).unbatch()
    paths = tf.constant([shard.path for shard in split.shards])

    def read(block: Row) -> Row:
        pieces = block.pop("pieces")  # of another length than the rows
        return {**block, "records": _read_records(pieces, paths)}

    def rows(block: Row) -> tf.data.Dataset:
        records = block.pop("records")

        def pick(row: Row) -> Row:
            place = row.pop("place")
            return {**row, "record": tf.gather(records, place)}

        return tf.data.Dataset.from_tensor_slices(block).map(pick)

    return blocks.map(read).prefetch(1).flat_map(rows)


def decoder(split: Split, size: int, resize: Resize) -> Callable[[Row], tf.Tensor]:
    """Turns a row into its image, uint8 [S, S, 3]; raises tf.errors.OpError for one that cannot be read."""
    paths = None if split.shards else tf.constant(split.files, tf.string)

    def decode(row: Row) -> tf.Tensor:
        if split.shards:
            feature = {split.image_field: tf.io.FixedLenFeature([], tf.string)}
            data = tf.io.parse_single_example(row["record"], feature)[split.image_field]
        else:
            data = tf.io.read_file(tf.gather(paths, row["index"]))
        return decode_image(data, size, resize)

    return decode


def decoded_rows(
    rows: tf.data.Dataset, split: Split, size: int, resize: Resize, *, skip: bool, threads: int
) -> tf.data.Dataset:
    """Adds `image` (zeros in padding) and `failed` to each row, decoding in parallel and in order.

    With `skip` an image that cannot be read becomes zeros with weight 0 and `failed`; that costs about a third more,
    because TensorFlow can catch an error only in a dataset of its own. Without, the error ends the iteration.
    """
    decode = decoder(split, size, resize)
    blank = tf.zeros([size, size, 3], tf.uint8)

    def one(row: Row) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cond(row["weight"] > 0, lambda: decode(row), lambda: blank), False

    def attempt(row: Row) -> tuple[tf.Tensor, tf.Tensor]:
        tried = tf.data.Dataset.from_tensors(row).map(one).ignore_errors()
        return tried.concatenate(tf.data.Dataset.from_tensors((blank, True))).take(1).get_single_element()

    @tf.autograph.experimental.do_not_convert  # nothing to rewrite, and half the time to trace
    def add(row: Row) -> Row:
        image, failed = attempt(row) if skip else one(row)
        weight = tf.where(failed, 0.0, row["weight"])
        kept = {k: row[k] for k in ("index", "position", "epoch")}
        return {**kept, "weight": weight, "image": tf.ensure_shape(image, [size, size, 3]), "failed": failed}

    return rows.map(add, num_parallel_calls=threads, deterministic=True)
