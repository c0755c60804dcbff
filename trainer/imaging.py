"""From the bytes of an image file to pixels: the one way to decode, in training, evaluation and the exported model."""

from __future__ import annotations

from functools import partial
from typing import Literal

import tensorflow as tf

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


def _decode_whole(data: tf.Tensor) -> tf.Tensor:
    """Uint8 [H, W, 3]."""
    return tf.cond(
        tf.equal(tf.strings.substr(data, 0, 2), b"BM"),
        lambda: _decode_bmp(data),
        lambda: tf.io.decode_image(data, channels=3, expand_animations=False),
    )


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
    whole = _decode_whole(data)
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
