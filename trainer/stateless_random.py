"""Random numbers that depend on nothing but their coordinates.

Every random choice of a run (order, augmentation, dropout) is a function of the seed and of where it is used, so
that it can be made again after a kill, on another worker, or in another batch split. The mixer is SplitMix64's
finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

import tensorflow as tf

# Streams keep apart what would otherwise share coordinates.
AUGMENTATION, DROPOUT, ORDER, SHARDS, SHARE = 1, 2, 3, 4, 5


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: tf.Tensor, bits: int) -> tf.Tensor:
    """Logical shift of an int64."""
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, tf.constant(bits, tf.int64)), 2 ** (64 - bits) - 1)


def _mix(x: tf.Tensor) -> tf.Tensor:
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def bits(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """64 random bits (int64), for each element of the coordinates broadcast together (int64).

    Coordinates that differ in the last one alone give different bits.
    """
    state = tf.zeros([], tf.int64)
    for coordinate in coordinates:
        state = _mix((state ^ tf.cast(coordinate, tf.int64)) + _GOLDEN)
    return state


def uniform(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Float32 in [0, 1), one for each element of the coordinates broadcast together (int64)."""
    return tf.cast(_shift_right(bits(*coordinates), 40), tf.float32) * 2.0**-24
