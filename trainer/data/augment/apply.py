"""Augment a batch of images. Each result depends on the seed, epoch and example index, not on the other images."""

import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import flip, warp
from trainer.data.augment.color import recolor
from trainer.data.augment.draws import RANDAUGMENT, RandomDraws
from trainer.data.augment.mixing import apply_cutout
from trainer.data.augment.randaugment import apply_randaugment


def augment(images: tf.Tensor, a: Augmentation, seed: int, epoch: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Augment each image of a batch with its own random numbers. Disabled operations are not in the graph.

    The operations are applied in this order. Names in backticks are fields of `a`.

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
    if not a.active:
        return images
    draws = RandomDraws(seed, epoch, index)
    needs_resampling = bool(a.crop or a.rotation or a.shift or a.shear or a.zoom or a.stretch)
    if not needs_resampling:
        images = flip(images, a, draws)
    if a.contrast or a.brightness or a.saturation or a.hue:
        images = recolor(images, a, draws)
    if needs_resampling:
        images = warp(images, a, draws)
    if a.randaugment:
        images = apply_randaugment(images, a, RandomDraws(seed, epoch, index, RANDAUGMENT, 2 * a.randaugment))
    if a.cutout:
        images = apply_cutout(images, a.cutout, draws)
    return images
