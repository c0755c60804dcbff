"""The whole order of an epoch."""

import numpy as np
import tensorflow as tf

from trainer.data.order import windows
from trainer.types import Split


def epoch_order(split: Split, seed: int, epoch: int, window: int) -> np.ndarray:
    """The indices of the examples in the order of an epoch, int64 [count]: a permutation."""
    count, part = windows(split, seed, window)
    parts = [part(tf.constant(epoch, tf.int64), tf.constant(n, tf.int64)).index.numpy() for n in range(count)]
    return np.concatenate([np.zeros(0, np.int64), *parts])
