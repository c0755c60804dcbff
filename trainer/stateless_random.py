"""Stateless random numbers: pure functions of integer coordinates.

Shuffling, augmentation and dropout use the seed, the epoch or step, and the example index as coordinates. Therefore the
numbers are the same after a restart, on another worker, or with another sharding. Each coordinate is mixed into the
state by the SplitMix64 finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from typing import TypeVar

import tensorflow as tf

# Coordinates that identify what the numbers are used for. Without one, two uses whose other coordinates are equal would
# get equal numbers.
AUGMENTATION, DROPOUT, ORDER, SHARDS, SUBSET = 1, 2, 3, 4, 5

# The constants of SplitMix64 as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1, _MULTIPLIER_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

Bits = TypeVar("Bits", int, tf.Tensor)  # a Python integer in the range of int64, or an int64 tensor


def _wrap(x: Bits) -> Bits:
    """Wrap a sum or product of Python integers to the range of int64, as operations on int64 tensors do."""
    return (x + 2**63) % 2**64 - 2**63 if isinstance(x, int) else x


def _shift_right(x: Bits, count: int) -> Bits:
    """Shift 64 bits to the right by `count` >= 1, and fill with zeros (a logical shift)."""
    mask = 2 ** (64 - count) - 1
    if isinstance(x, int):
        return x >> count & mask
    return tf.bitwise.bitwise_and(tf.bitwise.right_shift(x, tf.constant(count, tf.int64)), mask)


def _mix(x: Bits) -> Bits:
    """Apply SplitMix64's finalizer, a bijection of 64 bits in which each bit of the result depends on each bit of x."""
    x = _wrap((x ^ _shift_right(x, 30)) * _MULTIPLIER_1)
    x = _wrap((x ^ _shift_right(x, 27)) * _MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def random_bits(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Return 64 random bits for each tuple of coordinates.

    The mixing is bijective, so tuples that differ only in the last coordinate always have different bits.

    Args:
        coordinates: Python integers, or integer tensors of broadcastable shapes.

    Returns:
        int64, of the broadcast shape of the coordinates.
    """
    state: int | tf.Tensor = 0
    for coordinate in coordinates:  # leading Python integers are mixed now, without graph operations
        if isinstance(state, int) and isinstance(coordinate, int):
            state = _mix(_wrap((state ^ coordinate) + _INCREMENT))
        else:
            state = _mix((tf.cast(state, tf.int64) ^ tf.cast(coordinate, tf.int64)) + _INCREMENT)
    return tf.constant(state, tf.int64) if isinstance(state, int) else state


def random_uniform(*coordinates: tf.Tensor | int) -> tf.Tensor:
    """Return uniform random numbers in [0, 1), float32 of the broadcast shape of the integer coordinates."""
    return tf.cast(_shift_right(random_bits(*coordinates), 40), tf.float32) * 2.0**-24
