"""Named arrays as bytes: no damage goes unnoticed, and each is a ValueError."""

import contextlib

import numpy as np
import pytest

from trainer.storage.arrays import pack, unpack


def test_arrays_survive_and_any_damage_is_a_value_error() -> None:
    arrays = {"a": np.arange(5, dtype=np.int32), "b": np.zeros((2, 0), np.float32)}
    content = pack(arrays)
    np.testing.assert_equal(unpack(content), arrays)
    for position in range(len(content)):
        for bit in (1, 64):
            damaged = bytearray(content)
            damaged[position] ^= bit
            with contextlib.suppress(ValueError):
                for name, values in unpack(bytes(damaged)).items():  # perhaps not all of them
                    np.testing.assert_array_equal(values, arrays[name])
    for length in (0, 1, 30, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match="no arrays"):
            unpack(content[:length])
