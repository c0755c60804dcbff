"""Augmentation against closed forms, SciPy and Pillow, computed from the same random numbers."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image, ImageEnhance
from scipy import ndimage

from tests.data.augmented import (
    COUNT,
    EPOCH,
    IMAGES,
    INDEX,
    SEED,
    SIDE,
    assert_equal_up_to_rounding,
    augment_images,
    draw_numbers,
    draw_parameter,
)
from trainer.config.schema import Augmentation, validate_config
from trainer.data.augment import draws
from trainer.data.augment.apply import augment

AFFINE = Augmentation(
    flip_horizontal=True, flip_vertical=True, rotation=30, shift=0.2, shear=10, zoom=0.3, contrast=0.4, brightness=0.2
)
ROOT = Path(__file__).parents[2]
EVERYTHING = AFFINE.model_copy(
    update={"rotation": (20.0, 30.0), "stretch": 0.2, "crop": 0.3, "saturation": 0.5, "hue": 0.2, "randaugment": 3,
            "cutout": 0.3}
)  # fmt: skip


def resample_with_scipy(backwards: np.ndarray, shift: np.ndarray, mode: str) -> np.ndarray:
    """SciPy's images: the output at q shows the source at backwards @ (q - centre - shift) + centre, in (x, y)."""
    centre, swap = np.full(2, (SIDE - 1) / 2), np.array([[0, 1], [1, 0]])
    images = np.zeros(IMAGES.shape)
    for image, result, matrix, move in zip(IMAGES.astype(float), images, backwards, shift, strict=True):
        rows_first = swap @ matrix @ swap
        offset = centre - rows_first @ (centre + move[::-1])
        for c in range(3):
            result[..., c] = ndimage.affine_transform(image[..., c], rows_first, offset, order=1, mode=mode)
    return images


def make_rotation_matrices(angles: np.ndarray) -> np.ndarray:
    """Matrices [n, 2, 2] from output to source for angles in radians."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.moveaxis(np.array([[cos, sin], [-sin, cos]]), -1, 0)


STILL = np.zeros((COUNT, 2))
SAME = np.broadcast_to(np.eye(2), (COUNT, 2, 2))


def test_flips_are_exact() -> None:
    across = draw_numbers(draws.FLIP_HORIZONTAL) < 0.5
    down = draw_numbers(draws.FLIP_VERTICAL) < 0.5
    assert 0 < across.sum() < COUNT
    assert 0 < down.sum() < COUNT
    expected = np.where(across[:, None, None, None], IMAGES[:, :, ::-1], IMAGES)
    np.testing.assert_array_equal(augment_images(flip_horizontal=True), expected)
    expected = np.where(down[:, None, None, None], expected[:, ::-1], expected)
    np.testing.assert_array_equal(augment_images(flip_horizontal=True, flip_vertical=True), expected)


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_rotation(fill: str) -> None:
    expected = resample_with_scipy(
        make_rotation_matrices(np.radians(draw_parameter(draws.ROTATION, -40, 40))), STILL, fill
    )
    inside = slice(4, -4) if fill == "constant" else slice(None)  # SciPy's edge differs by a fraction of a pixel there
    assert_equal_up_to_rounding(augment_images(rotation=40, fill=fill)[:, inside, inside], expected[:, inside, inside])


def test_rotation_is_clockwise_for_positive_angles() -> None:
    angles = draw_parameter(draws.ROTATION, -40, 40)
    images = np.zeros_like(IMAGES)
    images[:, 1:3, 7:9] = 255  # a spot at the top, which a clockwise rotation moves to the right
    rotated = augment_images(images, rotation=40)
    across = (rotated.sum((1, 3)) * np.arange(SIDE)).sum(1) / rotated.sum((1, 2, 3)) - (SIDE - 1) / 2
    assert (np.sign(across[np.abs(angles) > 5]) == np.sign(angles[np.abs(angles) > 5])).all()


@pytest.mark.parametrize("fill", ["nearest", "reflect"])
def test_shift(fill: str) -> None:
    move = np.stack([draw_parameter(what, -SIDE / 2, SIDE / 2) for what in (draws.SHIFT_X, draws.SHIFT_Y)], axis=1)
    assert_equal_up_to_rounding(augment_images(shift=0.5, fill=fill), resample_with_scipy(SAME, move, fill))


def test_shear_and_zoom() -> None:
    slope = np.tan(np.radians(draw_parameter(draws.SHEAR, -20, 20)))
    assert_equal_up_to_rounding(
        augment_images(shear=20), resample_with_scipy(np.array([[[1, -s], [0, 1]] for s in slope]), STILL, "nearest")
    )
    backwards = SAME / draw_parameter(draws.ZOOM, 0.7, 1.3)[:, None, None]
    assert_equal_up_to_rounding(augment_images(zoom=0.3), resample_with_scipy(backwards, STILL, "nearest"))


def test_all_shapes_together_in_one_resampling() -> None:
    angle, slope = (np.radians(draw_parameter(w, -h, h)) for w, h in ((draws.ROTATION, 30), (draws.SHEAR, 10)))
    scale = draw_parameter(draws.ZOOM, 0.7, 1.3)
    flips = [draw_numbers(w) < 0.5 for w in (draws.FLIP_HORIZONTAL, draws.FLIP_VERTICAL)]
    forwards = [
        make_rotation_matrices(-angle)[i]
        @ np.array([[1, np.tan(slope[i])], [0, 1]])
        @ (np.eye(2) * scale[i])
        @ np.diag([-1.0 if flip[i] else 1.0 for flip in flips])
        for i in range(COUNT)
    ]
    move = np.stack([draw_parameter(what, -0.2 * SIDE, 0.2 * SIDE) for what in (draws.SHIFT_X, draws.SHIFT_Y)], axis=1)
    changed = augment_images(**{**AFFINE.model_dump(), "contrast": 0.0, "brightness": 0.0})
    assert_equal_up_to_rounding(changed, resample_with_scipy(np.linalg.inv(forwards), move, "nearest"), 0.03)


def test_colours() -> None:
    factor = draw_parameter(draws.CONTRAST, 0.5, 1.5)[:, None, None, None]
    plus = draw_parameter(draws.BRIGHTNESS, -0.3 * 255, 0.3 * 255)[:, None, None, None]
    mean = IMAGES.mean((1, 2, 3), keepdims=True)
    contrasted = (IMAGES - mean) * factor + mean
    assert_equal_up_to_rounding(augment_images(contrast=0.5), np.clip(contrasted, 0, 255), 1e-3)
    assert_equal_up_to_rounding(augment_images(brightness=0.3), np.clip(IMAGES + plus, 0, 255), 1e-3)
    assert_equal_up_to_rounding(augment_images(contrast=0.5, brightness=0.3), np.clip(contrasted + plus, 0, 255), 1e-3)


def test_saturation() -> None:
    factors = draw_parameter(draws.SATURATION, 0.2, 1.8)
    assert factors.min() < 0.5
    assert factors.max() > 1.5
    for image, result, factor in zip(IMAGES, augment_images(saturation=0.8), factors, strict=True):
        pillow = np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor), float)
        np.testing.assert_allclose(result, pillow, atol=1.6)  # Pillow rounds the grey and the result
        grey = image @ np.array([0.299, 0.587, 0.114])
        assert_equal_up_to_rounding(result, np.clip(grey[..., None] + factor * (image - grey[..., None]), 0, 255), 1e-3)


def test_hue() -> None:
    turns = draw_parameter(draws.HUE, -0.4, 0.4)
    for image, result, turn in zip(IMAGES, augment_images(hue=0.4), turns, strict=True):
        expected = [
            np.multiply(colorsys.hsv_to_rgb((h + turn) % 1, s, v), 255)
            for h, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255)
        ]
        assert_equal_up_to_rounding(result.reshape(-1, 3), expected, 0.01)


def test_stretch_is_along_the_sides_of_the_result() -> None:
    scales = np.stack([draw_parameter(what, 0.7, 1.3) for what in (draws.STRETCH_X, draws.STRETCH_Y)], axis=1)
    backwards = np.stack([np.diag(1 / scale) for scale in scales])
    assert_equal_up_to_rounding(augment_images(stretch=0.3), resample_with_scipy(backwards, STILL, "nearest"))
    expected = resample_with_scipy(
        make_rotation_matrices(np.radians(draw_parameter(draws.ROTATION, -30, 30))) @ backwards, STILL, "nearest"
    )
    assert_equal_up_to_rounding(augment_images(stretch=0.3, rotation=30), expected)


def test_two_ranges_of_rotation_add_up() -> None:
    angles = np.radians(draw_parameter(draws.ROTATION, -40, 40) + draw_parameter(draws.SECOND_ROTATION, -108, 108))
    assert_equal_up_to_rounding(
        augment_images(rotation=(40, 108), fill="reflect"),
        resample_with_scipy(make_rotation_matrices(angles), STILL, "reflect"),
    )


def test_cutout_is_a_grey_square_that_may_extend_over_the_edge() -> None:
    centres = [(draw_numbers(what) * SIDE).astype(int) for what in (draws.CUTOUT_X, draws.CUTOUT_Y)]
    expected = IMAGES.astype(np.float32)
    for image, x, y in zip(expected, *centres, strict=True):
        image[max(y - 3, 0) : y + 3, max(x - 3, 0) : x + 3] = 128
    np.testing.assert_array_equal(augment_images(cutout=6 / SIDE), expected)
    sizes = (expected != IMAGES).any(-1).sum((1, 2))
    assert sizes.min() < 30 < sizes.max() == 36


def test_draws_are_never_renumbered() -> None:
    """A resumed run would otherwise augment in another way."""
    meanings = {name: number for name, number in vars(draws).items() if name.isupper() and isinstance(number, int)}
    assert meanings == {
        "AUGMENTATION": 1, "FLIP_HORIZONTAL": 0, "FLIP_VERTICAL": 1, "ROTATION": 2, "SHIFT_X": 3, "SHIFT_Y": 4,
        "SHEAR": 5, "ZOOM": 6, "CONTRAST": 7, "BRIGHTNESS": 8, "SECOND_ROTATION": 9, "STRETCH_X": 10, "STRETCH_Y": 11,
        "CROP_AREA": 12, "CROP_ASPECT": 13, "CROP_X": 14, "CROP_Y": 15, "SATURATION": 16, "HUE": 17, "CUTOUT_X": 18,
        "CUTOUT_Y": 19, "MIX": 20, "MIX_METHOD": 21, "CUTMIX_X": 22, "CUTMIX_Y": 23, "NUM_DRAWS": 24, "NUM_LEVELS": 4096,
        "RANDAUGMENT": 1000,
    }  # fmt: skip


GROUPS = sorted(path.stem for path in (ROOT / "conf" / "augmentation").glob("*.yaml"))


def compose_augmentation(name: str) -> Augmentation:
    """The augmentation group, composed as by the command line."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config", ["data=digits", f"augmentation={name}"]), resolve=True)
    assert isinstance(tree, dict)
    return validate_config({str(key): value for key, value in tree.items()}).augmentation


UNWARPED: dict[str, object] = {"rotation": 0.0, "shift": 0.0, "shear": 0.0, "zoom": 0.0, "stretch": 0.0}


@pytest.mark.parametrize(
    "changes",
    # Quick: one operation of RandAugment per image, whose graph has all operations, where the slow ones apply three.
    [
        pytest.param({}, id="affine", marks=pytest.mark.slow),
        pytest.param(UNWARPED, id="crop", marks=pytest.mark.slow),
        pytest.param({"randaugment": 1}, id="affine with one operation"),
        pytest.param({"randaugment": 1, **UNWARPED}, id="crop with one operation"),
    ],
)
def test_the_same_bits_in_any_batch(changes: dict[str, object]) -> None:
    epoch, augmentation = np.full(COUNT, EPOCH), EVERYTHING.model_copy(update=changes)
    # Compiled for each size, as a pipeline is: the optimizer of graphs may round otherwise than eager execution.
    compiled = tf.function(
        lambda images, epoch, index: augment(images, augmentation, SEED, epoch, index), autograph=False
    )
    whole = compiled(tf.constant(IMAGES), tf.constant(epoch), tf.constant(INDEX)).numpy()
    for rows in ([5], list(range(COUNT))[::-1] * 3):
        some = compiled(tf.constant(IMAGES[rows]), tf.constant(epoch[:1].repeat(len(rows))), tf.constant(INDEX[rows]))
        np.testing.assert_array_equal(some, whole[rows])


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_composes_and_changes_every_image(name: str) -> None:
    augmentation = compose_augmentation(name)
    assert augmentation.active == (name != "none")
    changed = np.abs(augment_images(**augmentation.model_dump()) - IMAGES).mean((1, 2, 3)) > 1
    assert changed.mean() == (0 if name == "none" else 1)


@pytest.mark.parametrize(("seed", "epoch", "shift"), [(12, 3, 0), (11, 4, 0), (11, 3, 1000)])
def test_other_coordinates_give_other_images(seed: int, epoch: int, shift: int) -> None:
    first = augment_images(**EVERYTHING.model_dump())
    other = augment(tf.constant(IMAGES), EVERYTHING, seed, np.full(COUNT, epoch), INDEX + shift).numpy()
    assert (np.abs(other - first).mean((1, 2, 3)) > 1).all()


def test_operations_that_are_off_are_not_in_the_graph() -> None:
    def operations(augmentation: Augmentation) -> set[str]:
        signature = [tf.TensorSpec([4, 8, 8, 3], tf.uint8)] + [tf.TensorSpec([4], tf.int64)] * 2
        made = tf.function(lambda x, e, i: augment(x, augmentation, 1, e, i), input_signature=signature)
        graph = made.get_concrete_function().graph
        own, nested = list(graph.get_operations()), graph.as_graph_def().library.function
        return {op.type for op in own} | {node.op for function in nested for node in function.node_def}

    computing = {"Floor", "GatherV2", "Sum", "Maximum", "Pad", "RealDiv"}
    assert operations(Augmentation()) == {"Placeholder", "Identity"}
    flipping = operations(Augmentation(flip_horizontal=True))
    assert "ReverseV2" in flipping
    assert not flipping & computing
    for changes, expected in (
        ({"rotation": 5}, set()),
        ({"rotation": 5, "fill": "reflect"}, {"Floor"}),
        ({"rotation": 5, "fill": "constant"}, {"Pad"}),
        ({"brightness": 0.1}, set()),
        ({"contrast": 0.1}, {"Sum", "RealDiv"}),
        ({"hue": 0.1}, {"Floor", "RealDiv"}),
    ):
        names = operations(Augmentation(**changes))  # type: ignore[arg-type]
        assert names & computing == {"GatherV2", "Maximum"} | expected
        assert "DynamicPartition" not in names
    assert "DynamicPartition" in operations(Augmentation(randaugment=1))
