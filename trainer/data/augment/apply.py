"""Augmentation of training images as a function of (seed, epoch, index), independent of the rest of the batch."""

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import flipped, warped
from trainer.data.augment.colour import recoloured
from trainer.data.augment.draws import RANDAUGMENT, Draws
from trainer.data.augment.mixing import with_hole
from trainer.data.augment.randaugment import randaugmented


def augment(images: tf.Tensor, augmentation: Augmentation, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Augment each image with its own random numbers; operations that are off are not in the graph.

    1. Colours: contrast ((x - mean of the image) * factor in 1 +- contrast + mean), brightness (+- brightness * 255),
       saturation ((x - grey of the pixel) * factor in 1 +- saturation + grey), hue (HSV, +- hue turns); clipped to
       0..255.
    2. Geometry, in one bilinear resampling: a crop of the fraction `crop` to 1 of the area with an aspect of 3/4 to
       4/3; then, about the centre, flips, zoom (magnification 1 +- zoom), shear (x + y * tan(angle)), rotation
       (clockwise for positive angles; the sum of a draw from each range), stretch (as zoom, width and height
       independently) and shift (+- shift * S pixels per axis). Pixels outside the source follow `fill`.
    3. `randaugment` operations (`randaugment.py`).
    4. Cutout. Mixup and cutmix need more than one example and follow in `mixing.py`.

    Every step takes and returns bytes.

    Args:
        images: uint8 [b, S, S, 3].
        epoch, index: int64 [b].

    Returns:
        uint8 [b, S, S, 3], the same bits for an example in every batch.
    """
    a = augmentation
    if not a.active:
        return images
    draws = Draws(seed, epoch, index)
    resampling = bool(a.crop or a.rotation or a.shift or a.shear or a.zoom or a.stretch)
    if not resampling:
        images = flipped(images, a, draws)
    if a.contrast or a.brightness or a.saturation or a.hue:
        images = recoloured(images, a, draws)
    if resampling:
        images = warped(images, a, draws)
    if a.randaugment:
        images = randaugmented(images, a, Draws(seed, epoch, index, RANDAUGMENT, 2 * a.randaugment))
    if a.cutout:
        images = with_hole(images, a.cutout, draws)
    return images
