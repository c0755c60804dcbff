"""Stateless random numbers: pure functions of integer coordinates.

Shuffling, augmentation and dropout use the seed, the epoch or step, and the example index as coordinates. The numbers
are therefore the same after a restart, on another worker, or with another sharding. The SplitMix64 finalizer mixes in
each coordinate (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import tensorflow as tf

# One coordinate identifies the use. Without it, two uses with equal coordinates would get equal numbers.
AUGMENTATION, DROPOUT, ORDER, SHARDS, SUBSET = 1, 2, 3, 4, 5

_INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # these three as signed integers
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shift_right(x: tf.Tensor, count: int) -> tf.Tensor:
    """Shift int64 values right by `count` bits, filling with zeros."""
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, tf.constant(count, tf.int64)), 2 ** (64 - count) - 1)


def _mix(x: tf.Tensor) -> tf.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def random_bits(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Return 64 random bits as int64, per element of the broadcast int64 coordinates.

    The mixing is bijective, so tuples that differ only in the last coordinate always give different bits.
    """
    state = tf.zeros([], tf.int64)
    for coordinate in coordinates:
        state = _mix((state ^ tf.cast(coordinate, tf.int64)) + _INCREMENT)
    return state


def random_uniform(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Return uniform float32 numbers in [0, 1), per element of the broadcast int64 coordinates."""
    return tf.cast(_shift_right(random_bits(*coordinates), 40), tf.float32) * 2.0**-24
