"""Changes of colour: contrast, brightness, saturation, hue; images stay within 0..255."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.config import Augmentation
from trainer.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws, levels

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)


def recoloured(images: tf.Tensor, a: Augmentation, draws: Draws) -> tf.Tensor:
    """Contrast and brightness in one pass, then saturation, then hue: uint8 or float32 in, float32 [b, S, S, 3] out."""
    changed = tf.cast(images, tf.float32)
    plus = tf.zeros([])
    if a.brightness:
        plus = draws.of(BRIGHTNESS, levels(-255 * a.brightness, 255 * a.brightness))[:, None, None, None]
    if a.contrast:  # (x - mean) * factor + mean, in as few passes over the pixels as it takes
        factor = draws.of(CONTRAST, levels(1 - a.contrast, 1 + a.contrast))[:, None, None, None]
        changed, plus = changed * factor, _mean(images) * (1 - factor) + plus
    if a.contrast or a.brightness:
        changed = tf.clip_by_value(changed + plus, 0.0, 255.0)
    if a.saturation:  # (x - grey) * factor + grey
        factor = draws.of(SATURATION, levels(1 - a.saturation, 1 + a.saturation))[:, None, None]
        red, green, blue = (changed[..., c] * (1 - factor) * LUMA[c] for c in range(3))
        changed = changed * factor[..., None] + (red + green + blue)[..., None]
        changed = tf.clip_by_value(changed, 0.0, 255.0)
    if a.hue:
        changed = _turned(changed, draws.of(HUE, levels(-a.hue, a.hue)))
    return changed


def _mean(images: tf.Tensor) -> tf.Tensor:
    """Mean of each uint8 image, float32 [b, 1, 1, 1]; summed in integers, where the order of adding is all the same."""
    columns = tf.cast(tf.reduce_sum(tf.cast(images, tf.int32), axis=1), tf.int64)
    total = tf.reduce_sum(columns, axis=[1, 2])
    pixels = int(np.prod(images.shape[1:]))
    return tf.cast(tf.cast(total, tf.float64) / pixels, tf.float32)[:, None, None, None]


def _turned(images: tf.Tensor, turns: tf.Tensor) -> tf.Tensor:
    """The hue of HSV moved by a share of a turn, float32 [b]."""

    def one(image_and_turn: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        image, turn = image_and_turn
        return tf.raw_ops.AdjustHue(images=image, delta=turn)

    signature = tf.TensorSpec(images.shape[1:], tf.float32)
    return tf.map_fn(one, (images, turns), fn_output_signature=signature)
