"""Parse the EXIF orientation of an encoded image in a TensorFlow graph, and turn its pixels upright."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_ORIENTATION = 0x0112  # EXIF tag of the orientation
_BYTE_ORDER_MARKS = (b"II*\0", b"MM\0*")  # first bytes of little-endian and of big-endian EXIF data
_HEAD_BYTES = 2**16  # number of bytes at the beginning of a JPEG that are searched for its EXIF marker
_MAX_ENTRIES = 128  # maximum number of entries that are read from the first EXIF directory; cameras write about ten
_ENTRY_BYTES = 12  # size of a directory entry: tag, type, count and value


def compile_without_inlining(function: Callable[..., tf.Tensor]) -> Any:
    """Compile a function that TensorFlow does not inline, so that each call is a single node of the caller's graph.

    In a branch of `tf.cond`, a single node costs nothing if the other branch is taken.
    """
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def extract_exif(encoded: tf.Tensor, is_jpeg: bool) -> tf.Tensor:
    """Return the bytes that follow an image's EXIF marker, string [1], or string [0] if it has no marker.

    Args:
        encoded: the encoded image, a string scalar.
        is_jpeg: whether the image is a JPEG. Otherwise it is a PNG, a WebP, or an image in a format without EXIF data.
    """
    if is_jpeg:
        searched_bytes, marker = tf.strings.substr(encoded, 0, _HEAD_BYTES), tf.constant(b"Exif\0\0")
    else:
        searched_bytes, marker = encoded, tf.where(tf.strings.substr(encoded, 0, 4) == b"RIFF", b"EXIF", b"eXIf")
    # TensorFlow splits strings faster than it searches them with regular expressions.
    return tf.raw_ops.StringSplitV2(input=[searched_bytes], sep=marker, maxsplit=1).values[1:]


def _slice_bytes(encoded: tf.Tensor, offset: tf.Tensor | int, num_bytes: int) -> tf.Tensor:
    """Return `num_bytes` bytes of a string from byte `offset`, int32 [num_bytes]. Bytes beyond its end are 0."""
    substring = tf.strings.substr(encoded, tf.minimum(offset, tf.strings.length(encoded)), num_bytes)
    return tf.cast(tf.io.decode_raw(substring, tf.uint8, fixed_length=num_bytes), tf.int32)


def parse_orientation(exif: tf.Tensor) -> tf.Tensor:
    """Return the orientation in EXIF data, an int32 scalar from 1 (upright) to 8; 1 if it has no valid orientation.

    Args:
        exif: the bytes that follow the EXIF marker, a string scalar.
    """
    # In a WebP, the chunk's length (4 bytes) precedes the data, and some programs add a JPEG's marker (6 bytes).
    matches_mark = tf.reduce_all(_slice_bytes(exif, 0, 4)[None] == [list(mark) for mark in _BYTE_ORDER_MARKS], axis=1)
    start = tf.where(tf.reduce_any(matches_mark), 0, 4)
    start += tf.where(tf.strings.substr(exif, tf.minimum(start, tf.strings.length(exif)), 4) == b"Exif", 6, 0)
    header = _slice_bytes(exif, start, 8)
    is_little, is_big = (tf.reduce_all(header[:4] == list(mark)) for mark in _BYTE_ORDER_MARKS)
    uint16_weights = tf.where(is_big, [256, 1], [1, 256])  # factors of a uint16's two bytes
    directory_offset = tf.reduce_sum(header[4:] * tf.where(is_big, [0, 2**16, 256, 1], [1, 256, 2**16, 0]))
    directory = _slice_bytes(exif, start + directory_offset, 2 + _MAX_ENTRIES * _ENTRY_BYTES)
    num_entries, entries = tf.reduce_sum(directory[:2] * uint16_weights), tf.reshape(directory[2:], [-1, _ENTRY_BYTES])

    def decode_uint16(column: int) -> tf.Tensor:
        """Decode the uint16 at byte `column` of each entry, int32 [_MAX_ENTRIES]."""
        return tf.reduce_sum(entries[:, column : column + 2] * uint16_weights, axis=1)

    type_code = decode_uint16(2)  # 3: uint16, 4: uint32, whose lower half is at byte 10 in big-endian data
    value = tf.where(is_big & (type_code == 4), decode_uint16(10), decode_uint16(8))
    is_valid = (decode_uint16(0) == _ORIENTATION) & ((type_code == 3) | (type_code == 4)) & (value >= 1) & (value <= 8)
    is_valid &= (tf.range(_MAX_ENTRIES) < num_entries) & (is_little | is_big)
    return tf.reduce_max(tf.where(is_valid, value, 1))


def _parse_flips(exif: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return whether rows and columns are stored in reverse, bool [2], and whether the image is transposed, bool []."""
    orientation = parse_orientation(exif)
    return tf.reduce_any(orientation == [[3, 4, 6, 7], [2, 3, 7, 8]], axis=1), orientation >= 5


@compile_without_inlining
def _turn(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Turn pixels [H, W, C] upright by the EXIF data `exif`, a string scalar."""
    is_reversed, is_transposed = _parse_flips(exif)
    pixels = tf.reverse(pixels, tf.reshape(tf.where(is_reversed), [-1]))
    return tf.cond(is_transposed, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)


@compile_without_inlining
def _compute_crop_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Compute the result of `compute_center_offsets` for the EXIF data `exif`, a string scalar."""
    return (spare + tf.cast(_parse_flips(exif)[0], tf.int32)) // 2


def turn_upright(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Turn an image upright according to its EXIF orientation.

    Args:
        pixels: the decoded image as it is stored, [H, W, C], of any dtype.
        exif: the result of `extract_exif` for the image, string [0] or [1].

    Returns:
        The upright image, [H, W, C], or [W, H, C] if the stored image is transposed.
    """
    return tf.cond(tf.size(exif) > 0, lambda: _turn(pixels, exif[0]), lambda: pixels)


def compute_center_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return the first row and column of the centered square in an image as it is stored, int32 [2].

    Args:
        spare: numbers of rows and columns outside the square, int32 [2]. If a number is odd, the extra row or column is
            at the bottom or right of the upright image.
        exif: the result of `extract_exif` for the image, string [0] or [1].
    """
    return tf.cond(tf.size(exif) > 0, lambda: _compute_crop_offsets(spare, exif[0]), lambda: spare // 2)
