"""Random numbers for the augmentation of a batch, and the values that they select."""

import numpy as np
import tensorflow as tf

from trainer.stateless_random import AUGMENTATION, random_uniform

# Index of the draw for each purpose. Other indices would change the images of every run.
FLIP_HORIZONTAL, FLIP_VERTICAL, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, CONTRAST, BRIGHTNESS = range(9)
SECOND_ROTATION, STRETCH_X, STRETCH_Y, CROP_AREA, CROP_ASPECT, CROP_X, CROP_Y = range(9, 16)
SATURATION, HUE, CUTOUT_X, CUTOUT_Y, MIX, MIX_KIND, CUTMIX_X, CUTMIX_Y = range(16, 24)
DRAW_COUNT = 24
RANDAUGMENT = 1000  # first draw of RandAugment: 1000 + 2 k selects operation k of an image, 1001 + 2 k its direction

# Parameters have this many possible values, and functions such as sin are computed per value, in NumPy: TensorFlow
# uses different instructions for long and short vectors, so the last bit would depend on the batch size.
LEVELS = 4096


def tabulate_levels(low: float, high: float) -> np.ndarray:
    """Return the values of a uniform parameter, the midpoints of LEVELS equal intervals of [low, high], float64."""
    return low + (high - low) * (np.arange(LEVELS) + 0.5) / LEVELS


class Draws:
    """Random numbers per example of a batch, which do not depend on the other examples."""

    def __init__(self, seed: int, epoch: tf.Tensor, index: tf.Tensor, first: int = 0, count: int = DRAW_COUNT) -> None:
        """Compute draws `first` to `first` + `count` - 1 of each example. `index` and `epoch` are int64 [b]."""
        epoch, index = (tf.cast(tensor, tf.int64)[:, None] for tensor in (epoch, index))
        self.first = first
        draws = tf.range(first, first + count, dtype=tf.int64)
        self.numbers = random_uniform(seed, AUGMENTATION, epoch, index, draws)  # float32 [b, count]

    def uniform(self, draw: int) -> tf.Tensor:
        """Return uniform float32 [b] in [0, 1)."""
        return self.numbers[:, draw - self.first]

    def coin(self, draw: int) -> tf.Tensor:
        """Return bool [b], true with probability 1/2."""
        return self.uniform(draw) < 0.5

    def select(self, draw: int, values: np.ndarray) -> tf.Tensor:
        """Return one of `values` [LEVELS] per example, equally likely, float32 [b]."""
        indices = tf.cast(self.uniform(draw) * LEVELS, tf.int32)
        return tf.gather(tf.constant(values, tf.float32), indices)
