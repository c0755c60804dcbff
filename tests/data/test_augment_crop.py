"""Crops: what is drawn, against rejection sampling, and what is seen, against a closed form."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tests.data.augmented import IMAGES, SIDE, assert_rounded, augmented, drawn, level
from trainer.config.schema import Augmentation
from trainer.data.augment import draws
from trainer.data.augment.affine import aspects, windows
from trainer.data.augment.apply import augment
from trainer.data.augment.draws import Draws


def boxes(least: float) -> np.ndarray:
    """Left, top, width and height of each crop, float64 [n, 4], from the drawn numbers."""
    roots, largest = aspects(least)
    at = level(draws.CROP_ASPECT)
    area = least + (largest[at] - least) * drawn(draws.CROP_AREA)
    width, height = np.sqrt(area) * roots[at], np.sqrt(area) / roots[at]
    return np.stack([(1 - width) * drawn(draws.CROP_X), (1 - height) * drawn(draws.CROP_Y), width, height], axis=1)


def seen(image: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Bilinear, from one middle of a pixel to another; float64 [SIDE, SIDE, 3]."""
    steps = np.linspace(0, 1, SIDE)
    places = [(start + steps * length) * (SIDE - 1) for start, length in ((top, height), (left, width))]
    for axis, place in enumerate(places):
        low = np.minimum(place.astype(int), SIDE - 2)
        part = np.expand_dims(place - low, [1 - axis, 2])
        image = np.take(image, low, axis) * (1 - part) + np.take(image, low + 1, axis) * part
    return image


def test_a_crop_shows_its_window() -> None:
    windows = boxes(0.2)
    assert windows[:, 2].min() < 0.7
    expected = np.stack([seen(image, *box) for image, box in zip(IMAGES, windows, strict=True)])
    assert_rounded(augmented(crop=0.2), expected)
    flips = [drawn(what) < 0.5 for what in (draws.FLIP_HORIZONTAL, draws.FLIP_VERTICAL)]
    for image, across, down in zip(expected, *flips, strict=True):
        image[:] = image[:: -1 if down else 1, :: -1 if across else 1]
    assert_rounded(augmented(crop=0.2, flip_horizontal=True, flip_vertical=True), expected)


def test_beside_an_affine_map_it_is_the_same_window() -> None:
    alone = augmented(crop=0.2, flip_horizontal=True)
    together = augmented(crop=0.2, flip_horizontal=True, rotation=1e-4, fill="nearest")
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize("least", [0.08, 0.5, 0.9])
def test_windows_are_drawn_as_published(least: float) -> None:
    """Area evenly from [least, 1], logarithm of the aspect evenly from +-log(4/3), what does not fit drawn again."""
    count = 20_000
    (width, height), (left, top) = windows(least, Draws(1, tf.zeros(count, tf.int64), tf.range(count, dtype=tf.int64)))
    rng = np.random.default_rng(0)
    area, aspect = rng.uniform(least, 1, 10 * count), np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3), 10 * count))
    fits = np.maximum(area * aspect, area / aspect) <= 1
    area, aspect = area[fits], aspect[fits]
    for mine, theirs in (
        (width * height, area),
        (np.log(width / height), np.log(aspect)),
        (width, np.sqrt(area * aspect)),
        (left / (1 - width), rng.uniform(0, 1, count)),
        (top / (1 - height), rng.uniform(0, 1, count)),
    ):
        assert stats.ks_2samp(np.asarray(mine), theirs).statistic < 0.02  # 1 % of such samples differ by 0.017


@pytest.mark.parametrize("side", [8, 224, 1024])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_never_looks_beyond_the_edge(side: int, flip: bool) -> None:
    count = {8: 2000, 224: 20, 1024: 2}[side]
    white = tf.fill([count, side, side, 3], tf.constant(255, tf.uint8))
    options = Augmentation(crop=0.999, flip_horizontal=flip, flip_vertical=flip)
    found = augment(white, options, 1, np.zeros(count, np.int64), np.arange(count))
    assert_rounded(found, 255, 1e-3)
