"""Decode images to pixels, in the same way in training, evaluation and export, and build datasets of decoded rows."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.data.order import Block
from trainer.data.orientation import compute_center_offsets, extract_exif, turn_upright
from trainer.names import encode_file_name, escape_unprintable
from trainer.types import Orientation, Split

Resize = Literal["stretch", "crop"]  # how an image becomes square; see `decode_image`

# An image that is reduced by more than this factor is antialiased. Without antialiasing, bilinear interpolation reads
# 2x2 source pixels per output pixel. At a factor of about 2, antialiasing doubles the decoding time (500x333 JPEG to
# 224: 2.6 instead of 1.3 ms) and changes a pixel by 1.6 of 255; in a 3000x2000 photo it changes a pixel by 3.0 and
# removes visible speckles.
ANTIALIAS_ABOVE = 3.0

JPEG_RATIOS = (1, 2, 4, 8)  # decode at 1 / ratio of the size, as in Pillow's draft mode; measured in docs/data.md


def _decode_bmp(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a BMP to uint8 [H, W, 3], and apply its palette if it has 8 bits per pixel.

    TensorFlow ignores the palette, and returns the palette indices as gray values.
    """

    def read_header_field(offset: int, dtype: tf.DType) -> tf.Tensor:
        return tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, offset, dtype.size), dtype)[0], tf.int32)

    # Header fields by offset: 14 size of the info header, 28 bits per pixel, 46 number of colors (0 for 256).
    pixels = tf.io.decode_image(encoded, channels=0, expand_animations=False)
    has_palette = tf.logical_and(tf.equal(read_header_field(28, tf.uint16), 8), tf.equal(tf.shape(pixels)[2], 1))

    def apply_palette() -> tf.Tensor:
        offset, num_colors = 14 + read_header_field(14, tf.int32), read_header_field(46, tf.int32)
        num_colors = tf.where(num_colors > 0, num_colors, 256)
        palette = tf.reshape(tf.io.decode_raw(tf.strings.substr(encoded, offset, 4 * num_colors), tf.uint8), [-1, 4])
        return tf.gather(palette[:, 2::-1], tf.cast(pixels[:, :, 0], tf.int32))  # stored as blue, green, red, unused

    return tf.cond(has_palette, apply_palette, lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False))


def _decode_jpeg(encoded: tf.Tensor, size: int, resize: Resize, exif: tf.Tensor) -> tf.Tensor:
    """Decode a JPEG, or its centered square if `resize` is "crop", at 1 / ratio of its size, to uint8 [h, w, 3].

    The ratio is the largest of `JPEG_RATIOS` at which both sides have at least `size` pixels, or 1 for a smaller image.
    """
    shape = tf.io.extract_jpeg_shape(encoded)

    def decode(ratio: int) -> tf.Tensor:
        if resize == "stretch":
            return tf.io.decode_jpeg(encoded, channels=3, ratio=ratio)
        scaled_shape = -(-shape[:2] // ratio)
        side = tf.reduce_min(scaled_shape, keepdims=True)
        crop_window = tf.concat([compute_center_offsets(scaled_shape - side, exif), side, side], 0)
        return tf.io.decode_and_crop_jpeg(encoded, crop_window, channels=3, ratio=ratio)

    fits = tf.reduce_min(shape[:2]) >= [ratio * size for ratio in JPEG_RATIOS[1:]]
    return tf.switch_case(tf.reduce_sum(tf.cast(fits, tf.int32)), [partial(decode, ratio) for ratio in JPEG_RATIOS])


def decode_pixels(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a PNG, BMP, GIF (first frame) or WebP, a string scalar, to uint8 [H, W, 3].

    Alpha is dropped, and the EXIF orientation is not applied.
    """
    decode = partial(tf.io.decode_image, encoded, expand_animations=False)
    is_bmp, is_webp = (tf.strings.substr(encoded, 0, len(magic)) == magic for magic in (b"BM", b"RIFF"))
    # TensorFlow does not drop a WebP's alpha, so it is cut off here.
    decode_non_bmp = partial(tf.cond, is_webp, lambda: decode(channels=0)[:, :, :3], lambda: decode(channels=3))
    return tf.cond(is_bmp, lambda: _decode_bmp(encoded), decode_non_bmp)


def _decode_other(encoded: tf.Tensor, resize: Resize, exif: tf.Tensor) -> tf.Tensor:
    """Decode a PNG, BMP, GIF or WebP at full size. Crop it to its centered square if `resize` is "crop"."""
    pixels = decode_pixels(encoded)
    if resize == "stretch":
        return pixels
    shape = tf.shape(pixels)[:2]
    side = tf.reduce_min(shape)
    top, left = tf.unstack(compute_center_offsets(shape - side, exif))
    return pixels[top : top + side, left : left + side]


def decode_image(encoded: tf.Tensor, size: int, resize: Resize, orientation: Orientation = "exif") -> tf.Tensor:
    """Decode and resize one image. Works in `Dataset.map` and in a SavedModel signature.

    JPEG (including CMYK), PNG, BMP, GIF (first frame) and WebP become 8-bit RGB: gray is repeated, and alpha is dropped
    as in `tf.io.decode_image(channels=3)`. A JPEG whose shorter side is at least 2, 4 or 8 times `size` is decoded at
    1/2, 1/4 or 1/8 of its size. Resizing is bilinear with half-pixel centers, and antialiased if the longer decoded
    side is more than `ANTIALIAS_ABOVE` times `size`. Values are rounded.

    Args:
        encoded: the encoded image, a string scalar.
        size: side of the result in pixels.
        resize: "stretch" changes the aspect ratio; "crop" takes the largest centered square.
        orientation: "exif" turns an image upright by its EXIF orientation; "ignore" uses it as it is stored.

    Returns:
        The pixels, uint8 [size, size, 3].

    Raises:
        tf.errors.InvalidArgumentError: the image is corrupt, truncated or of an unknown format.
    """

    def decode(is_jpeg: bool) -> tf.Tensor:
        exif = extract_exif(encoded, is_jpeg) if orientation == "exif" else tf.constant([], tf.string)
        pixels = _decode_jpeg(encoded, size, resize, exif) if is_jpeg else _decode_other(encoded, resize, exif)
        return turn_upright(pixels, exif) if orientation == "exif" else pixels

    pixels = tf.cond(tf.io.is_jpeg(encoded), lambda: decode(True), lambda: decode(False))
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    factor = tf.cast(tf.reduce_max(tf.shape(pixels)), tf.float32) / float(size)
    resize_to = partial(tf.image.resize, pixels, [size, size])
    resized = tf.cond(factor > ANTIALIAS_ABOVE, lambda: resize_to(antialias=True), resize_to)
    return tf.ensure_shape(tf.cast(tf.round(resized), tf.uint8), [size, size, 3])


@cache
def compile_decoder(size: int, resize: Resize, orientation: Orientation) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return `decode_image` with these settings as a tf.function of the encoded image, a string scalar.

    It is traced once per process. Further pipelines save the time to trace about a hundred operations.
    """
    signature = [tf.TensorSpec([], tf.string)]
    decode = partial(decode_image, size=size, resize=resize, orientation=orientation)
    return tf.function(decode, input_signature=signature, autograph=False)


def decode_full_size(content: bytes, orientation: Orientation) -> tf.Tensor:
    """Decode an image eagerly at full size to uint8 [H, W, 3], and turn it upright if `orientation` is "exif".

    `content` has the bytes of the encoded image.

    Raises:
        tf.errors.OpError: the image is unreadable.
    """
    encoded = tf.constant(content)
    is_jpeg = content.startswith(b"\xff\xd8\xff")
    pixels = tf.io.decode_jpeg(encoded, channels=3) if is_jpeg else decode_pixels(encoded)
    return turn_upright(pixels, extract_exif(encoded, is_jpeg)) if orientation == "exif" else pixels


def get_error_message(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Return the message of an error that TensorFlow raised when it read an image.

    TensorFlow raises a UnicodeDecodeError, which contains the message, if a file name in the message is not UTF-8.
    """
    if isinstance(error, UnicodeDecodeError):
        return error.object.decode(errors="surrogateescape")
    return str(error.message)


def describe_decoding_error(error: tf.errors.OpError | UnicodeDecodeError) -> str:
    """Return the first line of TensorFlow's error message, escaped for display, without the names of graph nodes."""
    line = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]|name:\s*$", "", get_error_message(error).splitlines()[0])
    return escape_unprintable(line.strip().rstrip("."))


Row = dict[str, tf.Tensor]  # column name -> value, for one example or for a batch of examples
COLUMNS = ("index", "weight", "position", "epoch")  # columns of a `Block` that are copied to its rows

without_autograph = tf.autograph.experimental.do_not_convert  # AutoGraph doubles the time to build a pipeline


def build_block_dataset(block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Return a dataset of the blocks with index 0 to `count` - 1, or an infinite one if `count` is None.

    `block` computes a block from its index, an int64 scalar. Empty blocks are skipped. One block is prefetched.
    """
    blocks = tf.data.Dataset.range(np.iinfo(np.int64).max if count is None else count).map(without_autograph(block))
    # A block is empty if all of its rows belong to other workers.
    return blocks.filter(without_autograph(lambda block: tf.size(block["index"]) > 0)).prefetch(1)


def _add_records(blocks: tf.data.Dataset, split: Split) -> tf.data.Dataset:
    """Replace the column `ranges` of each block by `records`, string [n], the serialized records in these ranges.

    A record that cannot be read becomes an empty string.
    """
    paths = tf.constant([encode_file_name(shard.path) for shard in split.shards], tf.string)
    empty = tf.data.Dataset.from_tensor_slices([b""]).repeat()

    @without_autograph
    def read_range(record_range: tf.Tensor) -> tf.data.Dataset:
        shard, first, count = (record_range[i] for i in range(3))  # tf.unstack crashes TensorFlow 2.21 here
        records = tf.data.TFRecordDataset(tf.gather(paths, shard)).skip(first).take(count)
        return records.ignore_errors().concatenate(empty).take(count)

    @without_autograph
    def read(block: Block) -> tf.data.Dataset:
        ranges = block.pop("ranges")
        records = tf.data.Dataset.from_tensor_slices(ranges).flat_map(read_range).batch(tf.reduce_sum(ranges[:, 2]))
        return records.map(without_autograph(lambda raw: {**block, "records": raw}))

    return blocks.flat_map(read).prefetch(1)


def make_row_decoder(split: Split, size: int, resize: Resize) -> Callable[[Row], tf.Tensor]:
    """Return a function that decodes a row's image to uint8 [size, size, 3].

    It decodes the serialized record in the row's column `record` if the split has shards, otherwise the file of the
    example `index`. For an unreadable image it raises a tf.errors.OpError, or a UnicodeDecodeError
    (`get_error_message`).
    """
    paths = None if split.shards else tf.constant([*map(encode_file_name, split.files)], tf.string)

    def decode(row: Row) -> tf.Tensor:
        if split.shards:
            features = {split.image_field: tf.io.FixedLenFeature([], tf.string)}
            encoded = tf.io.parse_single_example(row["record"], features)[split.image_field]
        else:
            encoded = tf.io.read_file(tf.gather(paths, row["index"]))
        if tf.executing_eagerly():  # a compiled function would wrap the error message
            return decode_image(encoded, size, resize, split.orientation)
        return compile_decoder(size, resize, split.orientation)(encoded)

    return decode


def decode_blocks(
    blocks: tf.data.Dataset, split: Split, size: int, resize: Resize, *, threads: int, failures_file: str | None
) -> tf.data.Dataset:
    """Return a dataset of the rows of `blocks`, in order, each with its decoded image.

    Args:
        blocks: dataset of blocks, as from `build_block_dataset`.
        threads: number of images that are decoded in parallel.
        failures_file: path of a file to which the index of each unreadable example is appended, one per line. The
            example's row gets weight 0 and a black image. This reduces the speed by 10 %. If None, an unreadable
            example raises a tf.errors.OpError when the dataset is iterated.

    Returns:
        A dataset of rows with the columns `COLUMNS` and `image`, uint8 [size, size, 3], which is black for padding.
    """
    decode = make_row_decoder(split, size, resize)
    black_image = tf.zeros([size, size, 3], tf.uint8)

    @without_autograph
    def enumerate_rows(block: Block) -> tf.data.Dataset:
        """Return a dataset of a block's row indices, each with the block, and an end marker if `failures_file` is set.

        The end marker is one more index. `ignore_errors` removes unreadable rows. A gap in the row indices shows which
        rows failed, and the end marker shows failures at the end of the block.
        """
        row_indices = tf.data.Dataset.range(tf.size(block["index"], tf.int64) + (1 if failures_file else 0))
        return row_indices.map(without_autograph(lambda i: {"row_index": i, "block": block}))

    @without_autograph
    def add_image(row: Row) -> Row:
        block, row_index = row["block"], row["row_index"]
        last_index = tf.size(block["index"], tf.int64) - 1
        source_row = tf.minimum(row_index, last_index)  # an end marker gets the last row's columns, which are not used
        example = {name: block[name][source_row] for name in COLUMNS}
        record = {"record": tf.gather(block["records"], block["offset"][source_row])} if split.shards else {}
        has_image = tf.logical_and(row_index <= last_index, example["weight"] > 0)
        image = tf.cond(has_image, lambda: decode({**example, **record}), lambda: black_image)
        if failures_file is None:
            return {**example, "image": image}
        columns = {name: block[name] for name in COLUMNS}
        return {"row_index": row_index, "is_marker": row_index > last_index, "block": columns, "image": image}

    @without_autograph
    def add_first_missing(first_missing: tf.Tensor, row: Row) -> tuple[tf.Tensor, Row]:
        """Add `first_missing`, the index after the previous decoded row. All rows from it to the row before failed."""
        next_missing = tf.where(row.pop("is_marker"), tf.zeros([], tf.int64), row["row_index"] + 1)
        return next_missing, {**row, "first_missing": first_missing}

    @without_autograph
    def insert_failed_rows(row: Row) -> tf.data.Dataset:
        """Return a black row of weight 0 for each failed row before this row, then this row, unless it is a marker."""
        first_failed, row_index = row["first_missing"], row["row_index"]  # none failed if they are equal
        examples = {name: column[first_failed : row_index + 1] for name, column in row["block"].items()}
        failed_indices = row["block"]["index"][first_failed:row_index]
        num_rows = tf.shape(examples["index"])[0]
        any_failed = tf.size(failed_indices) > 0

        def record_failures() -> tf.Operation:
            lines = tf.strings.reduce_join(tf.strings.as_string(failed_indices), separator="\n")
            return tf.print(lines, output_stream=f"file://{failures_file}")

        with tf.control_dependencies([tf.cond(any_failed, record_failures, tf.no_op)]):
            is_decoded = tf.range(num_rows) >= tf.size(failed_indices)
        black = tf.zeros([tf.size(failed_indices), size, size, 3], tf.uint8)
        images = tf.cond(any_failed, lambda: tf.concat([black, row["image"][None]], 0), lambda: row["image"][None])
        examples["weight"] = tf.where(is_decoded, examples["weight"], 0.0)
        return tf.data.Dataset.from_tensor_slices({**examples, "image": images[:num_rows]})  # a marker has no row

    blocks = _add_records(blocks, split) if split.shards else blocks
    rows = blocks.flat_map(enumerate_rows).map(add_image, num_parallel_calls=threads, deterministic=True)
    if failures_file is None:
        return rows
    return rows.ignore_errors().scan(tf.zeros([], tf.int64), add_first_missing).flat_map(insert_failed_rows)
