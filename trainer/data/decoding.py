"""From the bytes of an image file to pixels, one way in training, evaluation and export; datasets of decoded rows."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.data.order import Block
from trainer.types import Split

Resize = Literal["stretch", "crop"]

# Bilinear reads 2x2 source pixels for each one it makes, so what it leaves out grows with the shrinking. Averaging over
# all of them (antialias) doubles the cost of a whole decode of a 500x333 JPEG to 224 (2.6 against 1.3 ms of CPU) and
# changes a pixel by 1.6 of 255 there; a 3000x2000 photo changes by 3.0, from speckles that a viewer sees.
ANTIALIAS_FROM = 3.0

# Parts of their size that JPEG files are decoded at, as Pillow's draft mode does; measured in docs/data.md.
RATIOS = (1, 2, 4, 8)


def _decode_bmp(data: tf.Tensor) -> tf.Tensor:
    """TensorFlow reads the palette numbers of an 8-bit BMP as if they were grey values; look them up instead."""

    def number(at: int, code: tf.DType) -> tf.Tensor:
        return tf.cast(tf.io.decode_raw(tf.strings.substr(data, at, code.size), code)[0], tf.int32)

    pixels = tf.io.decode_image(data, channels=0, expand_animations=False)
    if_paletted = tf.logical_and(tf.equal(number(28, tf.uint16), 8), tf.equal(tf.shape(pixels)[2], 1))

    def look_up() -> tf.Tensor:
        first, colours = 14 + number(14, tf.int32), number(46, tf.int32)
        colours = tf.where(colours > 0, colours, 256)
        table = tf.reshape(tf.io.decode_raw(tf.strings.substr(data, first, 4 * colours), tf.uint8), [-1, 4])
        return tf.gather(table[:, 2::-1], tf.cast(pixels[:, :, 0], tf.int32))  # stored blue, green, red, unused

    return tf.cond(if_paletted, look_up, lambda: tf.io.decode_image(data, channels=3, expand_animations=False))


def _centre_square(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(top, left, side) of the largest centred square of an image [H, W, ...]."""
    side = tf.minimum(shape[0], shape[1])
    return (shape[0] - side) // 2, (shape[1] - side) // 2, side


def _decode_jpeg(data: tf.Tensor, size: int, resize: Resize) -> tf.Tensor:
    """A JPEG as large as it is, or a half, quarter or eighth of that where both sides keep `size` pixels: its decoder
    then leaves out the fine waves of each block of 8x8 pixels. For a crop, only the square that is kept is decoded.
    """
    shape = tf.io.extract_jpeg_shape(data)

    def decode(ratio: int) -> tf.Tensor:
        if resize == "stretch":
            return tf.io.decode_jpeg(data, channels=3, ratio=ratio)
        top, left, side = _centre_square(-(-shape // ratio))
        return tf.io.decode_and_crop_jpeg(data, tf.stack([top, left, side, side]), channels=3, ratio=ratio)

    fits = tf.reduce_min(shape[:2]) >= [ratio * size for ratio in RATIOS[1:]]
    return tf.switch_case(tf.reduce_sum(tf.cast(fits, tf.int32)), [partial(decode, ratio) for ratio in RATIOS])


def _decode_other(data: tf.Tensor, resize: Resize) -> tf.Tensor:
    whole = tf.cond(
        tf.equal(tf.strings.substr(data, 0, 2), b"BM"),
        lambda: _decode_bmp(data),
        lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
    )
    if resize == "stretch":
        return whole
    top, left, side = _centre_square(tf.shape(whole))
    return whole[top : top + side, left : left + side]


def decode_image(data: tf.Tensor, size: int, resize: Resize) -> tf.Tensor:
    """The pixels of one encoded image; works in `Dataset.map` and in a SavedModel signature.

    JPEG (CMYK too), PNG, BMP, GIF (first frame) and opaque WebP become RGB: grey is repeated, transparency is dropped
    (the colour stored under it shows, as in `tf.io.decode_image(channels=3)`), 16 bits become 8. The orientation that
    EXIF may ask for is not applied. A JPEG with both sides at least 2, 4 or 8 times S is decoded at a half, quarter or
    eighth of its size. Shrinking what was decoded by more than `ANTIALIAS_FROM` averages over all source pixels;
    anything else is plain bilinear, in half-pixel coordinates; values are rounded.

    Args:
        data: string scalar.
        size: side of the result, S pixels.
        resize: `stretch` changes the aspect ratio; `crop` takes the largest centred square.

    Returns:
        uint8 [S, S, 3].

    Raises:
        tf.errors.InvalidArgumentError: damaged, truncated or of an unknown format.
    """
    pixels = tf.cond(tf.io.is_jpeg(data), lambda: _decode_jpeg(data, size, resize), lambda: _decode_other(data, resize))
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    shrinking = tf.cast(tf.reduce_max(tf.shape(pixels)), tf.float32) / float(size)
    resized = tf.cond(
        shrinking > ANTIALIAS_FROM,
        lambda: tf.image.resize(pixels, [size, size], antialias=True),
        lambda: tf.image.resize(pixels, [size, size]),
    )
    return tf.ensure_shape(tf.cast(tf.round(resized), tf.uint8), [size, size, 3])


# ---------------------------------------------------------------------------------------------------------------
# From blocks of row numbers to decoded images, in the graph: nothing here runs Python for an example

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
    """Adds the raw `records` of each block, string [n]; those that a damaged shard no longer gives are empty."""
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
        """The row numbers of a block, with the block itself, and a marker of its end where failures are noted."""
        numbers = tf.data.Dataset.range(tf.size(block["index"], tf.int64) + (1 if failures else 0))
        return numbers.map(plain(lambda number: {"number": number, "block": block}))

    @plain
    def with_image(row: Row) -> Row:
        block, number = row["block"], row["number"]
        at = tf.minimum(number, tf.size(block["index"], tf.int64) - 1)
        example = {k: block[k][at] for k in COLUMNS}
        record = {"record": tf.gather(block["records"], block["offset"][at])} if split.shards else {}
        used = tf.logical_and(tf.equal(number, at), example["weight"] > 0)
        image = tf.cond(used, lambda: decode({**example, **record}), lambda: black)
        if failures is None:
            return {**example, "image": image}
        return {"number": number, "is_marker": number > at, "block": {k: block[k] for k in COLUMNS}, "image": image}

    @plain
    def with_first(first: tf.Tensor, row: Row) -> tuple[tf.Tensor, Row]:
        """Adds the number that should have come, at which the gap before this row begins."""
        return tf.where(row.pop("is_marker"), tf.zeros([], tf.int64), row["number"] + 1), {**row, "first": first}

    @plain
    def filled(row: Row) -> tf.data.Dataset:
        """The row, and before it blank ones for those that did not arrive."""
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
