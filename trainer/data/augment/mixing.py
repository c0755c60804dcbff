"""Holes in images, and images made of two: cutout, mixup, cutmix.

The partner of the example at `position` in the global batch is the one at `position ^ 1`: neighbours, so that every
even part of a batch (a worker's, a replica's) holds both, and the pairs are those of one replica alone.
"""

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import in_one_loop
from trainer.data.augment.draws import CUTMIX_X, CUTMIX_Y, CUTOUT_X, CUTOUT_Y, LEVELS, MIX, MIX_KIND, Draws

GREY = 128  # in the middle of what a pixel can be, and so near zero for every backbone


def with_hole(images: tf.Tensor, fraction: float, draws: Draws) -> tf.Tensor:
    """Cutout (DeVries and Taylor 2017): a grey square of side `fraction` * S, its centre anywhere, so that it may hang
    over the edge. Images [b, S, S, 3] of any type.
    """
    side = tf.fill([tf.shape(images)[0]], max(round(fraction * images.shape[1]), 1))
    hole, _ = _box(side, draws, (CUTOUT_X, CUTOUT_Y), images.shape[1])
    return tf.reshape(tf.where(hole, tf.constant(GREY, images.dtype), _flat(images)), tf.shape(images))


def _box(side: tf.Tensor, draws: Draws, what: tuple[int, int], size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A square of `side` pixels, int32 [b], about a centre anywhere in an image of `size` pixels a side.

    Returns:
        bool [b, S, 3 S], true inside; and how many pixels of the image that are, int32 [b].
    """
    inside, lengths = [], []
    for number in what:
        first = tf.cast(draws.uniform(number) * size, tf.int32) - side // 2
        first, last = tf.maximum(first, 0), tf.minimum(first + side, size)
        at = tf.range(size)
        inside.append((at >= first[:, None]) & (at < last[:, None]))
        lengths.append(last - first)
    across, down = inside
    return down[:, :, None] & tf.repeat(across, 3, axis=1)[:, None, :], lengths[0] * lengths[1]


def _flat(images: tf.Tensor) -> tf.Tensor:
    """[b, S, 3 S]: a mask without the colours in its last axis, spread over them, takes three times as long."""
    return tf.reshape(images, [-1, images.shape[1], 3 * images.shape[1]])


def shares(alpha: float) -> np.ndarray:
    """Equally likely values of lambda, from Beta(alpha, alpha): float64 [LEVELS]."""
    from scipy import stats  # takes half a second or more, and few runs mix

    return stats.beta.ppf((np.arange(LEVELS) + 0.5) / LEVELS, alpha, alpha)


def mixed(batch: dict[str, tf.Tensor], a: Augmentation, seed: int, epoch: tf.Tensor) -> dict[str, tf.Tensor]:
    """Mix each image with its partner's, as its own random numbers say; lam is each example's own weight.

    Mixup (Zhang et al. 2018) adds up lam * own + (1 - lam) * other. Cutmix (Yun et al. 2019) lets a rectangle of
    the other image cover (1 - lam) of the own one, with its centre anywhere; lam is what is left to be seen.
    Where both are on, half of the examples get the one and half the other. Nothing is mixed into padding, nor padding
    into anything.

    Args:
        batch: image uint8 [b, S, S, 3], label int32 [b], weight float32 [b] and index int64 [b]; b is even, and its
            first row is at an even position of the global batch.
        epoch: int64 [b].

    Returns:
        image as above, `other_label` int32 [b] and `mix` float32 [b], the weight of `label`: 1 where nothing is mixed.
    """
    images = _flat(batch["image"])
    size, others, draws = images.shape[1], _partners(images), Draws(seed, epoch, batch["index"])
    real = (batch["weight"] > 0) & (_partners(batch["weight"]) > 0)
    is_cut = real if a.cutmix else tf.zeros_like(real)
    if a.mixup and a.cutmix:
        is_cut &= draws.coin(MIX_KIND)
    mixture, lam = images, tf.ones_like(batch["weight"])
    if a.mixup:
        lam = tf.where(real & ~is_cut, draws.of(MIX, shares(a.mixup)), 1.0)
        mixture = _blended(images, others, lam)
    if a.cutmix:
        sides = tf.cast(draws.of(MIX, np.rint(np.sqrt(1 - shares(a.cutmix)) * size)), tf.int32)
        box, covered = _box(sides, draws, (CUTMIX_X, CUTMIX_Y), size)
        mixture = tf.raw_ops.Select(condition=box & is_cut[:, None, None], x=others, y=mixture)
        lam = tf.where(is_cut, 1.0 - tf.cast(covered, tf.float32) / float(size * size), lam)
    mixture = tf.reshape(mixture, tf.shape(batch["image"]))
    return {
        "image": tf.ensure_shape(mixture, batch["image"].shape),
        "other_label": _partners(batch["label"]),
        "mix": lam,
    }


@in_one_loop
def _blended(images: tf.Tensor, others: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """lam * images + (1 - lam) * others, rounded: uint8 [b, S, 3 S]; lam float32 [b]."""
    lam = lam[:, None, None]
    mixture = tf.cast(images, tf.float32) * lam + tf.cast(others, tf.float32) * (1.0 - lam)
    return tf.cast(mixture + 0.5, tf.uint8)


def _partners(rows: tf.Tensor) -> tf.Tensor:
    """The rows [b, ...] with neighbours exchanged."""
    pairs = tf.reshape(rows, [-1, 2, *rows.shape[1:]])
    return tf.reshape(tf.reverse(pairs, [1]), tf.shape(rows))
