"""Random changes to training images: each is a function of (seed, epoch, index), whatever else is in the batch."""

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import flipped, warped
from trainer.data.augment.colour import recoloured
from trainer.data.augment.draws import RANDAUGMENT, Draws
from trainer.data.augment.mixing import with_hole
from trainer.data.augment.randaugment import randaugmented


def augment(images: tf.Tensor, augmentation: Augmentation, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Change each image as its own random numbers say. What is off is not in the graph.

    First the colours: contrast (the distance from the image's mean times a factor from 1 +- contrast), brightness
    (plus up to +- brightness * 255), limited to 0..255; saturation (the distance from the pixel's grey times a factor
    from 1 +- saturation), limited too; hue (of HSV, up to +- this fraction of a turn).

    Then the shape, in one bilinear resampling: a crop of `crop` to all of the area and an aspect from 3/4 to 4/3, and
    about the centre flips, zoom (a magnification from 1 +- zoom), shear (x grows with y by the tangent of the angle),
    rotation (clockwise as seen for positive angles; two ranges are drawn from and added up), stretch (as zoom, width
    and height apart), shift (each way up to +- shift * S pixels, to the right and down for positive ones). Outside the
    source, `fill` decides: the nearest pixel, black, or the reflection.

    Then `randaugment` operations (`randaugment.py`), and last the hole of cutout. Each takes bytes and rounds to bytes.
    Mixup and cutmix need more than one example: `mixing.py`.

    Args:
        images: uint8 [b, S, S, 3].
        epoch, index: int64 [b].

    Returns:
        uint8 [b, S, S, 3]. The same bits for an example in a batch of any size and company.
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
