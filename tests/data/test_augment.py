"""Each change against a closed form or SciPy, with the very numbers that were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from trainer.config import Augmentation
from trainer.data import augment as module
from trainer.data.augment import LEVELS, augment, levels
from trainer.randomness import AUGMENTATION, uniform

SIDE, COUNT, SEED, EPOCH = 16, 12, 11, 3
INDEX = np.arange(100, 100 + COUNT)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
EVERYTHING = Augmentation(
    flip_horizontal=True, flip_vertical=True, rotation=30, shift=0.2, shear=10, zoom=0.3, contrast=0.4, brightness=0.2
)


def augmented(**changes: object) -> np.ndarray:
    result = augment(tf.constant(IMAGES), Augmentation(**changes), SEED, np.full(COUNT, EPOCH), INDEX)  # type: ignore
    assert result.dtype == tf.float32
    return result.numpy()


def drawn(what: int) -> np.ndarray:
    """The uniform number of each example for one purpose."""
    return uniform(SEED, AUGMENTATION, EPOCH, INDEX, what).numpy()


def value(what: int, low: float, high: float) -> np.ndarray:
    return levels(low, high)[(drawn(what) * LEVELS).astype(int)]


def resampled(backwards: np.ndarray, shift: np.ndarray, mode: str) -> np.ndarray:
    """SciPy's picture: the result at q shows the source at backwards @ (q - centre - shift) + centre, in (x, y)."""
    centre, turn = np.full(2, (SIDE - 1) / 2), np.array([[0, 1], [1, 0]])
    pictures = []
    for image, matrix, move in zip(IMAGES, backwards, shift, strict=True):
        rows_first = turn @ matrix @ turn
        offset = centre - rows_first @ (centre + move[::-1])
        channels = [
            ndimage.affine_transform(image[..., c].astype(float), rows_first, offset, order=1, mode=mode)
            for c in range(3)
        ]
        pictures.append(np.stack(channels, axis=-1))
    return np.stack(pictures)


STILL = np.zeros((COUNT, 2))
SAME = np.broadcast_to(np.eye(2), (COUNT, 2, 2))


def test_flips_are_exact() -> None:
    across = drawn(module.FLIP_HORIZONTAL) < 0.5
    down = drawn(module.FLIP_VERTICAL) < 0.5
    assert 0 < across.sum() < COUNT
    assert 0 < down.sum() < COUNT
    expected = np.where(across[:, None, None, None], IMAGES[:, :, ::-1], IMAGES)
    np.testing.assert_array_equal(augmented(flip_horizontal=True), expected)
    expected = np.where(down[:, None, None, None], expected[:, ::-1], expected)
    np.testing.assert_array_equal(augmented(flip_horizontal=True, flip_vertical=True), expected)


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_rotation(fill: str) -> None:
    angles = np.radians(value(module.ROTATION, -40, 40))
    cos, sin = np.cos(angles), np.sin(angles)
    backwards = np.moveaxis(np.array([[cos, sin], [-sin, cos]]), -1, 0)
    found = augmented(rotation=40, fill=fill)
    inside = slice(4, -4) if fill == "constant" else slice(None)  # SciPy's edge differs by a fraction of a pixel there
    np.testing.assert_allclose(
        found[:, inside, inside], resampled(backwards, STILL, fill)[:, inside, inside], atol=0.02
    )


def test_rotation_is_clockwise_for_positive_angles() -> None:
    angles = value(module.ROTATION, -40, 40)
    images = np.zeros_like(IMAGES)
    images[:, 1:3, 7:9] = 255  # a spot at the top: clockwise takes it to the right
    found = augment(tf.constant(images), Augmentation(rotation=40), SEED, np.full(COUNT, EPOCH), INDEX).numpy()
    across = (found.sum((1, 3)) * np.arange(SIDE)).sum(1) / found.sum((1, 2, 3)) - (SIDE - 1) / 2
    assert (np.sign(across[np.abs(angles) > 5]) == np.sign(angles[np.abs(angles) > 5])).all()


@pytest.mark.parametrize("fill", ["nearest", "reflect"])
def test_shift(fill: str) -> None:
    move = np.stack([value(what, -0.25 * SIDE, 0.25 * SIDE) for what in (module.SHIFT_X, module.SHIFT_Y)], axis=1)
    np.testing.assert_allclose(augmented(shift=0.25, fill=fill), resampled(SAME, move, fill), atol=0.02)


def test_shear() -> None:
    slope = np.tan(np.radians(value(module.SHEAR, -20, 20)))
    backwards = np.array([[[1, -s], [0, 1]] for s in slope])
    np.testing.assert_allclose(augmented(shear=20), resampled(backwards, STILL, "nearest"), atol=0.02)


def test_zoom() -> None:
    scale = value(module.ZOOM, 0.7, 1.3)
    backwards = SAME / scale[:, None, None]
    np.testing.assert_allclose(augmented(zoom=0.3), resampled(backwards, STILL, "nearest"), atol=0.02)


def test_all_shapes_together_in_one_resampling() -> None:
    angle, slope = (np.radians(value(w, -h, h)) for w, h in ((module.ROTATION, 30), (module.SHEAR, 10)))
    scale, flips = (
        value(module.ZOOM, 0.7, 1.3),
        [drawn(w) < 0.5 for w in (module.FLIP_HORIZONTAL, module.FLIP_VERTICAL)],
    )
    forwards = [
        np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        @ np.array([[1, np.tan(slope[i])], [0, 1]])
        @ (np.eye(2) * scale[i])
        @ np.diag([-1.0 if flip[i] else 1.0 for flip in flips])
        for i in range(COUNT)
    ]
    move = np.stack([value(what, -0.2 * SIDE, 0.2 * SIDE) for what in (module.SHIFT_X, module.SHIFT_Y)], axis=1)
    found = augmented(**{**EVERYTHING.model_dump(), "contrast": 0.0, "brightness": 0.0})
    np.testing.assert_allclose(found, resampled(np.linalg.inv(forwards), move, "nearest"), atol=0.03)


def test_shift_by_hand() -> None:
    move = value(module.SHIFT_X, -SIDE / 2, SIDE / 2), value(module.SHIFT_Y, -SIDE / 2, SIDE / 2)
    found = augmented(shift=0.5)
    for image, result, x, y in zip(IMAGES.astype(float), found, *move, strict=True):
        place = [np.clip(np.arange(SIDE) - m, 0, SIDE - 1) for m in (y, x)]
        low = [np.floor(p).astype(int) for p in place]
        part = [(p - b)[:, None] for p, b in zip(place, low, strict=True)]
        high = [np.minimum(b + 1, SIDE - 1) for b in low]
        rows = image[low[0]] * (1 - part[0][..., None]) + image[high[0]] * part[0][..., None]
        np.testing.assert_allclose(result, rows[:, low[1]] * (1 - part[1]) + rows[:, high[1]] * part[1], atol=0.02)


def test_colours() -> None:
    factor = value(module.CONTRAST, 0.5, 1.5)[:, None, None, None]
    plus = value(module.BRIGHTNESS, -0.3 * 255, 0.3 * 255)[:, None, None, None]
    mean = IMAGES.mean((1, 2, 3), keepdims=True)
    contrasted = (IMAGES - mean) * factor + mean
    np.testing.assert_allclose(augmented(contrast=0.5), np.clip(contrasted, 0, 255), atol=1e-3)
    np.testing.assert_allclose(augmented(brightness=0.3), np.clip(IMAGES + plus, 0, 255), atol=1e-3)
    both = augmented(contrast=0.5, brightness=0.3)
    np.testing.assert_allclose(both, np.clip(contrasted + plus, 0, 255), atol=1e-3)


def test_the_same_bits_in_any_batch() -> None:
    epoch = np.full(COUNT, EPOCH)
    # Compiled for each size, as a pipeline is: the optimizer of graphs may round otherwise than eager execution.
    compiled = tf.function(lambda images, epoch, index: augment(images, EVERYTHING, SEED, epoch, index))
    whole = compiled(tf.constant(IMAGES), tf.constant(epoch), tf.constant(INDEX)).numpy()
    for rows in ([5], [7, 1], [11, 3, 0, 8, 2], list(range(COUNT))[::-1] * 3):
        some = compiled(tf.constant(IMAGES[rows]), tf.constant(epoch[:1].repeat(len(rows))), tf.constant(INDEX[rows]))
        np.testing.assert_array_equal(some, whole[rows])


@pytest.mark.parametrize(("seed", "epoch", "shift"), [(12, 3, 0), (11, 4, 0), (11, 3, 1000)])
def test_other_coordinates_give_other_pictures(seed: int, epoch: int, shift: int) -> None:
    first = augmented(**EVERYTHING.model_dump())
    other = augment(tf.constant(IMAGES), EVERYTHING, seed, np.full(COUNT, epoch), INDEX + shift).numpy()
    assert (np.abs(other - first).mean((1, 2, 3)) > 1).all()


def test_what_is_off_is_not_in_the_graph() -> None:
    def operations(augmentation: Augmentation) -> set[str]:
        signature = [tf.TensorSpec([4, 8, 8, 3], tf.uint8)] + [tf.TensorSpec([4], tf.int64)] * 2
        made = tf.function(lambda x, e, i: augment(x, augmentation, 1, e, i), input_signature=signature)
        return {op.type for op in made.get_concrete_function().graph.get_operations()}

    assert operations(Augmentation()) == {"Placeholder", "Cast", "Identity"}
    flipping = operations(Augmentation(flip_horizontal=True))
    assert "ReverseV2" in flipping
    assert not flipping & {"ImageProjectiveTransformV3", "Mean", "Sum", "ClipByValue"}
    assert "ImageProjectiveTransformV3" in operations(Augmentation(rotation=5))


def test_values_stay_within_the_range_of_pixels() -> None:
    found = augmented(**EVERYTHING.model_dump())
    assert found.min() >= 0
    assert found.max() <= 255
