"""Images of noise, and the random numbers that are drawn for them."""

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.draws import NUM_LEVELS, tabulate_levels
from trainer.stateless_random import AUGMENTATION, random_uniform

SIDE, COUNT, SEED, EPOCH = 16, 12, 11, 3
INDEX = np.arange(100, 100 + COUNT)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def augment_images(images: np.ndarray = IMAGES, **changes: object) -> np.ndarray:
    """Images uint8 [n, S, S, 3] augmented as the examples `INDEX` in `EPOCH`, n <= COUNT; bytes as float32."""
    count = len(images)
    options = Augmentation(**changes)  # type: ignore[arg-type]
    result = augment(tf.constant(images), options, SEED, np.full(count, EPOCH), INDEX[:count])
    assert result.dtype == tf.uint8
    return result.numpy().astype(np.float32)


def assert_equal_up_to_rounding(rounded: np.ndarray, expected: np.ndarray, error: float = 0.02) -> None:
    np.testing.assert_allclose(rounded, expected, rtol=0, atol=0.5 + error)


def draw_numbers(kind: int) -> np.ndarray:
    """The uniform number of each example for one purpose."""
    return random_uniform(SEED, AUGMENTATION, EPOCH, INDEX, kind).numpy()


def draw_parameter(kind: int, low: float, high: float) -> np.ndarray:
    """The value of each example between two bounds."""
    return tabulate_levels(low, high)[draw_level(kind)]


def draw_level(kind: int) -> np.ndarray:
    """The position of each example's number in a table of values."""
    return (draw_numbers(kind) * NUM_LEVELS).astype(int)
