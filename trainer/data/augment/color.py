"""Change contrast, brightness, saturation and hue of images at random."""

from typing import TypeAlias

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import compile_with_xla, pack, unpack
from trainer.data.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, RandomDraws, tabulate_levels

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the gray value of a pixel (ITU-R BT.601)

Planes = list[tf.Tensor]  # the color channels of a batch: red, green and blue, float32 [b, S, S] each
Parameter: TypeAlias = tf.Tensor | None  # float32 [b]; None if the operation is disabled


def recolor(images: tf.Tensor, settings: Augmentation, draws: RandomDraws) -> tf.Tensor:
    """Change the contrast and brightness, then the saturation, then the hue of images, uint8 [b, S, S, 3].

    `settings` sets the range of each change, and `draws` selects a value in the range per image. Pixels are clipped to
    0..255.
    """
    pixels = _recolor(
        images,
        draws.select(CONTRAST, tabulate_levels(1 - settings.contrast, 1 + settings.contrast))
        if settings.contrast
        else None,
        draws.select(BRIGHTNESS, tabulate_levels(-255 * settings.brightness, 255 * settings.brightness))
        if settings.brightness
        else None,
        draws.select(SATURATION, tabulate_levels(1 - settings.saturation, 1 + settings.saturation))
        if settings.saturation
        else None,
        draws.select(HUE, tabulate_levels(-settings.hue, settings.hue)) if settings.hue else None,
    )
    return unpack(pixels, images.shape)


@compile_with_xla
def _recolor(
    images: tf.Tensor, contrast: Parameter, brightness: Parameter, saturation: Parameter, hue: Parameter
) -> tf.Tensor:
    """Recolor images, uint8 [b, S, S, 3]. Return pixels packed by `pack`, int32 [b, S, S].

    Contrast and saturation are factors, brightness is added to pixel values, and hue is a fraction of a turn.
    """
    planes: Planes = tf.unstack(tf.cast(images, tf.float32), axis=-1)
    offset = tf.zeros([]) if brightness is None else brightness[:, None, None]
    if contrast is not None:  # (x - mean) * factor + mean
        factor = contrast[:, None, None]
        offset += _compute_means(images) * (1 - factor)
        planes = [plane * factor for plane in planes]
    if contrast is not None or brightness is not None:
        planes = [tf.clip_by_value(plane + offset, 0.0, 255.0) for plane in planes]
    if saturation is not None:  # (x - gray) * factor + gray
        factor = saturation[:, None, None]
        gray = planes[0] * LUMA[0] + planes[1] * LUMA[1] + planes[2] * LUMA[2]
        planes = [tf.clip_by_value(plane * factor + gray * (1 - factor), 0.0, 255.0) for plane in planes]
    if hue is not None:
        planes = _rotate_hue(planes, hue[:, None, None])
    return pack([tf.cast(plane + 0.5, tf.int32) for plane in planes])


def _compute_means(images: tf.Tensor) -> tf.Tensor:
    """Compute the mean of each uint8 image, float32 [b, 1, 1].

    The sums are of integers, which do not depend on the order of summation, so a mean is bit-identical in any batch.
    """
    columns = tf.cast(tf.reduce_sum(tf.cast(images, tf.int32), axis=1), tf.int64)
    total = tf.cast(tf.reduce_sum(columns, axis=[1, 2]), tf.float64)
    return tf.cast(total / (3 * images.shape[1] * images.shape[2]), tf.float32)[:, None, None]


def _rotate_hue(planes: Planes, turns: tf.Tensor) -> Planes:
    """Rotate the HSV hue by `turns`, float32 [b, 1, 1]. HSV value and saturation do not change."""
    red, green, blue = planes
    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    inverse_chroma = 1 / tf.where(chroma > 0, chroma, 1.0)  # a gray pixel has chroma 0, and its hue has no effect
    hue_sixths = tf.where(
        value == red,
        (green - blue) * inverse_chroma,
        tf.where(value == green, (blue - red) * inverse_chroma + 2.0, (red - green) * inverse_chroma + 4.0),
    )
    rotated_planes = []
    for offset in (5.0, 3.0, 1.0):  # for red, green, blue in the closed form of HSV to RGB (Smith's hexcone)
        hue = (hue_sixths + offset) / 6.0 + turns
        hue = (hue - tf.floor(hue)) * 6.0
        rotated_planes.append(value - chroma * tf.clip_by_value(tf.minimum(hue, 4.0 - hue), 0.0, 1.0))
    return rotated_planes
