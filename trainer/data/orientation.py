"""Parse the EXIF orientation of an encoded image in a TensorFlow graph, and turn its pixels upright."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ORIENTATION = 0x0112  # EXIF tag
_BYTE_ORDER_MARKS = (b"II*\0", b"MM\0*")  # first bytes of little-endian and of big-endian EXIF data
_HEAD_BYTES = 2**16  # beginning of a JPEG, in which its EXIF data begins
_MAX_ENTRIES = 128  # entries that are read from the first EXIF directory; cameras write about ten
_ENTRY_BYTES = 12


def compile_without_inlining(function: Callable[..., tf.Tensor]) -> Any:
    """Compile a function that becomes one node of the graph that calls it, because TensorFlow does not inline it.

    In a branch of `tf.cond`, a single node costs nothing if the other branch is taken.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def extract_exif(data: tf.Tensor, is_jpeg: bool) -> tf.Tensor:
    """Return the bytes after the EXIF marker of an encoded image, string [1], or string [0] if it has no marker.

    Args:
        data: the encoded image, a string scalar.
        is_jpeg: whether the image is a JPEG. Otherwise it is a PNG, a WebP, or of a format without EXIF data.
    """
    if is_jpeg:
        searched, marker = tf.strings.substr(data, 0, _HEAD_BYTES), tf.constant(b"Exif\0\0")
    else:
        searched, marker = data, tf.where(tf.strings.substr(data, 0, 4) == b"RIFF", b"EXIF", b"eXIf")
    # TensorFlow splits strings faster than it searches them with regular expressions.
    return tf.raw_ops.StringSplitV2(input=[searched], sep=marker, maxsplit=1).values[1:]


def _bytes_at(data: tf.Tensor, offset: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return the `count` bytes of a string that begin at `offset`, int32 [count]. Bytes beyond its end are 0."""
    substring = tf.strings.substr(data, tf.minimum(offset, tf.strings.length(data)), count)
    return tf.cast(tf.io.decode_raw(substring, tf.uint8, fixed_length=count), tf.int32)


def parse_orientation(exif: tf.Tensor) -> tf.Tensor:
    """Return the orientation that EXIF data specifies, an int32 scalar from 1 (upright) to 8.

    Args:
        exif: the bytes after the EXIF marker, a string scalar. The result is 1 if they have no valid orientation.
    """
    # In a WebP, the length of the chunk precedes the data, and some programs repeat the marker of a JPEG there.
    is_mark = tf.reduce_all(_bytes_at(exif, 0, 4)[None] == [list(mark) for mark in _BYTE_ORDER_MARKS], axis=1)
    start = tf.where(tf.reduce_any(is_mark), 0, 4)
    start += tf.where(tf.strings.substr(exif, tf.minimum(start, tf.strings.length(exif)), 4) == b"Exif", 6, 0)
    header = _bytes_at(exif, start, 8)
    is_little, is_big = (tf.reduce_all(header[:4] == list(mark)) for mark in _BYTE_ORDER_MARKS)
    uint16_weights = tf.where(is_big, [256, 1], [1, 256])  # of the two bytes of a uint16
    offset = tf.reduce_sum(header[4:] * tf.where(is_big, [0, 2**16, 256, 1], [1, 256, 2**16, 0]))
    directory = _bytes_at(exif, start + offset, 2 + _MAX_ENTRIES * _ENTRY_BYTES)
    count, entries = tf.reduce_sum(directory[:2] * uint16_weights), tf.reshape(directory[2:], [-1, _ENTRY_BYTES])

    def decode_uint16(column: int) -> tf.Tensor:
        """Decode the uint16 at byte `column` of each entry, int32 [_MAX_ENTRIES]."""
        return tf.reduce_sum(entries[:, column : column + 2] * uint16_weights, axis=1)

    type_code = decode_uint16(2)  # 3: uint16, 4: uint32
    value = tf.where(is_big & (type_code == 4), decode_uint16(10), decode_uint16(8))
    is_valid = (decode_uint16(0) == _ORIENTATION) & ((type_code == 3) | (type_code == 4)) & (value >= 1) & (value <= 8)
    is_valid &= (tf.range(_MAX_ENTRIES) < count) & (is_little | is_big)
    return tf.reduce_max(tf.where(is_valid, value, 1))


def _parse_flips(exif: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return whether rows and columns are stored in reverse order, bool [2], and whether the image is transposed."""
    orientation = parse_orientation(exif)
    return tf.reduce_any(orientation == [[3, 4, 6, 7], [2, 3, 7, 8]], axis=1), orientation >= 5


@compile_without_inlining
def _turn(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    is_reversed, is_transposed = _parse_flips(exif)
    pixels = tf.reverse(pixels, tf.reshape(tf.where(is_reversed), [-1]))
    return tf.cond(is_transposed, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)


@compile_without_inlining
def _compute_crop_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    return (spare + tf.cast(_parse_flips(exif)[0], tf.int32)) // 2


def turn_upright(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Turn an image upright as its EXIF orientation specifies.

    Args:
        pixels: the decoded image as it is stored, [H, W, C].
        exif: result of `extract_exif`.

    Returns:
        The upright image, [H, W, C] or, if it is stored transposed, [W, H, C].
    """
    return tf.cond(tf.size(exif) > 0, lambda: _turn(pixels, exif[0]), lambda: pixels)


def compute_center_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return the first row and column of the centered square of an image as it is stored, int32 [2].

    Args:
        spare: numbers of rows and of columns outside of the square, int32 [2]. If a number is odd, the additional row
            or column is at the end of the upright image.
        exif: result of `extract_exif`.
    """
    return tf.cond(tf.size(exif) > 0, lambda: _compute_crop_offsets(spare, exif[0]), lambda: spare // 2)
