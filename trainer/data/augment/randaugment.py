"""RandAugment (Cubuk et al. 2019): a few of fourteen operations per image, all with one magnitude.

Operations and magnitudes (0 to 30) are those of torchvision's `RandAugment`, on bytes. Unlike there, geometric
operations interpolate bilinearly and use the `fill` of the configuration.
"""

import math
from collections.abc import Callable
from functools import partial

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.draws import RANDAUGMENT, Draws

HIGHEST = 30

# An operation: images uint8 [m, S, S, 3], direction float32 [m] (-1 or 1), strength 0..1, fill -> uint8 [m, S, S, 3].
# Sums over an image are in integers, whose order does not matter, so the bits of an image do not depend on m.
Operation = Callable[[tf.Tensor, tf.Tensor, float, str], tf.Tensor]


def randaugmented(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Apply `a.randaugment` operations to each image, uint8 [b, S, S, 3]; `draws` begin at `RANDAUGMENT`."""
    for turn in range(a.randaugment):
        chosen = tf.cast(draws.uniform(RANDAUGMENT + 2 * turn) * len(OPERATIONS), tf.int32)
        direction = tf.where(draws.coin(RANDAUGMENT + 2 * turn + 1), -1.0, 1.0)
        groups = tf.dynamic_partition(tf.range(tf.size(chosen)), chosen, len(OPERATIONS))
        parts = [
            operation(tf.gather(images, rows), tf.gather(direction, rows), a.magnitude / HIGHEST, a.fill)
            for operation, rows in zip(OPERATIONS.values(), groups, strict=True)
        ]
        images = tf.ensure_shape(tf.dynamic_stitch(groups, parts), images.shape)
    return images


def _bytes(values: tf.Tensor) -> tf.Tensor:
    """Clip float32 values to 0..255 and truncate to uint8."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _maps(name: str, strength: float, size: int) -> list[list[float]]:
    """Return the output-to-source maps [xx, xy, x, yx, yy, y] of an operation, in pixels, for direction -1 and 1."""
    slope, far = 0.3 * strength, int(150 / 331 * size * strength)
    match name:
        case "shear_x":  # about the upper edge, by up to 0.3 pixels per row
            return [[1, s, s / 2, 0, 1, 0] for s in (-slope, slope)]
        case "shear_y":  # about the left edge, by up to 0.3 pixels per column
            return [[1, 0, 0, s, 1, s / 2] for s in (-slope, slope)]
        case "translate_x":  # by up to 150 / 331 of the side, in whole pixels
            return [[1, 0, move, 0, 1, 0] for move in (-far, far)]
        case "translate_y":
            return [[1, 0, 0, 0, 1, move] for move in (-far, far)]
    centre, maps = (size - 1) / 2, []
    for angle in (math.radians(30 * strength), -math.radians(30 * strength)):  # rotate, to the left in direction 1
        cos, sin = math.cos(angle), math.sin(angle)
        maps.append([cos, sin, centre * (1 - cos - sin), -sin, cos, centre * (1 - cos + sin)])
    return maps


def _geometric(name: str, images: tf.Tensor, direction: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    maps = tf.constant([[*m, 0.0, 0.0] for m in _maps(name, strength, images.shape[1])], tf.float32)
    # `affine.resampled` takes a third of the time, but XLA would compile it for every number of images.
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.gather(maps, tf.cast(direction > 0, tf.int32)),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=fill.upper(),
    )
    return _bytes(tf.round(warped))


def _grey(images: tf.Tensor) -> tf.Tensor:
    """Return the grey of Pillow, int32 [m, S, S]."""
    red, green, blue = tf.unstack(tf.cast(images, tf.int32), axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


def _blended(images: tf.Tensor, towards: tf.Tensor, direction: tf.Tensor, strength: float) -> tf.Tensor:
    """Blend `towards`, float32, and the images with a factor of 1 +- 0.9 as in Pillow; factor 1 is the image."""
    factor = (1 + direction * (0.9 * strength))[:, None, None, None]
    return _bytes(towards + factor * (tf.cast(images, tf.float32) - towards))


def brightness(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    return _blended(images, tf.zeros([]), direction, strength)


def colour(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    return _blended(images, tf.cast(_grey(images), tf.float32)[..., None], direction, strength)


def contrast(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Blend with the mean grey of the image."""
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(_grey(images), axis=2), tf.int64), axis=1)
    mean = tf.cast(tf.cast(total, tf.float64) / images.shape[1] ** 2, tf.float32)
    return _blended(images, mean[:, None, None, None], direction, strength)


def sharpness(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the edge does not change."""
    whole = tf.cast(images, tf.int32)
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * whole[:, 1:-1, 1:-1]
    smooth = tf.round(tf.cast(around, tf.float32) / 13)
    middle = _blended(images[:, 1:-1, 1:-1], smooth, direction, strength)
    sides = tf.concat([images[:, 1:-1, :1], middle, images[:, 1:-1, -1:]], axis=2)
    return tf.concat([images[:, :1], sides, images[:, -1:]], axis=1)


def posterize(images: tf.Tensor, _direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Clear the lowest 0 to 4 bits of each byte."""
    return tf.bitwise.bitwise_and(images, tf.constant(256 - 2 ** round(4 * strength), tf.uint8))


def solarize(images: tf.Tensor, _direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Invert bytes at or above a threshold of 255 to 0."""
    return tf.where(tf.cast(images, tf.float32) >= 255 * (1 - strength), 255 - images, images)


def autocontrast(images: tf.Tensor, _direction: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Stretch each channel to 0..255."""
    low, high = (tf.cast(f(images, axis=[1, 2], keepdims=True), tf.float32) for f in (tf.reduce_min, tf.reduce_max))
    stretched = (tf.cast(images, tf.float32) - low) * (255 / tf.maximum(high - low, 1))
    return tf.where(high > low, _bytes(stretched), images)


def equalize(images: tf.Tensor, _direction: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Equalize the histogram of each channel, as Pillow does."""
    channels = tf.reshape(tf.range(tf.shape(images)[0] * 3), [-1, 1, 1, 3])
    bins = channels * 256 + tf.cast(images, tf.int32)
    size = tf.shape(images)[0] * 3 * 256
    counts = tf.raw_ops.DenseBincount(input=tf.reshape(bins, [-1]), size=size, weights=tf.zeros([0], tf.int32))
    counts = tf.reshape(counts, [-1, 256])
    used = tf.cast(counts > 0, tf.int32) * tf.range(256)
    last = tf.gather(counts, tf.reduce_max(used, axis=1), batch_dims=1)
    step = (images.shape[1] ** 2 - last)[:, None] // 255
    table = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.minimum(table, 255), tf.range(256))
    return tf.gather(tf.cast(tf.reshape(table, [-1]), tf.uint8), bins)


def _identity(images: tf.Tensor, _direction: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    return images


# Append only: a draw is a position in this table.
OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    **{n: partial(_geometric, n) for n in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")},
    **{f.__name__: f for f in (brightness, colour, contrast, sharpness, posterize, solarize, autocontrast, equalize)},
}
