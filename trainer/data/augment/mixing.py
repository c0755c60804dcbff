"""Cutout, mixup and cutmix.

Mixup and cutmix pair the examples at positions 2k and 2k + 1 of the global batch. Both are on the same replica, and the
pairs do not depend on the number of replicas.
"""

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import compile_with_xla
from trainer.data.augment.draws import CUTMIX_X, CUTMIX_Y, CUTOUT_X, CUTOUT_Y, LEVELS, MIX, MIX_KIND, Draws

GRAY = 128  # middle of the pixel range, close to zero after the preprocessing of any backbone


def apply_cutout(images: tf.Tensor, fraction: float, draws: Draws) -> tf.Tensor:
    """Apply cutout (DeVries and Taylor 2017): a gray square of side `fraction` * S, centered anywhere in the image."""
    sides = tf.fill([tf.shape(images)[0]], max(round(fraction * images.shape[1]), 1))
    square, _ = _random_squares(sides, draws, (CUTOUT_X, CUTOUT_Y), images.shape[1])
    return tf.reshape(tf.where(square, tf.constant(GRAY, images.dtype), _flatten(images)), tf.shape(images))


def _random_squares(
    sides: tf.Tensor, draws: Draws, center_draws: tuple[int, int], size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw a square per image, clipped to the image. Return masks, bool [b, S, 3 S], and pixel counts, int32 [b]."""
    inside, lengths, pixels = [], [], tf.range(size)
    for draw in center_draws:
        first = tf.cast(draws.uniform(draw) * size, tf.int32) - sides // 2
        start, stop = tf.maximum(first, 0), tf.minimum(first + sides, size)
        inside.append((pixels >= start[:, None]) & (pixels < stop[:, None]))
        lengths.append(stop - start)
    across, down = inside
    return down[:, :, None] & tf.repeat(across, 3, axis=1)[:, None, :], lengths[0] * lengths[1]


def _flatten(images: tf.Tensor) -> tf.Tensor:
    """Reshape images to [b, S, 3 S]. Broadcasting a mask over a last axis of channels takes three times as long."""
    return tf.reshape(images, [-1, images.shape[1], 3 * images.shape[1]])


def beta_quantiles(alpha: float) -> np.ndarray:
    """Return equally likely values of a Beta(alpha, alpha) variable, float64 [LEVELS]."""
    from scipy import stats  # imported here: it takes half a second or more, and few runs need it

    return stats.beta.ppf((np.arange(LEVELS) + 0.5) / LEVELS, alpha, alpha)


def mix_pairs(batch: dict[str, tf.Tensor], a: Augmentation, seed: int, epoch: tf.Tensor) -> dict[str, tf.Tensor]:
    """Mix each image with its partner, the other image of its pair, by mixup or cutmix.

    Mixup (Zhang et al. 2018) computes lam * image + (1 - lam) * partner. Cutmix (Yun et al. 2019) replaces a square of
    the image with that of the partner; lam is the fraction of the image that remains. If both are configured, each is
    applied with probability 1/2. Padding, and an example whose partner is padding, is not mixed.

    Args:
        batch: image uint8 [b, S, S, 3], label int32 [b], weight float32 [b] and index int64 [b]. b is even, and the
            first row has an even position in the global batch.
        epoch: int64 [b].

    Returns:
        `image` as above; `other_label` int32 [b], the partner's label; `mix` float32 [b], lam, or 1 if not mixed.
    """
    images = _flatten(batch["image"])
    size, partners, draws = images.shape[1], _swap_pairs(images), Draws(seed, epoch, batch["index"])
    both_real = (batch["weight"] > 0) & (_swap_pairs(batch["weight"]) > 0)
    is_cut = both_real if a.cutmix else tf.zeros_like(both_real)
    if a.mixup and a.cutmix:
        is_cut &= draws.coin(MIX_KIND)
    mixture, lam = images, tf.ones_like(batch["weight"])
    if a.mixup:
        lam = tf.where(both_real & ~is_cut, draws.select(MIX, beta_quantiles(a.mixup)), 1.0)
        mixture = _blend(images, partners, lam)
    if a.cutmix:
        sides = tf.cast(draws.select(MIX, np.rint(np.sqrt(1 - beta_quantiles(a.cutmix)) * size)), tf.int32)
        square, covered = _random_squares(sides, draws, (CUTMIX_X, CUTMIX_Y), size)
        mixture = tf.raw_ops.Select(condition=square & is_cut[:, None, None], x=partners, y=mixture)
        lam = tf.where(is_cut, 1.0 - tf.cast(covered, tf.float32) / float(size * size), lam)
    image = tf.ensure_shape(tf.reshape(mixture, tf.shape(batch["image"])), batch["image"].shape)
    return {"image": image, "other_label": _swap_pairs(batch["label"]), "mix": lam}


@compile_with_xla
def _blend(images: tf.Tensor, partners: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Compute lam * images + (1 - lam) * partners, rounded, uint8 [b, S, 3 S]. lam is float32 [b]."""
    lam = lam[:, None, None]
    mixture = tf.cast(images, tf.float32) * lam + tf.cast(partners, tf.float32) * (1.0 - lam)
    return tf.cast(mixture + 0.5, tf.uint8)


def _swap_pairs(rows: tf.Tensor) -> tf.Tensor:
    """Swap rows 2k and 2k + 1 of a tensor [b, ...]."""
    pairs = tf.reshape(rows, [-1, 2, *rows.shape[1:]])
    return tf.reshape(tf.reverse(pairs, [1]), tf.shape(rows))
