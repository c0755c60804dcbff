"""Affine transforms of a batch of images, each in one bilinear resampling, compiled by XLA.

TensorFlow's ImageProjectiveTransformV3 computes the position of a pixel once per channel and takes 2.6 ms of CPU time
for an image of 224 pixels; this takes 0.75 ms (docs/log.md). Each function below becomes one XLA loop. A single loop
would be slower, because a loop that gathers pixels is not vectorized.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment import draws as kinds
from trainer.data.augment.draws import LEVELS, Draws, levels

WIDEST = 4 / 3  # largest aspect (width : height) of a crop; the smallest is 1 / WIDEST


def flipped(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Flip images without resampling; the dtype does not change."""
    for is_on, kind, axis in ((a.flip_horizontal, kinds.FLIP_HORIZONTAL, 2), (a.flip_vertical, kinds.FLIP_VERTICAL, 1)):
        if is_on:
            # Selects whole images by one flag each, in half the time of `tf.where` with a flag per pixel.
            images = tf.raw_ops.Select(condition=draws.coin(kind), x=tf.reverse(images, [axis]), y=images)
    return images


def _matrix(a: Augmentation, draws: Draws, rows: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
    """Return the 2x2 matrix from output to source coordinates, both about their centres; `rows` is that of the crop."""

    def then(m: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        return [[r[0] * m[0][j] + r[1] * m[1][j] for j in range(2)] for r in rows]

    # The matrix is the product of the inverses of crop, flip, zoom, shear, rotate and stretch.
    if a.flip_horizontal:
        rows = then([[tf.where(draws.coin(kinds.FLIP_HORIZONTAL), -1.0, 1.0), 0.0], [0.0, 1.0]])
    if a.flip_vertical:
        rows = then([[1.0, 0.0], [0.0, tf.where(draws.coin(kinds.FLIP_VERTICAL), -1.0, 1.0)]])
    if a.zoom:
        scale = draws.of(kinds.ZOOM, 1 / levels(1 - a.zoom, 1 + a.zoom))
        rows = then([[scale, 0.0], [0.0, scale]])
    if a.shear:
        rows = then([[1.0, -draws.of(kinds.SHEAR, np.tan(np.radians(levels(-a.shear, a.shear))))], [0.0, 1.0]])
    for kind, limit in zip((kinds.ROTATION, kinds.SECOND_ROTATION), a.rotations, strict=False):
        angles = np.radians(levels(-limit, limit))
        cos, sin = draws.of(kind, np.cos(angles)), draws.of(kind, np.sin(angles))
        rows = then([[cos, sin], [-sin, cos]])
    if a.stretch:
        scales = 1 / levels(1 - a.stretch, 1 + a.stretch)
        rows = then([[draws.of(kinds.STRETCH_X, scales), 0.0], [0.0, draws.of(kinds.STRETCH_Y, scales)]])
    return rows


def warped(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Crop, flip, zoom, shear, rotate, stretch and shift, in one resampling; uint8 [b, S, S, 3]."""
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
    offset = middle[0] - xx * right - xy * down, middle[1] - yx * right - yy * down
    entries = (xx, xy, offset[0], yx, yy, offset[1])
    return resampled(images, tf.stack([zero + entry for entry in entries], axis=1), a.fill)


def aspects(least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the possible aspects of a crop, and the largest possible area of each.

    The distribution is that of torchvision's RandomResizedCrop (Szegedy et al. 2015) without its limit of ten attempts:
    area uniform in [least, 1], log aspect (width : height) uniform in +- log(4/3), conditioned on a crop that fits into
    the image. Then an aspect q >= 1 has a density proportional to 1 / q - least, and the area is uniform in
    [least, 1 / q]; q < 1 as 1 / q.

    Returns:
        float64 [LEVELS] each: square roots of equally likely aspects, and the largest area of each as a fraction.
    """
    limit = min(np.log(WIDEST), -np.log(least))
    grid = np.linspace(0, limit, 100_001)
    cumulative = 1 - np.exp(-grid) - least * grid  # distribution function of the log aspect, not normalised
    half = np.interp((np.arange(LEVELS // 2) + 0.5) / (LEVELS // 2) * cumulative[-1], cumulative, grid)
    log_aspects = np.concatenate([-half[::-1], half])
    return np.exp(log_aspects / 2), np.exp(-np.abs(log_aspects))


def windows(least: float, draws: Draws) -> tuple[tuple[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return (width, height) and (left, top) of each crop, as fractions of the image, float32 [b] each."""
    roots, largest = aspects(least)
    root = draws.of(kinds.CROP_ASPECT, roots)
    area = least + (draws.of(kinds.CROP_ASPECT, largest) - least) * draws.uniform(kinds.CROP_AREA)
    # In float64: the last bit of a float32 square root can depend on the length of the vector.
    side = tf.cast(tf.sqrt(tf.cast(area, tf.float64)), tf.float32)
    width, height = (tf.minimum(x, 1.0) for x in (side * root, side * draws.of(kinds.CROP_ASPECT, 1 / roots)))
    left, top = ((1 - x) * draws.uniform(kind) for x, kind in ((width, kinds.CROP_X), (height, kinds.CROP_Y)))
    return (width, height), (left, top)


def xla_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with XLA, once per shape of its arguments."""
    return tf.function(function, jit_compile=True, autograph=False)


def resampled(images: tf.Tensor, transforms: tf.Tensor, fill: str) -> tf.Tensor:
    """Sample the source at (t0 x + t1 y + t2, t3 x + t4 y + t5) for the output pixel (x, y), bilinearly.

    Args:
        images: uint8 [b, S, S, 3], b * (S + 2)^2 below 2^31.
        transforms: t0 to t5 of each image, in pixels, float32 [b, 6].
        fill: outside the source: its `nearest` pixel, black (`constant`), or its reflection (`reflect`).

    Returns:
        uint8 [b, S, S, 3]; the bits of an image do not depend on the rest of the batch.
    """
    border = 1 if fill == "constant" else 0
    source = tf.pad(images, [[0, 0], [border, border], [border, border], [0, 0]]) if border else images
    first, right, down = _positions(images.shape[1], fill)(transforms)
    return unpacked(_mixed(*_neighbours(_together(source), first), right, down), images.shape)


def packed(planes: list[tf.Tensor]) -> tf.Tensor:
    """Pack red, green and blue, int32 in 0..255, into one int32 tensor of the same shape."""
    return planes[0] + planes[1] * 2**8 + planes[2] * 2**16


def unpacked(pixels: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Unpack pixels int32 [b, S, S] into images uint8 [b, S, S, 3]."""
    return tf.ensure_shape(tf.bitcast(pixels, tf.uint8)[..., :3], shape)


@xla_compiled
def _together(images: tf.Tensor) -> tf.Tensor:
    return packed(tf.unstack(tf.cast(images, tf.int32), axis=-1))


@cache
def _positions(size: int, fill: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """Return a function: transforms [b, 6] -> index of the upper left pixel, and fractions to the right and down."""

    def inside(x: tf.Tensor) -> tf.Tensor:
        """Map a coordinate into 0 to size - 1, or with a black border into 0 to size + 1."""
        if fill == "constant":
            return tf.clip_by_value(x + 1.0, 0.0, size + 1.0)
        if fill == "reflect":  # about the outer edges of the outermost pixels
            periods = (x + 0.5) * (0.5 / size)
            x = (periods - tf.floor(periods)) * (2.0 * size)
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

    return xla_compiled(positions)


@xla_compiled
def _neighbours(pixels: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Gather the pixels `first`, right, below, and below right; beyond the edge any pixel, of weight 0."""
    pitch, flat = pixels.shape[2], tf.reshape(pixels, [-1])
    return tuple(tf.gather(flat, tf.minimum(first + step, tf.size(flat) - 1)) for step in (0, 1, pitch, pitch + 1))


@xla_compiled
def _mixed(a: tf.Tensor, b: tf.Tensor, c: tf.Tensor, d: tf.Tensor, right: tf.Tensor, down: tf.Tensor) -> tf.Tensor:
    """Interpolate four packed neighbours per channel, round, and pack again."""

    def colour(packed: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float32)

    planes = []
    for shift in (0, 8, 16):
        above, below = colour(a, shift), colour(c, shift)
        above += right * (colour(b, shift) - above)
        below += right * (colour(d, shift) - below)
        planes.append(tf.cast(above + down * (below - above) + 0.5, tf.int32))
    return packed(planes)
