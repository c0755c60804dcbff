"""Random changes to training images: each is a function of (seed, epoch, index), whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.config import Augmentation
from trainer.randomness import AUGMENTATION, uniform

# What each draw is for. A number keeps its meaning for ever: another one gives other pictures.
FLIP_HORIZONTAL, FLIP_VERTICAL, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, CONTRAST, BRIGHTNESS = range(9)
DRAWS = 9

# Draws are rounded to this many levels, so that sines and the like come from a table made once. TensorFlow computes
# them with other instructions for a long vector than for a short one: the last bit would depend on the batch size.
LEVELS = 4096


def levels(low: float, high: float) -> np.ndarray:
    """The values a draw can take: float64 [LEVELS], the middles of equal parts of [low, high]."""
    return low + (high - low) * (np.arange(LEVELS) + 0.5) / LEVELS


class _Draws:
    """The random numbers of the examples of a batch."""

    def __init__(self, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> None:
        epoch, index = (tf.cast(tensor, tf.int64)[:, None] for tensor in (epoch, index))
        self.numbers = uniform(seed, AUGMENTATION, epoch, index, tf.range(DRAWS, dtype=tf.int64))  # [b, DRAWS]

    def coin(self, what: int) -> tf.Tensor:
        """Bool [b], true for half of all examples."""
        return self.numbers[:, what] < 0.5

    def of(self, what: int, values: np.ndarray) -> tf.Tensor:
        """Float32 [b], one of `values` [LEVELS] for each example."""
        level = tf.cast(self.numbers[:, what] * LEVELS, tf.int32)
        return tf.gather(tf.constant(values, tf.float32), level)


def _matrix(a: Augmentation, draws: _Draws) -> list[list[tf.Tensor]]:
    """The 2x2 matrix that leads from a place in the result back to the source, both seen from the centre."""
    rows = [[1.0, 0.0], [0.0, 1.0]]

    def then(m: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        return [[sum_of(r[0], m[0][j], r[1], m[1][j]) for j in range(2)] for r in rows]

    def sum_of(p: tf.Tensor, q: tf.Tensor, r: tf.Tensor, s: tf.Tensor) -> tf.Tensor:
        return p * q + r * s

    # Forwards: flip, zoom, shear, rotate. Backwards the inverses, the last one first from the right.
    if a.flip_horizontal:
        rows = then([[tf.where(draws.coin(FLIP_HORIZONTAL), -1.0, 1.0), 0.0], [0.0, 1.0]])
    if a.flip_vertical:
        rows = then([[1.0, 0.0], [0.0, tf.where(draws.coin(FLIP_VERTICAL), -1.0, 1.0)]])
    if a.zoom:
        scale = draws.of(ZOOM, 1 / levels(1 - a.zoom, 1 + a.zoom))
        rows = then([[scale, 0.0], [0.0, scale]])
    if a.shear:
        rows = then([[1.0, -draws.of(SHEAR, np.tan(np.radians(levels(-a.shear, a.shear))))], [0.0, 1.0]])
    if a.rotation:
        angles = np.radians(levels(-a.rotation, a.rotation))
        cos, sin = draws.of(ROTATION, np.cos(angles)), draws.of(ROTATION, np.sin(angles))
        rows = then([[cos, sin], [-sin, cos]])
    return rows


def _affine(images: tf.Tensor, a: Augmentation, draws: _Draws) -> tf.Tensor:
    """Flip, zoom, shear, rotate about the centre and shift, in one bilinear resampling; float32 [b, S, S, 3]."""
    count, size = tf.shape(images)[0], images.shape[1]
    ((xx, xy), (yx, yy)), zero = _matrix(a, draws), tf.zeros([count])
    centre, reach = (size - 1) / 2, a.shift * size
    right = centre + (draws.of(SHIFT_X, levels(-reach, reach)) if a.shift else zero)
    down = centre + (draws.of(SHIFT_Y, levels(-reach, reach)) if a.shift else zero)
    left_over = centre - xx * right - xy * down, centre - yx * right - yy * down
    entries = (xx, xy, left_over[0], yx, yy, left_over[1], zero, zero)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([zero + entry for entry in entries], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=a.fill.upper(),
    )


def _flipped(images: tf.Tensor, chosen: tf.Tensor, axis: int) -> tf.Tensor:
    # This op takes whole images by one flag each, at half the price of `tf.where` with a flag for every pixel.
    return tf.raw_ops.Select(condition=chosen, x=tf.reverse(images, [axis]), y=images)


def _mean(images: tf.Tensor) -> tf.Tensor:
    """Mean of each uint8 image, float32 [b, 1, 1, 1]; summed in integers, where the order of adding is all the same."""
    columns = tf.cast(tf.reduce_sum(tf.cast(images, tf.int32), axis=1), tf.int64)
    total = tf.reduce_sum(columns, axis=[1, 2])
    pixels = int(np.prod(images.shape[1:]))
    return tf.cast(tf.cast(total, tf.float64) / pixels, tf.float32)[:, None, None, None]


def augment(images: tf.Tensor, augmentation: Augmentation, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Change each image as its own random numbers say. What is off is not in the graph.

    First the colours: contrast (the distance from the image's mean times a factor from 1 +- contrast), brightness
    (plus up to +- brightness * 255), limited to 0..255. Then the shape, about the centre: flips, zoom (a
    magnification from 1 +- zoom), shear (x grows with y by the tangent of the angle), rotation (clockwise as seen for
    positive angles), shift (each way up to +- shift * S pixels, to the right and down for positive ones), all in one
    bilinear resampling. Outside the source, `fill` decides: the nearest pixel, black, or the reflection.

    Args:
        images: uint8 [b, S, S, 3].
        epoch, index: int64 [b].

    Returns:
        float32 [b, S, S, 3] in 0..255. The same bits for an example in a batch of any size and company.
    """
    a = augmentation
    if not a.active:
        return tf.cast(images, tf.float32)
    draws = _Draws(seed, epoch, index)
    shape_changes = bool(a.rotation or a.shift or a.shear or a.zoom)
    if a.flip_horizontal and not shape_changes:
        images = _flipped(images, draws.coin(FLIP_HORIZONTAL), 2)
    if a.flip_vertical and not shape_changes:
        images = _flipped(images, draws.coin(FLIP_VERTICAL), 1)
    changed = tf.cast(images, tf.float32)
    plus = tf.zeros([])
    if a.brightness:
        plus = draws.of(BRIGHTNESS, levels(-255 * a.brightness, 255 * a.brightness))[:, None, None, None]
    if a.contrast:  # (x - mean) * factor + mean, in as few passes over the pixels as it takes
        factor = draws.of(CONTRAST, levels(1 - a.contrast, 1 + a.contrast))[:, None, None, None]
        changed, plus = changed * factor, _mean(images) * (1 - factor) + plus
    if a.contrast or a.brightness:
        changed = tf.clip_by_value(changed + plus, 0.0, 255.0)
    return _affine(changed, a, draws) if shape_changes else changed
