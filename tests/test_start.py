"""What a run says at its start."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.contracts import Shard, Split
from trainer.start import _own_shards

WHOLE = tuple(Shard(f"{name}.tfrecord", 10, 0, 10) for name in "abcd")
# As debug.max_examples leaves it: single records out of two files.
PIECES = tuple(Shard(f"{name}.tfrecord", 10, at, at + 1) for name in "ab" for at in (0, 3, 5, 9))


@pytest.mark.parametrize(
    ("shards", "expected"), [(WHOLE, (2, 4, 20, 40)), (PIECES, (2, 2, 4, 8)), (PIECES[:4], (1, 1, 2, 4))]
)
def test_shards_are_counted_by_file(shards: tuple[Shard, ...], expected: tuple[int, int, int, int]) -> None:
    records = sum(shard.stop - shard.start for shard in shards)
    assert _own_shards(Split("train", np.zeros(records, np.int32), shards=shards), 2, 0) == expected
