"""Cutout, mixup and cutmix.

The partner of the example at `position` in the global batch is the one at `position ^ 1`, its neighbour, so that both
are on the same replica, and pairs do not depend on the number of replicas.
"""

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import xla_compiled
from trainer.data.augment.draws import CUTMIX_X, CUTMIX_Y, CUTOUT_X, CUTOUT_Y, LEVELS, MIX, MIX_KIND, Draws

GREY = 128  # middle of the pixel range, near zero after the preprocessing of every backbone


def with_hole(images: tf.Tensor, fraction: float, draws: Draws) -> tf.Tensor:
    """Apply cutout (DeVries and Taylor 2017): a grey square of side `fraction` * S, centred anywhere in the image."""
    side = tf.fill([tf.shape(images)[0]], max(round(fraction * images.shape[1]), 1))
    hole, _ = _box(side, draws, (CUTOUT_X, CUTOUT_Y), images.shape[1])
    return tf.reshape(tf.where(hole, tf.constant(GREY, images.dtype), _flat(images)), tf.shape(images))


def _box(side: tf.Tensor, draws: Draws, kinds: tuple[int, int], size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the mask, bool [b, S, 3 S], of a random square of `side` int32 [b], and its pixels inside, int32 [b]."""
    inside, lengths = [], []
    for kind in kinds:
        first = tf.cast(draws.uniform(kind) * size, tf.int32) - side // 2
        first, last = tf.maximum(first, 0), tf.minimum(first + side, size)
        pixels = tf.range(size)
        inside.append((pixels >= first[:, None]) & (pixels < last[:, None]))
        lengths.append(last - first)
    across, down = inside
    return down[:, :, None] & tf.repeat(across, 3, axis=1)[:, None, :], lengths[0] * lengths[1]


def _flat(images: tf.Tensor) -> tf.Tensor:
    """Reshape to [b, S, 3 S]: broadcasting a mask over a last axis of channels takes three times as long."""
    return tf.reshape(images, [-1, images.shape[1], 3 * images.shape[1]])


def beta_quantiles(alpha: float) -> np.ndarray:
    """Return equally likely values of lambda, from Beta(alpha, alpha), float64 [LEVELS]."""
    from scipy import stats  # imported here: takes half a second or more, and few runs need it

    return stats.beta.ppf((np.arange(LEVELS) + 0.5) / LEVELS, alpha, alpha)


def mixed(batch: dict[str, tf.Tensor], a: Augmentation, seed: int, epoch: tf.Tensor) -> dict[str, tf.Tensor]:
    """Apply mixup or cutmix to each image and its partner; lam is the weight of the image's own label.

    Mixup (Zhang et al. 2018) computes lam * own + (1 - lam) * other. Cutmix (Yun et al. 2019) covers a square of the
    image with the other one; lam is the fraction that stays visible. With both on, each is applied with probability
    1/2. Padding is never mixed.

    Args:
        batch: image uint8 [b, S, S, 3], label int32 [b], weight float32 [b] and index int64 [b]; b is even, and the
            first row has an even position in the global batch.
        epoch: int64 [b].

    Returns:
        image as above, `other_label` int32 [b] and `mix` float32 [b], the weight lam of `label`: 1 if not mixed.
    """
    images = _flat(batch["image"])
    size, others, draws = images.shape[1], _partners(images), Draws(seed, epoch, batch["index"])
    real = (batch["weight"] > 0) & (_partners(batch["weight"]) > 0)
    is_cut = real if a.cutmix else tf.zeros_like(real)
    if a.mixup and a.cutmix:
        is_cut &= draws.coin(MIX_KIND)
    mixture, lam = images, tf.ones_like(batch["weight"])
    if a.mixup:
        lam = tf.where(real & ~is_cut, draws.of(MIX, beta_quantiles(a.mixup)), 1.0)
        mixture = _blended(images, others, lam)
    if a.cutmix:
        sides = tf.cast(draws.of(MIX, np.rint(np.sqrt(1 - beta_quantiles(a.cutmix)) * size)), tf.int32)
        box, covered = _box(sides, draws, (CUTMIX_X, CUTMIX_Y), size)
        mixture = tf.raw_ops.Select(condition=box & is_cut[:, None, None], x=others, y=mixture)
        lam = tf.where(is_cut, 1.0 - tf.cast(covered, tf.float32) / float(size * size), lam)
    image = tf.ensure_shape(tf.reshape(mixture, tf.shape(batch["image"])), batch["image"].shape)
    return {"image": image, "other_label": _partners(batch["label"]), "mix": lam}


@xla_compiled
def _blended(images: tf.Tensor, others: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Return lam * images + (1 - lam) * others, rounded, uint8 [b, S, 3 S]; lam is float32 [b]."""
    lam = lam[:, None, None]
    mixture = tf.cast(images, tf.float32) * lam + tf.cast(others, tf.float32) * (1.0 - lam)
    return tf.cast(mixture + 0.5, tf.uint8)


def _partners(rows: tf.Tensor) -> tf.Tensor:
    """Swap neighbouring rows of a tensor [b, ...]."""
    pairs = tf.reshape(rows, [-1, 2, *rows.shape[1:]])
    return tf.reshape(tf.reverse(pairs, [1]), tf.shape(rows))
