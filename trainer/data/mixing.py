"""Holes in images, and images made of two: cutout, mixup, cutmix.

The partner of the example at `position` in the global batch is the one at `position ^ 1`: neighbours, so that every
even part of a batch (a worker's, a replica's) holds both, and the pairs are those of one replica alone.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from scipy import stats

from trainer.config import Augmentation
from trainer.data.draws import CUTMIX_X, CUTMIX_Y, CUTOUT_X, CUTOUT_Y, LEVELS, MIX, MIX_KIND, Draws

GREY = 128  # in the middle of what a pixel can be, and so near zero for every backbone


def with_hole(images: tf.Tensor, share: float, draws: Draws) -> tf.Tensor:
    """Cutout (DeVries and Taylor 2017): a grey square of side `share` * S, its centre anywhere, so that it may hang
    over the edge. Images [b, S, S, 3] of any type.
    """
    side = tf.fill([tf.shape(images)[0]], max(round(share * images.shape[1]), 1))
    hole, _ = _box(side, draws, (CUTOUT_X, CUTOUT_Y), images.shape[1])
    return tf.where(hole, tf.constant(GREY, images.dtype), images)


def _box(side: tf.Tensor, draws: Draws, what: tuple[int, int], size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A square of `side` pixels, int32 [b], about a centre anywhere in an image of `size` pixels a side.

    Returns:
        bool [b, S, S, 1], true inside; and how many pixels of the image that are, int32 [b].
    """
    inside, lengths = [], []
    for number in what:
        first = tf.cast(draws.share(number) * size, tf.int32) - side // 2
        first, last = tf.maximum(first, 0), tf.minimum(first + side, size)
        at = tf.range(size)
        inside.append((at >= first[:, None]) & (at < last[:, None]))
        lengths.append(last - first)
    across, down = inside
    return (down[:, :, None] & across[:, None, :])[..., None], lengths[0] * lengths[1]


def shares(alpha: float) -> np.ndarray:
    """What the share of an image's own can be: float64 [LEVELS], equally likely values of Beta(alpha, alpha)."""
    return stats.beta.ppf((np.arange(LEVELS) + 0.5) / LEVELS, alpha, alpha)


def mixed(batch: dict[str, tf.Tensor], a: Augmentation, seed: int, epoch: tf.Tensor) -> dict[str, tf.Tensor]:
    """Mix each image with its partner's, as its own random numbers say; the share is each example's own.

    Mixup (Zhang et al. 2018) adds up share * own + (1 - share) * other. Cutmix (Yun et al. 2019) lets a rectangle of
    the other image cover (1 - share) of the own one, with its centre anywhere; the share is what is left to be seen.
    Where both are on, half of the examples get the one and half the other. Nothing is mixed into padding, nor padding
    into anything.

    Args:
        batch: image float32 [b, S, S, 3], label int32 [b], weight float32 [b] and index int64 [b]; b is even, and its
            first row is at an even position of the global batch.
        epoch: int64 [b].

    Returns:
        image as above, `other_label` int32 [b] and `mix` float32 [b], the share of `label`: 1 where nothing is mixed.
    """
    images = batch["image"]
    draws = Draws(seed, epoch, batch["index"])
    own, share = _cutmix(a.cutmix, draws, images.shape[1]) if a.cutmix else _mixup(a.mixup, draws)
    if a.mixup and a.cutmix:
        cut, (evenly, other_share) = draws.coin(MIX_KIND), _mixup(a.mixup, draws)
        own, share = tf.where(cut[:, None, None, None], own, evenly), tf.where(cut, share, other_share)
    real = (batch["weight"] > 0) & (_partners(batch["weight"]) > 0)
    own, share = tf.where(real[:, None, None, None], own, 1.0), tf.where(real, share, 1.0)
    mixture = images * own + _partners(images) * (1.0 - own)
    return {"image": mixture, "other_label": _partners(batch["label"]), "mix": share}


def _mixup(alpha: float, draws: Draws) -> tuple[tf.Tensor, tf.Tensor]:
    """The weight of the own image, float32 [b, 1, 1, 1], and the share of its label, float32 [b]."""
    share = draws.of(MIX, shares(alpha))
    return share[:, None, None, None], share


def _cutmix(alpha: float, draws: Draws, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """As `_mixup`, for every pixel: 0 in the box, 1 around it; float32 [b, S, S, 1]."""
    sides = np.rint(np.sqrt(1 - shares(alpha)) * size)
    box, pixels = _box(tf.cast(draws.of(MIX, sides), tf.int32), draws, (CUTMIX_X, CUTMIX_Y), size)
    return 1.0 - tf.cast(box, tf.float32), 1.0 - tf.cast(pixels, tf.float32) / float(size * size)


def _partners(rows: tf.Tensor) -> tf.Tensor:
    """The rows [b, ...] with neighbours exchanged."""
    pairs = tf.reshape(rows, [-1, 2, *rows.shape[1:]])
    return tf.reshape(tf.reverse(pairs, [1]), tf.shape(rows))
