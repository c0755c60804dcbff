"""Mixup and cutmix: images and labels against closed forms, independent of padding and batch size."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tests.data.augmented import (
    COUNT,
    EPOCH,
    IMAGES,
    INDEX,
    SEED,
    SIDE,
    assert_equal_up_to_rounding,
    draw_level,
    draw_numbers,
)
from trainer.config.schema import Augmentation
from trainer.data.augment import draws
from trainer.data.augment.mixing import compute_beta_quantiles, mix_pairs

LABELS, WEIGHTS = np.arange(COUNT, dtype=np.int32) * 10, np.ones(COUNT, np.float32)
OTHER = np.arange(COUNT) ^ 1


def mix(weight: np.ndarray = WEIGHTS, rows: slice = slice(None), **changes: Any) -> tuple[np.ndarray, ...]:
    """Images, other labels and label weights of some rows."""
    batch = {"image": tf.constant(IMAGES[rows]), "label": tf.constant(LABELS[rows]),
             "weight": tf.constant(weight[rows]), "index": tf.constant(INDEX[rows])}  # fmt: skip
    epoch = np.full(len(IMAGES[rows]), EPOCH)
    result = mix_pairs(batch, Augmentation(**changes), SEED, tf.constant(epoch))
    dtypes = {"image": tf.uint8, "other_label": tf.int32, "mix": tf.float32}
    assert {name: tensor.dtype for name, tensor in result.items()} == dtypes
    return tuple(result[name].numpy() for name in dtypes)


def draw_boxes(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of cutmix, bool [COUNT, SIDE, SIDE], and the fraction that stays visible, [COUNT]."""
    covered = np.zeros((COUNT, SIDE, SIDE), bool)
    centres = [(draw_numbers(what) * SIDE).astype(int) for what in (draws.CUTMIX_X, draws.CUTMIX_Y)]
    sides = np.rint(np.sqrt(1 - compute_beta_quantiles(alpha)[draw_level(draws.MIX)]) * SIDE).astype(int)
    for mask, x, y, side in zip(covered, *centres, sides, strict=True):
        left, top = x - side // 2, y - side // 2
        mask[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = True
    return covered, 1 - covered.mean((1, 2))


def test_mixup_blends_neighbours_with_beta_weights() -> None:
    images, other, weight = mix(mixup=0.4)
    expected = stats.beta.ppf((draw_level(draws.MIX) + 0.5) / draws.NUM_LEVELS, 0.4, 0.4)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    np.testing.assert_array_equal(other, LABELS[OTHER])
    lam = expected[:, None, None, None]
    assert_equal_up_to_rounding(images, lam * IMAGES + (1 - lam) * IMAGES[OTHER], 1e-3)
    assert weight.min() < 0.2
    assert weight.max() > 0.8


def test_cutmix_covers_a_square_with_the_other_image() -> None:
    images, other, weight = mix(cutmix=1.0)
    covered, left = draw_boxes(1.0)
    assert 0 < left.min() < 0.5 < left.max()
    np.testing.assert_array_equal(images, np.where(covered[..., None], IMAGES[OTHER], IMAGES))
    np.testing.assert_allclose(weight, left, atol=1e-6)
    np.testing.assert_array_equal(other, LABELS[OTHER])


def test_with_both_a_coin_decides() -> None:
    both, cut, up = mix(mixup=0.4, cutmix=1.0), mix(cutmix=1.0), mix(mixup=0.4)
    is_cut = draw_numbers(draws.MIX_METHOD) < 0.5
    assert 0 < is_cut.sum() < COUNT
    for result, by_cutmix, by_mixup in zip(both, cut, up, strict=True):
        mask = is_cut.reshape(-1, *[1] * (result.ndim - 1))
        np.testing.assert_array_equal(result, np.where(mask, by_cutmix, by_mixup))


@pytest.mark.parametrize("changes", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_padding_is_mixed_with_nothing(changes: dict[str, float]) -> None:
    weight = WEIGHTS.copy()
    weight[[3, 6, 7, 8]] = 0
    alone = (weight == 0) | (weight[OTHER] == 0)
    images, other, lam = mix(weight, **changes)
    whole, _, whole_lam = mix(**changes)
    np.testing.assert_array_equal(images, np.where(alone[:, None, None, None], IMAGES, whole))
    np.testing.assert_array_equal(lam, np.where(alone, 1, whole_lam))
    np.testing.assert_array_equal(other, LABELS[OTHER])
    assert (whole_lam[[2, 3, 8, 9]] != 1).all()


@pytest.mark.parametrize("changes", [{"mixup": 0.2}, {"cutmix": 0.5}, {"mixup": 0.4, "cutmix": 1.0}], ids=str)
def test_any_even_part_of_a_batch_gives_the_same_bits(changes: dict[str, float]) -> None:
    whole = mix(**changes)
    for size in (2, 4, 6):
        parts = [mix(rows=slice(start, start + size), **changes) for start in range(0, COUNT, size)]
        for expected, *arrays in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(arrays), expected)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 8.0])
def test_quantiles_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    values = compute_beta_quantiles(alpha)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values.mean(), 0.5, atol=1e-6)
    np.testing.assert_allclose(values.var(), 1 / (4 * (2 * alpha + 1)), rtol=2e-3)
