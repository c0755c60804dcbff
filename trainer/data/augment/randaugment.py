"""Apply RandAugment (Cubuk et al. 2019): operations of one magnitude, drawn from fourteen for each image.

The operations and magnitudes (0 to 30) are those of torchvision's `RandAugment` on PIL images, except that geometric
operations interpolate bilinearly, and `augmentation.fill` sets the pixels outside the source.
"""

import math
from collections.abc import Callable
from functools import partial

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.draws import RANDAUGMENT, RandomDraws

MAX_MAGNITUDE = 30

# An operation maps images (uint8 [m, S, S, 3]), directions (float32 [m], -1 or 1), a strength (0 to 1) and a fill mode
# (`augmentation.fill`) to new images, uint8 [m, S, S, 3]. Pixels are summed as integers, so the order of summation has
# no effect, and the result is bit-for-bit independent of m, the number of images with the same operation.
Operation = Callable[[tf.Tensor, tf.Tensor, float, str], tf.Tensor]


def apply_randaugment(images: tf.Tensor, settings: Augmentation, draws: RandomDraws) -> tf.Tensor:
    """Apply `settings.randaugment` random operations, one after another, to each image, uint8 [b, S, S, 3].

    Each operation uses two of `draws`, from index `RANDAUGMENT`: the first selects the operation, the second its
    direction.
    """
    for i in range(settings.randaugment):
        choices = tf.cast(draws.uniform(RANDAUGMENT + 2 * i) * len(OPERATIONS), tf.int32)
        directions = tf.where(draws.coin(RANDAUGMENT + 2 * i + 1), -1.0, 1.0)
        groups = tf.dynamic_partition(tf.range(tf.size(choices)), choices, len(OPERATIONS))
        new_images = [
            operation(
                tf.gather(images, rows), tf.gather(directions, rows), settings.magnitude / MAX_MAGNITUDE, settings.fill
            )
            for operation, rows in zip(OPERATIONS.values(), groups, strict=True)
        ]
        images = tf.ensure_shape(tf.dynamic_stitch(groups, new_images), images.shape)
    return images


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clip float32 values to 0..255 and truncate to uint8."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _compute_transforms(name: str, strength: float, size: int) -> list[list[float]]:
    """Return two transforms from output to source pixels, for the directions -1 and 1.

    A transform [a0, a1, a2, b0, b1, b2] maps the pixel (x, y) to (a0 x + a1 y + a2, b0 x + b1 y + b2).
    """
    slope, shift = 0.3 * strength, int(150 / 331 * size * strength)
    match name:
        case "shear_x":  # about the upper edge, by up to 0.3 pixels per row
            return [[1, s, s / 2, 0, 1, 0] for s in (-slope, slope)]
        case "shear_y":  # about the left edge, by up to 0.3 pixels per column
            return [[1, 0, 0, s, 1, s / 2] for s in (-slope, slope)]
        case "translate_x":  # by up to 150 / 331 of the side, in integer pixels
            return [[1, 0, x, 0, 1, 0] for x in (-shift, shift)]
        case "translate_y":
            return [[1, 0, 0, 0, 1, y] for y in (-shift, shift)]
    center, angle = (size - 1) / 2, math.radians(30 * strength)
    cos, sin = math.cos(angle), math.sin(angle)  # direction 1 is counter-clockwise
    return [[cos, s, center * (1 - cos - s), -s, cos, center * (1 - cos + s)] for s in (sin, -sin)]


def _apply_geometric(name: str, images: tf.Tensor, direction: tf.Tensor, strength: float, fill: str) -> tf.Tensor:
    """Shear, translate or rotate images in one bilinear resampling; `name` is the operation's key in `OPERATIONS`."""
    transforms = tf.constant([[*t, 0.0, 0.0] for t in _compute_transforms(name, strength, images.shape[1])], tf.float32)
    # `resample` in affine.py takes a third of the time, but XLA would compile it again for each group size.
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.gather(transforms, tf.cast(direction > 0, tf.int32)),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=fill.upper(),
    )
    return _to_uint8(tf.round(warped))


def _to_gray(images: tf.Tensor) -> tf.Tensor:
    """Compute the luminance of each pixel, int32 [m, S, S], like Pillow's conversion to mode L."""
    red, green, blue = tf.unstack(tf.cast(images, tf.int32), axis=-1)
    return tf.bitwise.right_shift(19595 * red + 38470 * green + 7471 * blue + 32768, 16)


def _blend(images: tf.Tensor, base: tf.Tensor, direction: tf.Tensor, strength: float) -> tf.Tensor:
    """Compute base + factor * (images - base), like Pillow's `Image.blend`, with a factor of 1 +- 0.9 * strength.

    `base` is float32 and broadcastable to `images`. The result is clipped to 0..255 and truncated to uint8.
    """
    factor = (1 + direction * (0.9 * strength))[:, None, None, None]
    return _to_uint8(base + factor * (tf.cast(images, tf.float32) - base))


def brightness(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Change the brightness: blend with black."""
    return _blend(images, tf.zeros([]), direction, strength)


def color(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Change the saturation: blend with the gray image."""
    return _blend(images, tf.cast(_to_gray(images), tf.float32)[..., None], direction, strength)


def contrast(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Change the contrast: blend with the mean luminance of the image."""
    total = tf.reduce_sum(tf.cast(tf.reduce_sum(_to_gray(images), axis=2), tf.int64), axis=1)
    mean = tf.cast(tf.cast(total, tf.float64) / images.shape[1] ** 2, tf.float32)
    return _blend(images, mean[:, None, None, None], direction, strength)


def sharpness(images: tf.Tensor, direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Change the sharpness: blend with the image smoothed by the kernel (1 1 1, 1 5 1, 1 1 1) / 13.

    Border pixels do not change.
    """
    pixels = tf.cast(images, tf.int32)
    columns = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    sums = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * pixels[:, 1:-1, 1:-1]
    smooth = tf.round(tf.cast(sums, tf.float32) / 13)
    middle = _blend(images[:, 1:-1, 1:-1], smooth, direction, strength)
    rows = tf.concat([images[:, 1:-1, :1], middle, images[:, 1:-1, -1:]], axis=2)
    return tf.concat([images[:, :1], rows, images[:, -1:]], axis=1)


def posterize(images: tf.Tensor, _direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Clear the lowest bits of each value: none at strength 0, four at strength 1."""
    return tf.bitwise.bitwise_and(images, tf.constant(256 - 2 ** round(4 * strength), tf.uint8))


def solarize(images: tf.Tensor, _direction: tf.Tensor, strength: float, _fill: str) -> tf.Tensor:
    """Invert the values at or above a threshold, which is 255 at strength 0 and 0 at strength 1."""
    return tf.where(tf.cast(images, tf.float32) >= 255 * (1 - strength), 255 - images, images)


def autocontrast(images: tf.Tensor, _direction: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Stretch the values of each channel to 0..255; a constant channel does not change."""
    low, high = (tf.cast(op(images, axis=[1, 2], keepdims=True), tf.float32) for op in (tf.reduce_min, tf.reduce_max))
    stretched = (tf.cast(images, tf.float32) - low) * (255 / tf.maximum(high - low, 1))
    return tf.where(high > low, _to_uint8(stretched), images)


def equalize(images: tf.Tensor, _direction: tf.Tensor, _strength: float, _fill: str) -> tf.Tensor:
    """Equalize the histogram of each channel, like Pillow's `ImageOps.equalize`."""
    channel_index = tf.reshape(tf.range(tf.shape(images)[0] * 3), [-1, 1, 1, 3])
    bins = channel_index * 256 + tf.cast(images, tf.int32)
    num_bins = tf.shape(images)[0] * 3 * 256
    counts = tf.raw_ops.DenseBincount(input=tf.reshape(bins, [-1]), size=num_bins, weights=tf.zeros([0], tf.int32))
    counts = tf.reshape(counts, [-1, 256])
    values_present = tf.cast(counts > 0, tf.int32) * tf.range(256)
    count_of_max = tf.gather(counts, tf.reduce_max(values_present, axis=1), batch_dims=1)
    step = (images.shape[1] ** 2 - count_of_max)[:, None] // 255
    lookup_table = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    lookup_table = tf.where(step > 0, tf.minimum(lookup_table, 255), tf.range(256))
    return tf.gather(tf.cast(tf.reshape(lookup_table, [-1]), tf.uint8), bins)


# Operations are drawn by their index: a new number or order of entries changes the images of existing configurations.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, _direction, _strength, _fill: images,
    **{n: partial(_apply_geometric, n) for n in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")},
    **{f.__name__: f for f in (brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize)},
}
