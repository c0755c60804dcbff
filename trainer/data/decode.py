"""From blocks of row numbers to decoded images, in the graph: nothing here runs Python for an example.

An image that cannot be decoded raises inside the parallel map, where nothing can catch it. So errors are dropped there
(`ignore_errors`) and found again by counting: each row knows its number in its block, and a block ends with a marker
that always arrives. A gap is either an error that names the example, or is filled with what stands for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.contracts import Split
from trainer.data.order import Block
from trainer.imaging import Resize, decode_image

Row = dict[str, tf.Tensor]
UNREADABLE = "cannot read example"  # what an error of this module says before the index
_COLUMNS = ("index", "weight", "position", "epoch")

# Nothing in this folder needs its Python rewritten for the graph, and rewriting takes half of the time to build it.
plain = tf.autograph.experimental.do_not_convert


def block_dataset(block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Blocks 0, 1, ... as a dataset; endless without a count. The next one is made while this one is used."""
    return tf.data.Dataset.range(np.iinfo(np.int64).max if count is None else count).map(plain(block)).prefetch(1)


def _with_records(blocks: tf.data.Dataset, split: Split) -> tf.data.Dataset:
    """Adds the raw `records` of each block, string [n]; what a damaged shard no longer gives is empty."""
    paths = tf.constant([shard.path for shard in split.shards])
    lost = tf.data.Dataset.from_tensor_slices([b""]).repeat()

    @plain
    def piece(row: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(tf.gather(paths, row[0])).skip(row[1]).take(row[2])
        return records.ignore_errors().concatenate(lost).take(row[2])

    @plain
    def read(block: Block) -> tf.data.Dataset:
        pieces = block.pop("pieces")
        records = tf.data.Dataset.from_tensor_slices(pieces).flat_map(piece).batch(tf.reduce_sum(pieces[:, 2]))
        return records.map(plain(lambda raw: {**block, "records": raw}))

    return blocks.flat_map(read).prefetch(1)


def decoder(split: Split, size: int, resize: Resize) -> Callable[[Row], tf.Tensor]:
    """Turns an example's `record`, or its `index` where there are files, into its image, uint8 [S, S, 3].

    What it makes raises tf.errors.OpError for an example that cannot be read.
    """
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
    blocks: tf.data.Dataset, split: Split, size: int, resize: Resize, *, threads: int, failures: str | None
) -> tf.data.Dataset:
    """The rows of blocks, one element each: index, weight, position, epoch, and image, uint8 [S, S, 3], 0 in padding.

    Images are decoded in parallel, in order. Where `failures` names a file, the index of an example that cannot be
    read is appended to it, a line each, and the row has weight 0 and a black image. Where it is None, iterating
    raises tf.errors.InvalidArgumentError whose message holds `UNREADABLE` and the index.
    """
    decode, black = decoder(split, size, resize), tf.zeros([size, size, 3], tf.uint8)

    @plain
    def numbered(block: Block) -> tf.data.Dataset:
        """Row numbers of a block, and after the last one the marker; the block itself is only pointed at."""
        numbers = tf.data.Dataset.range(tf.size(block["index"], tf.int64) + 1)
        return numbers.map(plain(lambda number: {"number": number, "block": block}))

    @plain
    def add_image(row: Row) -> Row:
        block, number = row["block"], row["number"]
        last = tf.size(block["index"], tf.int64) - 1
        example = {"index": block["index"][tf.minimum(number, last)]}
        if split.shards:
            example["record"] = tf.gather(block.pop("records"), block["place"][tf.minimum(number, last)])
        used = tf.logical_and(number <= last, block["weight"][tf.minimum(number, last)] > 0)
        image = tf.cond(used, lambda: decode(example), lambda: black)
        return {"number": number, "block": {k: block[k] for k in _COLUMNS}, "image": image}

    @plain
    def count_gap(expected: tf.Tensor, row: Row) -> tuple[tf.Tensor, Row]:
        is_marker = tf.equal(row["number"], tf.size(row["block"]["index"], tf.int64))
        return tf.where(is_marker, tf.zeros([], tf.int64), row["number"] + 1), {**row, "first": expected}

    @plain
    def fill(row: Row) -> tf.data.Dataset:
        block, first, number = row["block"], row["first"], row["number"]
        lost = block["index"][first:number]
        here = {k: v[first : number + 1] for k, v in block.items()}  # the marker's own place is behind the last row
        seen = tf.range(first, first + tf.size(here["index"], tf.int64)) >= number
        if failures is not None:
            note = tf.cond(
                tf.size(lost) > 0,
                lambda: tf.print(
                    tf.strings.reduce_join(tf.strings.as_string(lost), separator="\n"),
                    output_stream=f"file://{failures}",
                ),
                tf.no_op,
            )
            with tf.control_dependencies([note]):
                here["weight"] = tf.where(seen, here["weight"], 0.0)
        images = tf.where(seen[:, None, None, None], row["image"][None], black[None])
        return tf.data.Dataset.from_tensor_slices({**here, "image": images})

    return None
