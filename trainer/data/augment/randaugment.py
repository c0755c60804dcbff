"""RandAugment (Cubuk et al. 2019): a few operations drawn from fourteen, all with one magnitude.

The operations, and how strong each is at a magnitude, are those of torchvision's `RandAugment` (magnitudes 0 to 30). As
there they work on whole bytes; unlike there the geometric ones interpolate, and fill as all others here do.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.draws import RANDAUGMENT, Draws

HIGHEST = 30

# An operation: uint8 [m, S, S, 3], signs float32 [m] (-1 or 1), strength 0..1 and fill mode to uint8 [m, S, S, 3]. It
# treats each image alone and computes what it needs of a whole image in integers, where the order of adding is all the
# same: an example's bits do not depend on how many others drew the same operation.
Operation = Callable[[tf.Tensor, tf.Tensor, float, str], tf.Tensor]


def randaugmented(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Each image after `a.randaugment` operations of its own; those that drew the same one go through it together.

    Args:
        images: uint8 [b, S, S, 3].
        draws: those from `RANDAUGMENT` on.

    Returns:
        uint8 [b, S, S, 3].
    """
    for turn in range(a.randaugment):
        chosen = tf.cast(draws.uniform(RANDAUGMENT + 2 * turn) * len(OPERATIONS), tf.int32)
        signs = tf.where(draws.coin(RANDAUGMENT + 2 * turn + 1), -1.0, 1.0)
        groups = tf.dynamic_partition(tf.range(tf.size(chosen)), chosen, len(OPERATIONS))
        parts = [
            operation(tf.gather(images, rows), tf.gather(signs, rows), a.magnitude / HIGHEST, a.fill)
            for operation, rows in zip(OPERATIONS.values(), groups, strict=True)
        ]
        images = tf.ensure_shape(tf.dynamic_stitch(groups, parts), images.shape)
    return images


def _bytes(values: tf.Tensor) -> tf.Tensor:
    """Float32 of any size as uint8, limited to 0..255, the fraction dropped."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _geometric(images: tf.Tensor, signs: tf.Tensor, maps: list[list[float]], fill: str) -> tf.Tensor:
    """The images by two affine maps from result to source, [xx, xy, x, yx, yy, y] in pixels, for the signs -1 and 1."""
    table = tf.constant([[*entries, 0.0, 0.0] for entries in maps], tf.float32)
    # `resampling.resampled` takes a third of the time, but would be compiled for every number of images there can be.
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.gather(table, tf.cast(signs > 0, tf.int32)),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=fill.upper(),
    )
    return _bytes(tf.round(warped))


def shear_x(images: tf.Tensor, signs: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """About the upper edge, by up to 0.3 pixels a row."""
    return _geometric(images, signs, [[1, s, s / 2, 0, 1, 0] for s in (-0.3 * strength, 0.3 * strength)], fill)


def shear_y(images: tf.Tensor, signs: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """About the left edge, by up to 0.3 pixels a column."""
    return _geometric(images, signs, [[1, 0, 0, s, 1, s / 2] for s in (-0.3 * strength, 0.3 * strength)], fill)


def translate_x(images: tf.Tensor, signs: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """By up to 150 / 331 of the side, whole pixels."""
    far = int(150 / 331 * images.shape[1] * strength)
    return _geometric(images, signs, [[1, 0, move, 0, 1, 0] for move in (-far, far)], fill)


def translate_y(images: tf.Tensor, signs: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """By up to 150 / 331 of the side, whole pixels."""
    far = int(150 / 331 * images.shape[1] * strength)
    return _geometric(images, signs, [[1, 0, 0, 0, 1, move] for move in (-far, far)], fill)


def rotate(images: tf.Tensor, signs: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """About the centre, by up to 30 degrees; sign 1 turns to the left."""
    centre, maps = (images.shape[1] - 1) / 2, []
    for angle in (math.radians(30 * strength), -math.radians(30 * strength)):
        cos, sin = math.cos(angle), math.sin(angle)
        maps.append([cos, sin, centre * (1 - cos - sin), -sin, cos, centre * (1 - cos + sin)])
    return _geometric(images, signs, maps, fill)


def _grey(images: tf.Tensor) -> tf.Tensor:
    """Pillow's grey: int32 [m, S, S]."""
    red, green, blue = tf.unstack(tf.cast(images, tf.int32), axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


def _blended(images: tf.Tensor, towards: tf.Tensor, signs: tf.Tensor, strength: float) -> tf.Tensor:
    """A factor of 1 +- 0.9 between `towards`, float32, and the images: 0 gives the former, 1 the latter."""
    factor = (1 + signs * (0.9 * strength))[:, None, None, None]
    return _bytes(towards + factor * (tf.cast(images, tf.float32) - towards))


def brightness(images: tf.Tensor, signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Towards black, or away from it."""
    return _blended(images, tf.zeros([]), signs, strength)


def colour(images: tf.Tensor, signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Towards the grey of each pixel, or away from it."""
    return _blended(images, tf.cast(_grey(images), tf.float32)[..., None], signs, strength)


def contrast(images: tf.Tensor, signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Towards the mean grey of the image, or away from it."""
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(_grey(images), axis=2), tf.int64), axis=1)
    mean = tf.cast(tf.cast(total, tf.float64) / images.shape[1] ** 2, tf.float32)
    return _blended(images, mean[:, None, None, None], signs, strength)


def sharpness(images: tf.Tensor, signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Towards the image smoothed by 1 1 1, 1 5 1, 1 1 1 (thirteenths), or away from it; its edge stays."""
    whole = tf.cast(images, tf.int32)
    rows = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * whole[:, 1:-1, 1:-1]
    smooth = tf.round(tf.cast(around, tf.float32) / 13)
    middle = _blended(images[:, 1:-1, 1:-1], smooth, signs, strength)
    sides = tf.concat([images[:, 1:-1, :1], middle, images[:, 1:-1, -1:]], axis=2)
    return tf.concat([images[:, :1], sides, images[:, -1:]], axis=1)


def posterize(images: tf.Tensor, _signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """The lowest 0 to 4 bits of each byte are dropped."""
    return tf.bitwise.bitwise_and(images, tf.constant(256 - 2 ** round(4 * strength), tf.uint8))


def solarize(images: tf.Tensor, _signs: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Bytes at or above a threshold, 255 to 0, are inverted."""
    return tf.where(tf.cast(images, tf.float32) >= 255 * (1 - strength), 255 - images, images)


def autocontrast(images: tf.Tensor, _signs: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Each channel is stretched to 0..255."""
    low, high = (tf.cast(f(images, axis=[1, 2], keepdims=True), tf.float32) for f in (tf.reduce_min, tf.reduce_max))
    stretched = (tf.cast(images, tf.float32) - low) * (255 / tf.maximum(high - low, 1))
    return tf.where(high > low, _bytes(stretched), images)


def equalize(images: tf.Tensor, _signs: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Each channel's values are spread so that all become about as frequent (Pillow's rule)."""
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


def identity(images: tf.Tensor, _signs: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """As it is."""
    return images


# A position in this list is what a draw means for ever.
_FUNCTIONS = (identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, colour, contrast, sharpness,
              posterize, solarize, autocontrast, equalize)  # fmt: skip
OPERATIONS: dict[str, Operation] = {function.__name__: function for function in _FUNCTIONS}
