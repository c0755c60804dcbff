"""The complete order of an epoch, and the comparison of batches."""

import numpy as np
import tensorflow as tf

from trainer.data.order import plan_windows
from trainer.types import Split

Batches = list[dict[str, np.ndarray]]


def compute_epoch_order(split: Split, seed: int, epoch: int, window: int) -> np.ndarray:
    """Example indices in the order of an epoch, int64 [count]."""
    count, make = plan_windows(split, seed, window)
    indices = [make(tf.constant(epoch, tf.int64), tf.constant(n, tf.int64))[2].numpy() for n in range(count)]
    return np.concatenate([np.zeros(0, np.int64), *indices])


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
