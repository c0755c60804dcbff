"""Read the EXIF orientation of encoded images in a TensorFlow graph, and turn their pixels upright."""

from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf

Orientation = Literal["exif", "ignore"]
_TAG = 0x0112
_MAGICS = (b"II*\0", b"MM\0*")  # the first bytes of EXIF data in either byte order
_HEAD = 2**16  # bytes of a JPEG in which EXIF data begin; they precede the image
_MAX_ENTRIES = 128  # of the first directory of the EXIF data; cameras write about ten
_ENTRY = 12  # bytes


def as_one_node(function: Callable[..., tf.Tensor]) -> Any:
    """Compile a function for the branch of a condition as one node, so that it costs nothing in the other branch."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def exif_data(data: tf.Tensor, is_jpeg: bool) -> tf.Tensor:
    """Return what follows the marker of EXIF data in an encoded image, string [1]; string [0] if there is none.

    Args:
        data: the encoded image, a string scalar: a JPEG if `is_jpeg`, else a PNG, a WebP, or of a format without EXIF.
    """
    if is_jpeg:
        head, marker = tf.strings.substr(data, 0, _HEAD), tf.constant(b"Exif\0\0")
    else:
        head, marker = data, tf.where(tf.strings.substr(data, 0, 4) == b"RIFF", b"EXIF", b"eXIf")
    # TensorFlow splits strings faster than it searches them with regular expressions.
    return tf.raw_ops.StringSplitV2(input=[head], sep=marker, maxsplit=1).values[1:]


def _bytes_at(data: tf.Tensor, position: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return `count` bytes as int32 [count]; bytes beyond the end of the string are 0."""
    text = tf.strings.substr(data, tf.minimum(position, tf.strings.length(data)), count)
    return tf.cast(tf.io.decode_raw(text, tf.uint8, fixed_length=count), tf.int32)


def orientation_of(exif: tf.Tensor) -> tf.Tensor:
    """Return the orientation in EXIF data, a string scalar, as int32, 1 to 8; 1 if there is none or it is damaged."""
    # In a WebP the length of the chunk precedes the data, and some programs repeat the marker of JPEG.
    is_start = tf.reduce_all(_bytes_at(exif, 0, 4)[None] == [list(magic) for magic in _MAGICS], axis=1)
    start = tf.where(tf.reduce_any(is_start), 0, 4)
    start += tf.where(tf.strings.substr(exif, tf.minimum(start, tf.strings.length(exif)), 4) == b"Exif", 6, 0)
    header = _bytes_at(exif, start, 8)
    little, big = (tf.reduce_all(header[:4] == list(magic)) for magic in _MAGICS)
    pair = tf.where(big, [256, 1], [1, 256])  # weights of the bytes of a number
    offset = tf.reduce_sum(header[4:] * tf.where(big, [0, 2**16, 256, 1], [1, 256, 2**16, 0]))
    directory = _bytes_at(exif, start + offset, 2 + _MAX_ENTRIES * _ENTRY)
    count, entries = tf.reduce_sum(directory[:2] * pair), tf.reshape(directory[2:], [-1, _ENTRY])

    def number(column: int) -> tf.Tensor:
        return tf.reduce_sum(entries[:, column : column + 2] * pair, axis=1)

    kind = number(2)  # 3: a number of two bytes, 4: of four bytes
    value = tf.where(big & (kind == 4), number(10), number(8))
    is_valid = (number(0) == _TAG) & ((kind == 3) | (kind == 4)) & (value >= 1) & (value <= 8)
    is_valid &= (tf.range(_MAX_ENTRIES) < count) & (little | big)
    return tf.reduce_max(tf.where(is_valid, value, 1))


def _flips(exif: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return whether rows and columns are stored in reverse order, bool [2], and whether they are exchanged."""
    orientation = orientation_of(exif)
    return tf.reduce_any(orientation == [[3, 4, 6, 7], [2, 3, 7, 8]], axis=1), orientation >= 5


@as_one_node
def _turned(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    flips, exchanged = _flips(exif)
    pixels = tf.reverse(pixels, tf.reshape(tf.where(flips), [-1]))
    return tf.cond(exchanged, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)


@as_one_node
def _crop_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    return (spare + tf.cast(_flips(exif)[0], tf.int32)) // 2


def turn_upright(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return pixels [H, W, C] turned as the orientation in their `exif_data` specifies."""
    return tf.cond(tf.size(exif) > 0, lambda: _turned(pixels, exif[0]), lambda: pixels)


def centre_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return the offset of the centred square among the stored rows and columns, int32 [2].

    `spare`, int32 [2], is how many of them are outside of it; of an odd number, one more is at the end of the upright
    image.
    """
    return tf.cond(tf.size(exif) > 0, lambda: _crop_offsets(spare, exif[0]), lambda: spare // 2)
