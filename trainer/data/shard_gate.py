"""The wait for shards before a pipeline opens them.

A pipeline cannot wait for a file: no Python may stand in it (`trainer.data.order`), and a file that is not there would
count as lost records. So the host waits, at a gate before each batch or device call, for every shard that the pipeline
can open until the next gate. They follow from the order alone: `order.block_reads` evaluates on the host the function
from which the pipeline makes its blocks.
"""

import os
from collections import deque
from collections.abc import Iterator

from trainer.data.order import Read
from trainer.errors import DataError
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

# Blocks behind the one of the last row that was pulled whose shards may be open. Blocks are read by one thread, into
# the `prefetch(1)` of `decoding._with_records`: while rows of block b are pulled, b + 1 is read and then lies there,
# and b + 2 is not begun before b + 1 is taken out, which is when the first row behind b is pulled.
BLOCKS_AHEAD = 1


def rows_ahead(size: int, threads: int, elements: int) -> int:
    """The number of rows that a pipeline may have pulled beyond those that were taken from it.

    Args:
        size: rows of an element.
        threads: that decode in parallel, a row each.
        elements: that fit the buffers behind `batch`; one more is on its way into each of the stages.
    """
    # Where TensorFlow fuses map and batch it works on ceil(threads / size) batches at once, and one is being taken.
    return (elements + 4) * size + 2 * threads


class LocalShards:
    """Shards, by path, that nobody has to fetch. They must still be there: a pipeline that skips what it cannot read
    tries for ever to open a file that is gone.
    """

    budget = 0  # nothing is fetched ahead

    def require(self, reader: str, paths: list[str], then: list[str]) -> float:  # noqa: ARG002 - as `ShardCache.require`
        """Raises DataError for a shard that cannot be opened; returns 0 seconds of waiting."""
        for path in paths:
            try:
                open(path, "rb").close()
            except OSError as error:
                raise DataError(
                    f"{path}: {error.strerror}, though it was there when the run began; put it back and run the same "
                    "command again to go on"
                ) from None
        return 0.0

    def release(self, reader: str) -> None:
        """Nothing was held."""


class ShardGate:
    """The gate of one pipeline over a split; without shards to wait for it is open."""

    def __init__(
        self, shards: ShardCache | LocalShards | None, split: Split, reader: str, reads: Iterator[Read], ahead: int
    ) -> None:
        """`reader`: its name to the cache; `reads`: the blocks of the pipeline; `ahead`: see `rows_ahead`."""
        self.shards, self.reader, self.split, self.ahead, self._reads = shards, reader, split, ahead, reads
        fetched = isinstance(shards, ShardCache)
        self._names = [os.path.basename(shard.path) if fetched else shard.path for shard in split.shards]
        self._blocks: deque[tuple[int, list[str]]] = deque()  # row behind the block, its shards
        self._number = 0  # of the first of them
        self._taken = self._rows = 0  # rows taken from the pipeline; rows of all blocks so far
        self._open = (-1, -1)  # numbers of the first and last block that the gate is open for

    def wait_for(self, rows: int) -> float:
        """The next `rows` rows are about to be taken: wait until all that the pipeline can open meanwhile is here.

        Returns:
            seconds waited.

        Raises:
            As `ShardCache.require`.
        """
        if self.shards is None:
            return 0.0
        while self._blocks and self._blocks[0][0] <= self._taken:
            self._blocks.popleft()
            self._number += 1
        self._taken += rows
        number = 0  # of the block that holds the last row that may be pulled
        while self._has(number) and self._blocks[number][0] <= self._taken + self.ahead:
            number += 1
        last = number + BLOCKS_AHEAD
        if (self._number, self._number + last) == self._open:
            return 0.0
        names, then = self._shards_until(last)
        waited = self.shards.require(self.reader, names, then)
        self._open = (self._number, self._number + last)
        return waited

    def close(self) -> None:
        """Release the shards: the pipeline is gone."""
        if self.shards is not None:
            self.shards.release(self.reader)

    def _has(self, number: int) -> bool:
        """Whether there is a block at this position of `_blocks`, which is read up to there."""
        while number >= len(self._blocks):
            read = next(self._reads, None)
            if read is None:
                return False
            self._rows += read[0]
            self._blocks.append((self._rows, [self._names[shard] for shard in read[1]]))
        return True

    def _shards_until(self, last: int) -> tuple[list[str], list[str]]:
        """The shards of the blocks up to `last`, and those after them: as many as the cache holds, or of one epoch."""
        assert self.shards is not None
        self._has(last)
        now = dict.fromkeys(name for _, names in list(self._blocks)[: last + 1] for name in names)
        seen, size, rows, number = dict(now), 0, 0, last + 1
        while size < self.shards.budget and rows < self.split.count and self._has(number):
            assert isinstance(self.shards, ShardCache)  # the others have no budget
            for name in self._blocks[number][1]:
                size += 0 if name in seen else self.shards.entries[name].size
                seen[name] = None
            rows = self._blocks[number][0] - self._blocks[last][0]
            number += 1
        return list(now), [name for name in seen if name not in now]
