"""Random numbers of the examples of a batch, and the augmentation values computed from them."""

import numpy as np
import tensorflow as tf

from trainer.stateless_random import AUGMENTATION, uniform

# Purpose of each draw. Renumbering would change the images of every run.
FLIP_HORIZONTAL, FLIP_VERTICAL, ROTATION, SHIFT_X, SHIFT_Y, SHEAR, ZOOM, CONTRAST, BRIGHTNESS = range(9)
SECOND_ROTATION, STRETCH_X, STRETCH_Y, CROP_AREA, CROP_ASPECT, CROP_X, CROP_Y = range(9, 16)
SATURATION, HUE, CUTOUT_X, CUTOUT_Y, MIX, MIX_KIND, CUTMIX_X, CUTMIX_Y = range(16, 24)
DRAWS = 24
RANDAUGMENT = 1000  # the k-th operation of an image is drawn with 1000 + 2 k, its direction with 1001 + 2 k

# Draws are quantized to this many levels, and functions such as sin come from a table: TensorFlow computes them with
# other instructions for long vectors than for short ones, so that the last bit would depend on the batch size.
LEVELS = 4096


def levels(low: float, high: float) -> np.ndarray:
    """Return the possible values of a draw, the midpoints of equal intervals of [low, high], float64 [LEVELS]."""
    return low + (high - low) * (np.arange(LEVELS) + 0.5) / LEVELS


class Draws:
    """Random numbers of the examples of a batch, each independent of the other examples."""

    def __init__(self, seed: int, epoch: tf.Tensor, index: tf.Tensor, first: int = 0, count: int = DRAWS) -> None:
        """Compute draws `first` to `first` + `count` - 1 of the examples `index` in epochs `epoch`, both int64 [b]."""
        epoch, index = (tf.cast(tensor, tf.int64)[:, None] for tensor in (epoch, index))
        self.first = first
        numbers = tf.range(first, first + count, dtype=tf.int64)
        self.numbers = uniform(seed, AUGMENTATION, epoch, index, numbers)  # [b, count]

    def uniform(self, kind: int) -> tf.Tensor:
        """Return float32 [b] in [0, 1)."""
        return self.numbers[:, kind - self.first]

    def coin(self, kind: int) -> tf.Tensor:
        """Return bool [b], true with probability 1/2."""
        return self.uniform(kind) < 0.5

    def of(self, kind: int, values: np.ndarray) -> tf.Tensor:
        """Return float32 [b], one of `values` [LEVELS] per example."""
        level = tf.cast(self.uniform(kind) * LEVELS, tf.int32)
        return tf.gather(tf.constant(values, tf.float32), level)
