"""How workers divide device calls."""

import numpy as np
import pytest

from trainer.data.order import split_by_device_calls


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 90, 256])
def test_the_position_of_an_image_in_its_call_does_not_depend_on_workers(count: int, workers: int) -> None:
    indices = np.arange(64, 64 + count)
    shards = split_by_device_calls(indices, 32, workers)
    assert len(shards) == workers
    np.testing.assert_array_equal(np.concatenate(shards), indices)
    assert all(len(shard) <= len(shards[0]) for shard in shards)
    for shard in shards:
        np.testing.assert_array_equal(np.arange(len(shard)) % 32, (shard - 64) % 32)
