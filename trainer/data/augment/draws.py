"""Draw random numbers for augmenting a batch, and select augmentation parameters with them."""

import numpy as np
import tensorflow as tf

from trainer.stateless_random import AUGMENTATION, random_uniform

# Draw of each operation: the index of its random number. Another index would change the images of existing runs.
FLIP_HORIZONTAL, FLIP_VERTICAL, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, CONTRAST, BRIGHTNESS = range(9)
SECOND_ROTATION, STRETCH_X, STRETCH_Y, CROP_AREA, CROP_ASPECT, CROP_X, CROP_Y = range(9, 16)
SATURATION, HUE, CUTOUT_X, CUTOUT_Y, MIX, MIX_METHOD, CUTMIX_X, CUTMIX_Y = range(16, 24)
NUM_DRAWS = 24  # number of draws, except those of RandAugment
RANDAUGMENT = 1000  # first draw of RandAugment: 1000 + 2 k selects an image's operation k, 1001 + 2 k its direction

# Number of possible values of a parameter. Functions such as sin are tabulated for these values in NumPy, because
# TensorFlow uses different instructions for long and short vectors, and the last bit would depend on the batch size.
NUM_LEVELS = 4096


def tabulate_levels(low: float, high: float) -> np.ndarray:
    """Return the midpoints of equal intervals of [low, high], float64 [NUM_LEVELS], for `RandomDraws.select`."""
    return low + (high - low) * (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS


class RandomDraws:
    """Random numbers for each example of a batch, which do not depend on the other examples."""

    def __init__(self, seed: int, epoch: tf.Tensor, index: tf.Tensor, first: int = 0, count: int = NUM_DRAWS) -> None:
        """Compute the draws `first` to `first` + `count` - 1 of each example.

        Args:
            epoch: epoch of each example, int64 [b].
            index: example index in the split, int64 [b].
        """
        epoch, index = (tf.cast(tensor, tf.int64)[:, None] for tensor in (epoch, index))
        self.first = first
        draws = tf.range(first, first + count, dtype=tf.int64)
        self.numbers = random_uniform(seed, AUGMENTATION, epoch, index, draws)  # float32 [b, count]

    def uniform(self, draw: int) -> tf.Tensor:
        """Return each example's random number with the index `draw`, float32 [b], uniform in [0, 1)."""
        return self.numbers[:, draw - self.first]

    def coin(self, draw: int) -> tf.Tensor:
        """Return a random bool per example, [b], which is True if its number with the index `draw` is below 1/2."""
        return self.uniform(draw) < 0.5

    def select(self, draw: int, values: np.ndarray) -> tf.Tensor:
        """Select one of `values`, float [NUM_LEVELS], per example, all with equal probability. Return float32 [b]."""
        indices = tf.cast(self.uniform(draw) * NUM_LEVELS, tf.int32)
        return tf.gather(tf.constant(values, tf.float32), indices)
