"""Stateless random numbers: the same for numbers and tensors, and different for each tuple of coordinates."""

import random

import numpy as np
import pytest
import tensorflow as tf

from trainer.stateless_random import random_bits, random_uniform

FIRST = -2152535657050944081  # of SplitMix64 with seed 0, as a signed integer


def test_the_first_number_is_that_of_splitmix64() -> None:
    """The reference implementation (Vigna 2015) begins with 0xE220A8397B1DCDAF for seed 0."""
    assert int(random_bits(0)) == FIRST == 0xE220A8397B1DCDAF - 2**64
    assert int(random_bits(tf.constant(0, tf.int64))) == FIRST


@pytest.mark.parametrize("seed", range(20))
def test_a_coordinate_is_a_number_or_a_tensor(seed: int) -> None:
    draw = random.Random(seed)
    numbers = [draw.choice([draw.randrange(10), draw.randrange(-(2**63), 2**63)]) for _ in range(4)]
    index = tf.range(5, dtype=tf.int64) * draw.randrange(1, 10**9)
    expected = random_bits(*(tf.constant(number, tf.int64) for number in numbers), index).numpy()
    for tensors in range(4):  # the last ones of the numbers are tensors
        mixed = [n if i < 4 - tensors else tf.constant(n, tf.int64) for i, n in enumerate(numbers)]
        np.testing.assert_array_equal(random_bits(*mixed, index), expected)
    assert len(set(expected.tolist())) == 5
    uniform = random_uniform(*numbers, index).numpy()
    assert uniform.dtype == np.float32
    assert ((uniform >= 0) & (uniform < 1)).all()
