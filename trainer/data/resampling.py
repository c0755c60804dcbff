"""Affine maps of a batch of images, each in one bilinear resampling, compiled by XLA.

TensorFlow's own op works out the place of a pixel again for each of its colours: 2.6 ms of processor time for an image
of 224 pixels, and this 0.75 (docs/log.md). XLA makes a loop of each function here. One loop for all of them would be
slower: a loop that picks pixels uses no vector instructions, and so the arithmetic has loops of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tensorflow as tf


def in_one_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled by XLA, once for each shape of its arguments."""
    return tf.function(function, jit_compile=True, autograph=False)


def resampled(images: tf.Tensor, transforms: tf.Tensor, fill: str) -> tf.Tensor:
    """The result at (x, y) shows the source at (t0 x + t1 y + t2, t3 x + t4 y + t5), in pixels.

    Args:
        images: uint8 [b, S, S, 3], b * (S + 2)^2 below 2^31.
        transforms: t0 to t5 of each image, float32 [b, 6].
        fill: what is seen outside the source: its `nearest` pixel, black (`constant`), or its `reflect`ion.

    Returns:
        uint8 [b, S, S, 3]; an image's bits depend on itself and its own map alone.
    """
    border = 1 if fill == "constant" else 0
    source = tf.pad(images, [[0, 0], [border, border], [border, border], [0, 0]]) if border else images
    first, right, down = _places(images.shape[1], fill)(transforms)
    return apart(_mixed(*_neighbours(_together(source), first), right, down), images.shape)


def packed(planes: list[tf.Tensor]) -> tf.Tensor:
    """Red, green and blue, int32 of any one shape in 0..255, in one number: int32 of that shape."""
    return planes[0] + planes[1] * 2**8 + planes[2] * 2**16


def apart(pixels: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Packed pixels [b, S, S] as images, uint8 [b, S, S, 3]."""
    return tf.ensure_shape(tf.bitcast(pixels, tf.uint8)[..., :3], shape)


@in_one_loop
def _together(images: tf.Tensor) -> tf.Tensor:
    return packed(tf.unstack(tf.cast(images, tf.int32), axis=-1))


@cache
def _places(size: int, fill: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """Maps [b, 6] -> the pixel to the upper left of each place, by number, and how far right and down it is."""

    def inside(place: tf.Tensor) -> tf.Tensor:
        """What is looked up for a place that may be outside: 0 to size - 1; with a border of black 0 to size + 1."""
        if fill == "constant":
            return tf.clip_by_value(place + 1.0, 0.0, size + 1.0)
        if fill == "reflect":  # about the outer edges of the outermost pixels
            turns = (place + 0.5) * (0.5 / size)
            place = (turns - tf.floor(turns)) * (2.0 * size)
            place = tf.minimum(place, 2.0 * size - place) - 0.5
        return tf.clip_by_value(place, 0.0, size - 1.0)

    def places(transforms: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        xx, xy, x, yx, yy, y = (transforms[:, k, None, None] for k in range(6))
        across, down = tf.range(size, dtype=tf.float32), tf.range(size, dtype=tf.float32)[:, None]
        x, y = inside(xx * across + (xy * down + x)), inside(yx * across + (yy * down + y))
        left, top = tf.cast(x, tf.int32), tf.cast(y, tf.int32)
        pitch = size + 2 if fill == "constant" else size
        image = tf.range(tf.shape(transforms)[0])[:, None, None]
        return (image * pitch + top) * pitch + left, x - tf.cast(left, tf.float32), y - tf.cast(top, tf.float32)

    return in_one_loop(places)


@in_one_loop
def _neighbours(pixels: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The pixels `first`, right of them, below, and below on the right. Beyond the edge any will do: its share is 0."""
    pitch, flat = pixels.shape[2], tf.reshape(pixels, [-1])
    return tuple(tf.gather(flat, tf.minimum(first + step, tf.size(flat) - 1)) for step in (0, 1, pitch, pitch + 1))


@in_one_loop
def _mixed(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor, right: tf.Tensor, down: tf.Tensor) -> tf.Tensor:
    """Four packed neighbours, each colour by the shares of its place and rounded; packed again."""

    def colour(packed: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float32)

    planes = []
    for shift in (0, 8, 16):
        above, below = colour(a, shift), colour(c, shift)
        above += right * (colour(b, shift) - above)
        below += right * (colour(d, shift) - below)
        planes.append(tf.cast(above + down * (below - above) + 0.5, tf.int32))
    return packed(planes)
