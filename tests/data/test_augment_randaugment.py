"""Each operation of RandAugment against Pillow, and the operations that an image draws."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from tests.data.augmented import COUNT, EPOCH, INDEX, SEED, augment_images, draw_numbers
from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.draws import RANDAUGMENT
from trainer.data.augment.randaugment import OPERATIONS

SIDE, STRENGTH = 40, 0.5  # magnitude 15
# Smooth images with some noise: on noise alone two interpolations would differ much.
_RNG, _AT = np.random.default_rng(3), np.linspace(0, 1, SIDE)
IMAGES = np.stack([
    40 + 150 * (_AT[:, None, None] * a + _AT[None, :, None] * (1 - a)) * _RNG.uniform(0.5, 1, 3)
    + _RNG.uniform(0, 20, (SIDE, SIDE, 3))
    for a in _RNG.uniform(0, 1, COUNT)
]).astype(np.uint8)  # fmt: skip
FAR = int(150 / 331 * SIDE * STRENGTH)


def _affine(entries: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, entries, Image.Resampling.BILINEAR)


def make_pillow_operation(name: str, sign: int) -> Callable[[Image.Image], Image.Image]:
    """The published operation with strength 0.5."""
    slope, factor = sign * 0.3 * STRENGTH, 1 + sign * 0.9 * STRENGTH
    return {
        "identity": lambda image: image,
        "shear_x": _affine((1, slope, 0, 0, 1, 0)),
        "shear_y": _affine((1, 0, 0, slope, 1, 0)),
        "translate_x": _affine((1, 0, sign * FAR, 0, 1, 0)),
        "translate_y": _affine((1, 0, 0, 0, 1, sign * FAR)),
        "rotate": lambda image: image.rotate(sign * 30 * STRENGTH, Image.Resampling.BILINEAR),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda image: ImageOps.posterize(image, 6),
        "solarize": lambda image: ImageOps.solarize(image, 128),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }[name]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_is_pillows(name: str, sign: int) -> None:
    result = OPERATIONS[name](tf.constant(IMAGES), tf.fill([COUNT], float(sign)), STRENGTH, "constant").numpy()
    expected = np.stack([np.asarray(make_pillow_operation(name, sign)(Image.fromarray(image))) for image in IMAGES])
    far = np.abs(result.astype(int) - expected)
    if name in ("identity", "translate_x", "translate_y", "posterize", "solarize", "equalize"):
        assert far.max() == 0
    elif name in ("shear_x", "shear_y", "rotate"):  # where black begins, Pillow interpolates in another way
        inside = np.stack([ndimage.binary_erosion(image.any(-1)) for image in expected])
        assert 0.5 < inside.mean() < 0.95
        assert far[inside].max() <= 1
    else:
        assert far.max() <= 1


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_takes_an_empty_batch(name: str) -> None:
    empty = OPERATIONS[name](tf.zeros([0, SIDE, SIDE, 3], tf.uint8), tf.zeros([0]), STRENGTH, "nearest")
    assert empty.shape == (0, SIDE, SIDE, 3)


@pytest.mark.parametrize("flat", [0, 7, 255])
def test_flat_images_stay_as_they_are(flat: int) -> None:
    images = tf.fill([2, SIDE, SIDE, 3], tf.constant(flat, tf.uint8))
    for name in ("autocontrast", "equalize", "sharpness", "color", "shear_x", "rotate"):
        np.testing.assert_array_equal(OPERATIONS[name](images, tf.constant([-1.0, 1.0]), 1.0, "nearest"), images)


def test_each_image_goes_through_the_operations_it_drew() -> None:
    names = list(OPERATIONS)
    expected = IMAGES
    for turn in range(3):
        chosen = (draw_numbers(RANDAUGMENT + 2 * turn) * len(names)).astype(int)
        directions = np.where(draw_numbers(RANDAUGMENT + 2 * turn + 1) < 0.5, -1.0, 1.0)
        assert len(set(chosen)) > 4
        expected = np.concatenate([
            OPERATIONS[names[which]](expected[i : i + 1], tf.constant(directions[i : i + 1], tf.float32), 0.3, "reflect")
            for i, which in enumerate(chosen)
        ])  # fmt: skip
    np.testing.assert_array_equal(augment_images(IMAGES, randaugment=3, fill="reflect"), expected)  # magnitude 9 of 30


def test_the_order_of_operations_is_what_a_draw_means() -> None:
    assert list(OPERATIONS) == [
        "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
        "sharpness", "posterize", "solarize", "autocontrast", "equalize",
    ]  # fmt: skip


def test_magnitude_decides_how_much() -> None:
    def changed(magnitude: int) -> float:
        options = Augmentation(randaugment=2, magnitude=magnitude)
        images = np.repeat(IMAGES, 20, axis=0)
        index = np.arange(len(images)) + INDEX[0]
        result = augment(tf.constant(images), options, SEED, np.full(len(images), EPOCH), index)
        return float(np.abs(result - images).mean())

    assert changed(0) < changed(10) < changed(30)
