"""The random numbers of the examples of a batch, and the values made of them."""

import numpy as np
import tensorflow as tf

from trainer.stateless_random import AUGMENTATION, uniform

# What each draw is for. A number keeps its meaning for ever: another one gives other pictures.
FLIP_HORIZONTAL, FLIP_VERTICAL, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, CONTRAST, BRIGHTNESS = range(9)
SECOND_ROTATION, STRETCH_X, STRETCH_Y, CROP_AREA, CROP_ASPECT, CROP_X, CROP_Y = range(9, 16)
SATURATION, HUE, CUTOUT_X, CUTOUT_Y, MIX, MIX_KIND, CUTMIX_X, CUTMIX_Y = range(16, 24)
DRAWS = 24
RANDAUGMENT = 1000  # of the operation k that an image goes through: which one 1000 + 2 k, its sign 1001 + 2 k

# Draws are rounded to this many levels, so that sines and the like come from a table made once. TensorFlow computes
# them with other instructions for a long vector than for a short one: the last bit would depend on the batch size.
LEVELS = 4096


def levels(low: float, high: float) -> np.ndarray:
    """The values a draw can take: float64 [LEVELS], the middles of equal parts of [low, high]."""
    return low + (high - low) * (np.arange(LEVELS) + 0.5) / LEVELS


class Draws:
    """The random numbers of the examples of a batch; a draw's value depends on its own example alone."""

    def __init__(self, seed: int, epoch: tf.Tensor, index: tf.Tensor, first: int = 0, count: int = DRAWS) -> None:
        """Draws `first` to `first` + `count` - 1 of the examples `index`, int64 [b], in the epochs `epoch`."""
        epoch, index = (tf.cast(tensor, tf.int64)[:, None] for tensor in (epoch, index))
        self.first = first
        numbers = tf.range(first, first + count, dtype=tf.int64)
        self.numbers = uniform(seed, AUGMENTATION, epoch, index, numbers)  # [b, count]

    def uniform(self, what: int) -> tf.Tensor:
        """Float32 [b] in [0, 1)."""
        return self.numbers[:, what - self.first]

    def coin(self, what: int) -> tf.Tensor:
        """Bool [b], true for half of all examples."""
        return self.uniform(what) < 0.5

    def of(self, what: int, values: np.ndarray) -> tf.Tensor:
        """Float32 [b], one of `values` [LEVELS] for each example."""
        level = tf.cast(self.uniform(what) * LEVELS, tf.int32)
        return tf.gather(tf.constant(values, tf.float32), level)
