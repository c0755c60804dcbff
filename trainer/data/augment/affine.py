"""Affine maps of a batch of images, each in one bilinear resampling, compiled by XLA.

TensorFlow's own op works out the position of a pixel again for each of its colours: 2.6 ms of processor time for an
image of 224 pixels, and this 0.75 (docs/log.md). XLA makes a loop of each function here. One loop for all of them would
be slower: a loop that picks pixels uses no vector instructions, and so the arithmetic has loops of its own.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment import draws as kinds
from trainer.data.augment.draws import LEVELS, Draws, levels

WIDEST = 4 / 3  # width : height of a crop; the narrowest is 1 / WIDEST


def flipped(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Flips alone: no pixel is computed, the type stays."""
    for is_on, what, axis in ((a.flip_horizontal, kinds.FLIP_HORIZONTAL, 2), (a.flip_vertical, kinds.FLIP_VERTICAL, 1)):
        if is_on:
            # This op takes whole images by one flag each, at half the price of `tf.where` with a flag for every pixel.
            images = tf.raw_ops.Select(condition=draws.coin(what), x=tf.reverse(images, [axis]), y=images)
    return images


def _matrix(a: Augmentation, draws: Draws, rows: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """The 2x2 matrix from a point of the result to one of the source, both about their centres; `rows` of the crop."""

    def then(m: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        return [[r[0] * m[0][j] + r[1] * m[1][j] for j in range(2)] for r in rows]

    # Forwards: crop, flip, zoom, shear, rotate, stretch. Backwards the inverses, the last one first from the right.
    if a.flip_horizontal:
        rows = then([[tf.where(draws.coin(kinds.FLIP_HORIZONTAL), -1.0, 1.0), 0.0], [0.0, 1.0]])
    if a.flip_vertical:
        rows = then([[1.0, 0.0], [0.0, tf.where(draws.coin(kinds.FLIP_VERTICAL), -1.0, 1.0)]])
    if a.zoom:
        scale = draws.of(kinds.ZOOM, 1 / levels(1 - a.zoom, 1 + a.zoom))
        rows = then([[scale, 0.0], [0.0, scale]])
    if a.shear:
        rows = then([[1.0, -draws.of(kinds.SHEAR, np.tan(np.radians(levels(-a.shear, a.shear))))], [0.0, 1.0]])
    for what, most in zip((kinds.ROTATION, kinds.SECOND_ROTATION), a.rotations, strict=False):
        angles = np.radians(levels(-most, most))
        cos, sin = draws.of(what, np.cos(angles)), draws.of(what, np.sin(angles))
        rows = then([[cos, sin], [-sin, cos]])
    if a.stretch:
        scales = 1 / levels(1 - a.stretch, 1 + a.stretch)
        rows = then([[draws.of(kinds.STRETCH_X, scales), 0.0], [0.0, draws.of(kinds.STRETCH_Y, scales)]])
    return rows


def warped(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Crop, flip, zoom, shear, rotate about the centre, stretch and shift, in one resampling; uint8 [b, S, S, 3]."""
    count, size = tf.shape(images)[0], images.shape[1]
    zero, centre, reach = tf.zeros([count]), (size - 1) / 2, a.shift * size
    rows, middle = [[1.0, 0.0], [0.0, 1.0]], (centre, centre)
    if a.crop:
        (width, height), (left, top) = windows(a.crop, draws)
        rows = [[width, 0.0], [0.0, height]]
        middle = (left + width / 2) * (size - 1), (top + height / 2) * (size - 1)
    (xx, xy), (yx, yy) = _matrix(a, draws, rows)
    right = centre + (draws.of(kinds.SHIFT_X, levels(-reach, reach)) if a.shift else zero)
    down = centre + (draws.of(kinds.SHIFT_Y, levels(-reach, reach)) if a.shift else zero)
    left_over = middle[0] - xx * right - xy * down, middle[1] - yx * right - yy * down
    entries = (xx, xy, left_over[0], yx, yy, left_over[1])
    return resampled(images, tf.stack([zero + entry for entry in entries], axis=1), a.fill)


def aspects(least: float) -> tuple[np.ndarray, np.ndarray]:
    """The values that a crop's aspect can take, and how large the area can then be.

    An area drawn evenly from [least, 1] and the logarithm of an aspect (width : height) drawn evenly from +- log(4/3)
    are taken where width and height fit into the image (Szegedy et al. 2015; as torchvision's RandomResizedCrop, but
    without its ten tries). Of such pairs the aspect q has a density that falls with 1 / q - least, and each
    area from `least` to 1 / q is as likely as another (q >= 1; for q < 1 with 1 / q in its place).

    Returns:
        float64 [LEVELS] each: square roots of aspects, equally likely; and the largest area of each, a fraction.
    """
    most = min(np.log(WIDEST), -np.log(least))
    grid = np.linspace(0, most, 100_001)
    below = 1 - np.exp(-grid) - least * grid  # how likely a logarithm is to be less, but for a factor
    half = np.interp((np.arange(LEVELS // 2) + 0.5) / (LEVELS // 2) * below[-1], below, grid)
    logarithm = np.concatenate([-half[::-1], half])
    return np.exp(logarithm / 2), np.exp(-np.abs(logarithm))


def windows(least: float, draws: Draws) -> tuple[tuple[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Width and height, left and top of each example's crop, as fractions of the image; float32 [b] each."""
    roots, largest = aspects(least)
    root = draws.of(kinds.CROP_ASPECT, roots)
    area = least + (draws.of(kinds.CROP_ASPECT, largest) - least) * draws.uniform(kinds.CROP_AREA)
    # A square root of float64 is exact to the last bit in long vectors and short ones; one of float32 need not be.
    side = tf.cast(tf.sqrt(tf.cast(area, tf.float64)), tf.float32)
    width, height = (tf.minimum(x, 1.0) for x in (side * root, side * draws.of(kinds.CROP_ASPECT, 1 / roots)))
    left, top = ((1 - x) * draws.uniform(what) for x, what in ((width, kinds.CROP_X), (height, kinds.CROP_Y)))
    return (width, height), (left, top)


def in_one_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by XLA, once for each shape of its arguments."""
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
    first, right, down = _positions(images.shape[1], fill)(transforms)
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
def _positions(size: int, fill: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """Maps [b, 6] -> the pixel to the upper left of each position, by number, and how far right and down it is."""

    def inside(x: tf.Tensor) -> tf.Tensor:
        """A coordinate that may be outside -> 0 to size - 1; with a border of black 0 to size + 1."""
        if fill == "constant":
            return tf.clip_by_value(x + 1.0, 0.0, size + 1.0)
        if fill == "reflect":  # about the outer edges of the outermost pixels
            turns = (x + 0.5) * (0.5 / size)
            x = (turns - tf.floor(turns)) * (2.0 * size)
            x = tf.minimum(x, 2.0 * size - x) - 0.5
        return tf.clip_by_value(x, 0.0, size - 1.0)

    def positions(transforms: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        xx, xy, x, yx, yy, y = (transforms[:, k, None, None] for k in range(6))
        across, down = tf.range(size, dtype=tf.float32), tf.range(size, dtype=tf.float32)[:, None]
        x, y = inside(xx * across + (xy * down + x)), inside(yx * across + (yy * down + y))
        left, top = tf.cast(x, tf.int32), tf.cast(y, tf.int32)
        pitch = size + 2 if fill == "constant" else size
        image = tf.range(tf.shape(transforms)[0])[:, None, None]
        return (image * pitch + top) * pitch + left, x - tf.cast(left, tf.float32), y - tf.cast(top, tf.float32)

    return in_one_loop(positions)


@in_one_loop
def _neighbours(pixels: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The pixels `first`, right of them, below, and below on the right. Beyond the edge any: its weight is 0."""
    pitch, flat = pixels.shape[2], tf.reshape(pixels, [-1])
    return tuple(tf.gather(flat, tf.minimum(first + step, tf.size(flat) - 1)) for step in (0, 1, pitch, pitch + 1))


@in_one_loop
def _mixed(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor, right: tf.Tensor, down: tf.Tensor) -> tf.Tensor:
    """Four packed neighbours, each colour weighted by its position and rounded; packed again."""

    def colour(packed: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float32)

    planes = []
    for shift in (0, 8, 16):
        above, below = colour(a, shift), colour(c, shift)
        above += right * (colour(b, shift) - above)
        below += right * (colour(d, shift) - below)
        planes.append(tf.cast(above + down * (below - above) + 0.5, tf.int32))
    return packed(planes)
