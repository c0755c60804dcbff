"""Stateless random numbers: functions of their coordinates alone.

Every random choice of a run (order, augmentation, dropout) is a function of the seed and the coordinates of its use, so
it is reproducible after a restart, on another worker, or with another sharding. The mixing function is the finalizer of
SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import tensorflow as tf

# One stream per use: two uses may have equal coordinates.
AUGMENTATION, DROPOUT, ORDER, SHARDS, SUBSET = 1, 2, 3, 4, 5


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: tf.Tensor, bits: int) -> tf.Tensor:
    """Logical right shift of an int64."""
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, tf.constant(bits, tf.int64)), 2 ** (64 - bits) - 1)


def _mix(x: tf.Tensor) -> tf.Tensor:
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def bits(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """64 random bits, int64, per element of the int64 coordinates after broadcasting.

    Coordinates that differ in the last one only have different bits.
    """
    state = tf.zeros([], tf.int64)
    for coordinate in coordinates:
        state = _mix((state ^ tf.cast(coordinate, tf.int64)) + _GOLDEN)
    return state


def uniform(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Uniform float32 in [0, 1), per element of the int64 coordinates after broadcasting."""
    return tf.cast(_shift_right(bits(*coordinates), 40), tf.float32) * 2.0**-24
