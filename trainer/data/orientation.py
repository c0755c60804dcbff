"""Parse the EXIF orientation of encoded images in a TensorFlow graph, and turn their pixels upright."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_TAG = 0x0112
_MAGICS = (b"II*\0", b"MM\0*")  # the first bytes of EXIF data in either byte order
_HEAD = 2**16  # bytes at the beginning of a JPEG in which EXIF data begin
_MAX_ENTRIES = 128  # of the first directory of the EXIF data; cameras write about ten
_ENTRY = 12  # bytes


def compile_as_one_node(function: Callable[..., tf.Tensor]) -> Any:
    """Compile a function as one graph node, so that in a branch of `tf.cond` it costs nothing if the other is taken."""
    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def extract_exif(data: tf.Tensor, is_jpeg: bool) -> tf.Tensor:
    """Return what follows the EXIF marker in an encoded image, string [1], or string [0] if there is no marker.

    Args:
        data: the encoded image, a string scalar; if not `is_jpeg`, a PNG, a WebP or a format without EXIF.
    """
    if is_jpeg:
        head, marker = tf.strings.substr(data, 0, _HEAD), tf.constant(b"Exif\0\0")
    else:
        head, marker = data, tf.where(tf.strings.substr(data, 0, 4) == b"RIFF", b"EXIF", b"eXIf")
    # TensorFlow splits strings faster than it searches them with regular expressions.
    return tf.raw_ops.StringSplitV2(input=[head], sep=marker, maxsplit=1).values[1:]


def _bytes_at(data: tf.Tensor, offset: tf.Tensor | int, count: int) -> tf.Tensor:
    """Return `count` bytes from `offset` as int32 [count]. Bytes beyond the end of the string are 0."""
    text = tf.strings.substr(data, tf.minimum(offset, tf.strings.length(data)), count)
    return tf.cast(tf.io.decode_raw(text, tf.uint8, fixed_length=count), tf.int32)


def parse_orientation(exif: tf.Tensor) -> tf.Tensor:
    """Return the orientation in EXIF data, a string scalar, as int32, 1 to 8. It is 1 if missing or corrupt."""
    # In a WebP the length of the chunk precedes the data, and some programs repeat the marker of JPEG.
    is_start = tf.reduce_all(_bytes_at(exif, 0, 4)[None] == [list(magic) for magic in _MAGICS], axis=1)
    start = tf.where(tf.reduce_any(is_start), 0, 4)
    start += tf.where(tf.strings.substr(exif, tf.minimum(start, tf.strings.length(exif)), 4) == b"Exif", 6, 0)
    header = _bytes_at(exif, start, 8)
    little, big = (tf.reduce_all(header[:4] == list(magic)) for magic in _MAGICS)
    pair = tf.where(big, [256, 1], [1, 256])  # weights of the two bytes of an integer
    offset = tf.reduce_sum(header[4:] * tf.where(big, [0, 2**16, 256, 1], [1, 256, 2**16, 0]))
    directory = _bytes_at(exif, start + offset, 2 + _MAX_ENTRIES * _ENTRY)
    count, entries = tf.reduce_sum(directory[:2] * pair), tf.reshape(directory[2:], [-1, _ENTRY])

    def decode_uint16(column: int) -> tf.Tensor:
        return tf.reduce_sum(entries[:, column : column + 2] * pair, axis=1)

    kind = decode_uint16(2)  # 3: uint16, 4: uint32
    value = tf.where(big & (kind == 4), decode_uint16(10), decode_uint16(8))
    is_valid = (decode_uint16(0) == _TAG) & ((kind == 3) | (kind == 4)) & (value >= 1) & (value <= 8)
    is_valid &= (tf.range(_MAX_ENTRIES) < count) & (little | big)
    return tf.reduce_max(tf.where(is_valid, value, 1))


def _flips(exif: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return whether rows and columns are stored in reverse order, bool [2], and whether they are transposed."""
    orientation = parse_orientation(exif)
    return tf.reduce_any(orientation == [[3, 4, 6, 7], [2, 3, 7, 8]], axis=1), orientation >= 5


@compile_as_one_node
def _turn(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    flips, is_transposed = _flips(exif)
    pixels = tf.reverse(pixels, tf.reshape(tf.where(flips), [-1]))
    return tf.cond(is_transposed, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)


@compile_as_one_node
def _compute_crop_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    return (spare + tf.cast(_flips(exif)[0], tf.int32)) // 2


def turn_upright(pixels: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Turn pixels [H, W, C] upright. `exif` is the result of `extract_exif`."""
    return tf.cond(tf.size(exif) > 0, lambda: _turn(pixels, exif[0]), lambda: pixels)


def compute_center_offsets(spare: tf.Tensor, exif: tf.Tensor) -> tf.Tensor:
    """Return the offset of the centered square among the stored rows and columns, int32 [2].

    `spare`, int32 [2], counts the rows and columns outside the square. If a count is odd, one more of them is at the
    end of the upright image.
    """
    return tf.cond(tf.size(exif) > 0, lambda: _compute_crop_offsets(spare, exif[0]), lambda: spare // 2)
