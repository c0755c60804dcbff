"""Resampling against TensorFlow, and crops against rejection sampling and a closed form."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tests.data.augmented import (
    COUNT,
    IMAGES,
    SIDE,
    assert_equal_up_to_rounding,
    augment_images,
    draw_level,
    draw_numbers,
)
from trainer.config.schema import Augmentation
from trainer.data.augment import draws
from trainer.data.augment.affine import draw_crops, resample, tabulate_aspects
from trainer.data.augment.apply import augment
from trainer.data.augment.draws import RandomDraws


def draw_boxes(least: float) -> np.ndarray:
    """Left, top, width and height of each crop, float64 [n, 4]."""
    root, largest = (values[draw_level(draws.CROP_ASPECT)] for values in tabulate_aspects(least))
    area = least + (largest - least) * draw_numbers(draws.CROP_AREA)
    width, height = np.sqrt(area) * root, np.sqrt(area) / root
    return np.stack(
        [(1 - width) * draw_numbers(draws.CROP_X), (1 - height) * draw_numbers(draws.CROP_Y), width, height], axis=1
    )


def crop(image: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Bilinear crop between pixel centres, float64 [SIDE, SIDE, 3]."""
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        position = (start + np.linspace(0, 1, SIDE) * length) * (SIDE - 1)
        low = np.minimum(position.astype(int), SIDE - 2)
        fraction = np.expand_dims(position - low, [1 - axis, 2])
        image = np.take(image, low, axis) * (1 - fraction) + np.take(image, low + 1, axis) * fraction
    return image


def test_a_crop_shows_its_window() -> None:
    windows = draw_boxes(0.2)
    assert windows[:, 2].min() < 0.7
    expected = np.stack([crop(image, *box) for image, box in zip(IMAGES, windows, strict=True)])
    assert_equal_up_to_rounding(augment_images(crop=0.2), expected)
    flips = [draw_numbers(what) < 0.5 for what in (draws.FLIP_HORIZONTAL, draws.FLIP_VERTICAL)]
    for image, across, down in zip(expected, *flips, strict=True):
        image[:] = image[:: -1 if down else 1, :: -1 if across else 1]
    assert_equal_up_to_rounding(augment_images(crop=0.2, flip_horizontal=True, flip_vertical=True), expected)


def test_with_an_affine_transform_the_window_is_the_same() -> None:
    alone = augment_images(crop=0.2, flip_horizontal=True)
    together = augment_images(crop=0.2, flip_horizontal=True, rotation=1e-4, fill="nearest")
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize("least", [0.08, 0.5, 0.9])
def test_windows_are_drawn_as_published(least: float) -> None:
    """Area uniform in [least, 1], log aspect uniform in +-log(4/3), rejected if it does not fit."""
    count = 20_000
    (width, height), (left, top) = draw_crops(
        least, RandomDraws(1, tf.zeros(count, tf.int64), tf.range(count, dtype=tf.int64))
    )
    rng = np.random.default_rng(0)
    area, aspect = rng.uniform(least, 1, 10 * count), np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3), 10 * count))
    fits = np.maximum(area * aspect, area / aspect) <= 1
    area, aspect = area[fits], aspect[fits]
    for sample, expected in (
        (width * height, area),
        (np.log(width / height), np.log(aspect)),
        (width, np.sqrt(area * aspect)),
        (left / (1 - width), rng.uniform(0, 1, count)),
        (top / (1 - height), rng.uniform(0, 1, count)),
    ):
        assert stats.ks_2samp(np.asarray(sample), expected).statistic < 0.02  # 1 % of such samples differ by 0.017


@pytest.mark.parametrize("side", [8, 224, 1024])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_never_reads_beyond_the_edge(side: int, flip: bool) -> None:
    count = {8: 2000, 224: 20, 1024: 2}[side]
    white = tf.fill([count, side, side, 3], tf.constant(255, tf.uint8))
    options = Augmentation(crop=0.999, flip_horizontal=flip, flip_vertical=flip)
    assert_equal_up_to_rounding(augment(white, options, 1, np.zeros(count, np.int64), np.arange(count)), 255, 1e-3)


def maps() -> np.ndarray:
    """Transforms that rotate, flip, scale and shift far beyond the edges, float32 [COUNT, 6]."""
    rng = np.random.default_rng(1)
    return np.concatenate([
        rng.uniform(-2, 2, (COUNT, 2)), rng.uniform(-40, 40, (COUNT, 1)),
        rng.uniform(-2, 2, (COUNT, 2)), rng.uniform(-40, 40, (COUNT, 1)),
    ], axis=1).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_it_equals_tensorflows_resampling_rounded(fill: str) -> None:
    result = resample(tf.constant(IMAGES), tf.constant(maps()), fill)
    expected = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.constant(IMAGES, tf.float32),
        transforms=np.pad(maps(), [(0, 0), (0, 2)]),
        output_shape=[SIDE, SIDE],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=fill.upper(),
    )
    assert result.dtype == tf.uint8
    assert 0.02 < np.mean(expected == 0) < 0.98 or fill != "constant"
    assert_equal_up_to_rounding(result.numpy(), expected.numpy())


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_whole_pixels_are_only_moved(fill: str) -> None:
    move = np.tile(np.float32([1, 0, 3, 0, 1, -2]), (COUNT, 1))
    padded = np.pad(IMAGES, [(0, 0), (2, 0), (0, 3), (0, 0)],
                    mode={"nearest": "edge", "constant": "constant", "reflect": "symmetric"}[fill])  # fmt: skip
    expected = padded[:, :SIDE, 3:]
    np.testing.assert_array_equal(resample(tf.constant(IMAGES), tf.constant(move), fill), expected)
