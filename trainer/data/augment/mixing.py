"""Apply cutout, mixup and cutmix to a batch.

Mixup and cutmix pair the examples at positions 2k and 2k + 1 of the global batch. Both examples of a pair are on the
same replica, and the pairs do not depend on the number of replicas.
"""

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.affine import compile_with_xla
from trainer.data.augment.draws import CUTMIX_X, CUTMIX_Y, CUTOUT_X, CUTOUT_Y, MIX, MIX_METHOD, NUM_LEVELS, RandomDraws

GRAY = 128  # middle of the pixel range, close to zero after any backbone's preprocessing


def apply_cutout(images: tf.Tensor, fraction: float, draws: RandomDraws) -> tf.Tensor:
    """Apply cutout (DeVries and Taylor 2017): cover a random square of each image, uint8 [b, S, S, 3], with gray.

    The square is centered at a random pixel, has a side of `fraction` * S pixels, and is clipped to the image.
    """
    sides = tf.fill([tf.shape(images)[0]], max(round(fraction * images.shape[1]), 1))
    mask, _ = _draw_squares(sides, draws, (CUTOUT_X, CUTOUT_Y), images.shape[1])
    return tf.reshape(tf.where(mask, tf.constant(GRAY, images.dtype), _flatten(images)), tf.shape(images))


def _draw_squares(
    sides: tf.Tensor, draws: RandomDraws, center_draws: tuple[int, int], size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draw one square per image, with a side of `sides` pixels, int32 [b], and clip it to the image.

    `center_draws` are the draws that select the x and y of the center. `size` is the image side S in pixels.

    Returns:
        Masks of the squares in flattened images, bool [b, S, 3 S], and the squares' areas in pixels, int32 [b].
    """
    axis_masks, lengths, positions = [], [], tf.range(size)
    for draw in center_draws:
        unclipped_start = tf.cast(draws.uniform(draw) * size, tf.int32) - sides // 2
        start, stop = tf.maximum(unclipped_start, 0), tf.minimum(unclipped_start + sides, size)
        axis_masks.append((positions >= start[:, None]) & (positions < stop[:, None]))
        lengths.append(stop - start)
    column_mask, row_mask = axis_masks
    return row_mask[:, :, None] & tf.repeat(column_mask, 3, axis=1)[:, None, :], lengths[0] * lengths[1]


def _flatten(images: tf.Tensor) -> tf.Tensor:
    """Reshape images to [b, S, 3 S], because broadcasting a mask over a channel axis takes three times as long."""
    return tf.reshape(images, [-1, images.shape[1], 3 * images.shape[1]])


def compute_beta_quantiles(alpha: float) -> np.ndarray:
    """Return `NUM_LEVELS` equally likely values of a Beta(alpha, alpha) variable, increasing, float64 [NUM_LEVELS]."""
    from scipy import stats  # not at the top: the import takes half a second or more, and few runs need it

    return stats.beta.ppf((np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS, alpha, alpha)


def mix_pairs(batch: dict[str, tf.Tensor], settings: Augmentation, seed: int, epoch: tf.Tensor) -> dict[str, tf.Tensor]:
    """Mix each image with its partner, the other image of its pair, by mixup or cutmix.

    Mixup (Zhang et al. 2018) computes lam * image + (1 - lam) * partner, with lam from Beta(alpha, alpha), where alpha
    is `settings.mixup`. Cutmix (Yun et al. 2019) replaces a square of the image with the same square of the partner.
    The square's area is 1 - x with x from Beta(alpha, alpha), where alpha is `settings.cutmix`, minus the part outside
    the image, and lam is the fraction of the image that is not replaced. If both are configured, each is applied with
    probability 1/2. Padding, and examples whose partner is padding, are not mixed.

    Args:
        batch: `image` uint8 [b, S, S, 3], `label` int32 [b], `weight` float32 [b] and `index` int64 [b]. b is even, and
            the first row has an even position in the global batch.
        epoch: epoch of each example, int64 [b].

    Returns:
        `image` uint8 [b, S, S, 3]; `other_label` int32 [b], the partner's label; `mix` float32 [b], which is lam, or 1
        if the example is not mixed.
    """
    images = _flatten(batch["image"])
    size, partners, draws = images.shape[1], _swap_pairs(images), RandomDraws(seed, epoch, batch["index"])
    can_mix = (batch["weight"] > 0) & (_swap_pairs(batch["weight"]) > 0)
    is_cut = can_mix if settings.cutmix else tf.zeros_like(can_mix)
    if settings.mixup and settings.cutmix:
        is_cut &= draws.coin(MIX_METHOD)
    mixture, lam = images, tf.ones_like(batch["weight"])
    if settings.mixup:
        lam = tf.where(can_mix & ~is_cut, draws.select(MIX, compute_beta_quantiles(settings.mixup)), 1.0)
        mixture = _blend(images, partners, lam)
    if settings.cutmix:
        sides = tf.cast(
            draws.select(MIX, np.rint(np.sqrt(1 - compute_beta_quantiles(settings.cutmix)) * size)), tf.int32
        )
        mask, area = _draw_squares(sides, draws, (CUTMIX_X, CUTMIX_Y), size)
        mixture = tf.raw_ops.Select(condition=mask & is_cut[:, None, None], x=partners, y=mixture)
        lam = tf.where(is_cut, 1.0 - tf.cast(area, tf.float32) / float(size * size), lam)
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
