"""From blocks of row numbers to decoded images, in the graph: nothing here runs Python for an example.

An image that cannot be decoded raises inside the parallel map, where nothing can catch it. Where such images are to be
skipped, errors are dropped there (`ignore_errors`) and found again by counting: each row knows its number in its block,
and a block ends with a marker that always arrives. A gap is filled with what stands for the missing rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.contracts import Split
from trainer.data.order import Block
from trainer.imaging import Resize, decode_image

Row = dict[str, tf.Tensor]
COLUMNS = ("index", "weight", "position", "epoch")

# Nothing in this folder needs its Python rewritten for the graph, and rewriting takes half of the time to build it.
plain = tf.autograph.experimental.do_not_convert


def block_dataset(block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Blocks 0, 1, ... as a dataset; endless without a count. The next one is made while this one is used."""
    blocks = tf.data.Dataset.range(np.iinfo(np.int64).max if count is None else count).map(plain(block))
    # All rows of a block may be other workers'.
    return blocks.filter(plain(lambda block: tf.size(block["index"]) > 0)).prefetch(1)


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
    read is appended to it, a line each, and the row has weight 0 and a black image; that costs a tenth of the speed.
    Where it is None, such an example ends the iteration with a tf.errors.OpError.
    """
    decode, black = decoder(split, size, resize), tf.zeros([size, size, 3], tf.uint8)

    @plain
    def numbered(block: Block) -> tf.data.Dataset:
        """The row numbers of a block, and its marker; the block itself is only pointed at."""
        numbers = tf.data.Dataset.range(tf.size(block["index"], tf.int64) + (1 if failures else 0))
        return numbers.map(plain(lambda number: {"number": number, "block": block}))

    @plain
    def with_image(row: Row) -> Row:
        block, number = row["block"], row["number"]
        at = tf.minimum(number, tf.size(block["index"], tf.int64) - 1)
        example = {k: block[k][at] for k in COLUMNS}
        record = {"record": tf.gather(block["records"], block["place"][at])} if split.shards else {}
        used = tf.logical_and(tf.equal(number, at), example["weight"] > 0)
        image = tf.cond(used, lambda: decode({**example, **record}), lambda: black)
        if failures is None:
            return {**example, "image": image}
        return {"number": number, "is_marker": number > at, "block": {k: block[k] for k in COLUMNS}, "image": image}

    @plain
    def with_first(first: tf.Tensor, row: Row) -> tuple[tf.Tensor, Row]:
        """Adds the number that should have come: where the gap before this row begins."""
        return tf.where(row.pop("is_marker"), tf.zeros([], tf.int64), row["number"] + 1), {**row, "first": first}

    @plain
    def filled(row: Row) -> tf.data.Dataset:
        """The row, and before it what stands for those that did not arrive."""
        here = {k: v[row["first"] : row["number"] + 1] for k, v in row["block"].items()}  # none for a marker itself
        lost, rows = row["block"]["index"][row["first"] : row["number"]], tf.shape(here["index"])[0]
        some = tf.size(lost) > 0

        def note() -> tf.Operation:
            lines = tf.strings.reduce_join(tf.strings.as_string(lost), separator="\n")
            return tf.print(lines, output_stream=f"file://{failures}")

        with tf.control_dependencies([tf.cond(some, note, tf.no_op)]):
            arrived = tf.range(rows) >= tf.size(lost)
        blanks = tf.zeros([tf.size(lost), size, size, 3], tf.uint8)
        images = tf.cond(some, lambda: tf.concat([blanks, row["image"][None]], 0), lambda: row["image"][None])
        here["weight"] = tf.where(arrived, here["weight"], 0.0)
        return tf.data.Dataset.from_tensor_slices({**here, "image": images[:rows]})

    blocks = _with_records(blocks, split) if split.shards else blocks
    rows = blocks.flat_map(numbered).map(with_image, num_parallel_calls=threads, deterministic=True)
    return rows.ignore_errors().scan(tf.zeros([], tf.int64), with_first).flat_map(filled) if failures else rows
