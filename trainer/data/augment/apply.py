"""Augment a batch of images. Each result depends on the seed, epoch and example index, not on the other images."""

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import flip, warp
from trainer.data.augment.color import recolor
from trainer.data.augment.draws import RANDAUGMENT, RandomDraws
from trainer.data.augment.mixing import apply_cutout
from trainer.data.augment.randaugment import apply_randaugment


def augment(images: tf.Tensor, settings: Augmentation, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Augment each image of a batch with its own random numbers. Disabled operations are not in the graph.

    The operations are applied in this order. Names in backticks are fields of `settings`, the section `augmentation`
    of the configuration.

    1. Colors, clipped to 0..255. Contrast: mean + factor * (x - mean), with the image's mean and a factor in
       1 +- `contrast`. Brightness: x +- 255 * `brightness`. Saturation: gray + factor * (x - gray), with the pixel's
       gray value and a factor in 1 +- `saturation`. Hue: a rotation of the HSV hue by up to `hue` turns in either
       direction.
    2. Geometry, in one bilinear resampling. First a crop of at least the fraction `crop` of the area, with an aspect
       ratio of 3/4 to 4/3. Then, about the center: flips, zoom (magnification 1 +- `zoom`), shear (x + y * tan(angle)),
       rotation (one or two random angles, which are added; positive angles are clockwise), stretch (independent zooms
       of width and height) and shift (up to `shift` * S pixels per axis). `fill` sets the pixels outside the source.
       If flips are the only geometric operation, they copy pixels before step 1, without resampling.
    3. RandAugment: `randaugment` operations, drawn per image.
    4. Cutout. Mixup and cutmix, which need pairs of examples, are applied later (`mix_pairs` in mixing.py).

    Args:
        images: uint8 [b, S, S, 3].
        epoch: epoch of each image, int64 [b].
        index: example index of each image in the split, int64 [b].

    Returns:
        uint8 [b, S, S, 3]. Each image's result is bit-for-bit independent of the other images.
    """
    if not settings.active:
        return images
    draws = RandomDraws(seed, epoch, index)
    needs_resampling = bool(
        settings.crop or settings.rotation or settings.shift or settings.shear or settings.zoom or settings.stretch
    )
    if not needs_resampling:
        images = flip(images, settings, draws)
    if settings.contrast or settings.brightness or settings.saturation or settings.hue:
        images = recolor(images, settings, draws)
    if needs_resampling:
        images = warp(images, settings, draws)
    if settings.randaugment:
        images = apply_randaugment(
            images, settings, RandomDraws(seed, epoch, index, RANDAUGMENT, 2 * settings.randaugment)
        )
    if settings.cutout:
        images = apply_cutout(images, settings.cutout, draws)
    return images
