"""The wait for shards before a pipeline opens them.

A pipeline cannot wait for a file itself: it contains no Python (`trainer.data.order`), and a missing file counts as
lost records. So before each batch or device call the host waits at a gate for every shard that the pipeline can open
until the next gate. `order.block_reads` computes those shards with the function that the pipeline uses for its blocks.
"""

import os
from collections import deque
from collections.abc import Iterator

from trainer.data.order import Read
from trainer.errors import DataError
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

# Blocks after that of the last row pulled whose shards may be open. One thread reads blocks into the `prefetch(1)` of
# `decoding._with_records`: while rows of block b are pulled, b + 1 is read and then buffered. Reading b + 2 begins when
# b + 1 leaves the buffer, which is when its first row is pulled.
BLOCKS_AHEAD = 1


def rows_ahead(size: int, threads: int, elements: int) -> int:
    """Return how many rows a pipeline may have pulled beyond those taken from it.

    An element has `size` rows; `threads` decode a row each; buffers after `batch` hold `elements`, and each stage one.
    """
    # Where TensorFlow fuses map and batch it works on ceil(threads / size) batches at once, and one is being taken.
    return (elements + 4) * size + 2 * threads


class LocalShards:
    """Shards on local disks, by path; a pipeline that skips unreadable examples retries a missing shard forever."""

    budget = 0  # nothing is prefetched

    def require(self, reader: str, paths: list[str], then: list[str]) -> float:  # noqa: ARG002 - as `ShardCache.require`
        """Raise a DataError for a shard that cannot be opened; return 0 seconds of waiting."""
        for path in paths:
            try:
                open(path, "rb").close()
            except OSError as error:
                problem = f"{path}: {error.strerror}, but it existed when the run began"
                raise DataError(problem, fix="restore the file and start the same command again to resume") from None
        return 0.0

    def release(self, reader: str) -> None:
        """Do nothing: no shard is held."""


class ShardGate:
    """The gate of one pipeline over a split; without shards it is always open."""

    def __init__(
        self, shards: ShardCache | LocalShards | None, split: Split, reader: str, reads: Iterator[Read], ahead: int
    ) -> None:
        """`reader`: name of the pipeline in the cache; `reads`: its blocks; `ahead`: see `rows_ahead`."""
        self.shards, self.reader, self.split, self.ahead, self._reads = shards, reader, split, ahead, reads
        is_cached = isinstance(shards, ShardCache)
        self._names = [os.path.basename(shard.path) if is_cached else shard.path for shard in split.shards]
        self._blocks: deque[tuple[int, list[str]]] = deque()  # number of the row after the block, its shards
        self._number = 0  # of the first block of `_blocks`
        self._taken = self._rows = 0  # rows taken from the pipeline; rows of all blocks so far
        self._open = (-1, -1)  # numbers of the first and last block that the gate is open for

    def wait_for(self, rows: int) -> float:
        """Wait for every shard that the pipeline can open while `rows` more rows are taken; return the seconds waited.

        Raises:
            As `ShardCache.require`.
        """
        if self.shards is None:
            return 0.0
        while self._blocks and self._blocks[0][0] <= self._taken:
            self._blocks.popleft()
            self._number += 1
        self._taken += rows
        position = 0  # of the block with the last row that may be pulled
        while self._has_block(position) and self._blocks[position][0] <= self._taken + self.ahead:
            position += 1
        last = position + BLOCKS_AHEAD
        if (self._number, self._number + last) == self._open:
            return 0.0
        waited = self.shards.require(self.reader, *self._shards_until(last))
        self._open = (self._number, self._number + last)
        return waited

    def close(self) -> None:
        """Release the shards after the pipeline is deleted."""
        if self.shards is not None:
            self.shards.release(self.reader)

    def _has_block(self, position: int) -> bool:
        """Extend `_blocks` up to this position; False at the end of the reads."""
        while position >= len(self._blocks):
            read = next(self._reads, None)
            if read is None:
                return False
            self._rows += read[0]
            self._blocks.append((self._rows, [self._names[shard] for shard in read[1]]))
        return True

    def _shards_until(self, last: int) -> tuple[list[str], list[str]]:
        """Return the shards of the blocks up to `last`, and later ones: as many as the cache holds, or of one epoch."""
        assert self.shards is not None
        self._has_block(last)
        now = dict.fromkeys(name for _, names in list(self._blocks)[: last + 1] for name in names)
        seen, size, rows, position = dict(now), 0, 0, last + 1
        while size < self.shards.budget and rows < self.split.count and self._has_block(position):
            assert isinstance(self.shards, ShardCache)  # local shards have no budget
            for name in self._blocks[position][1]:
                size += 0 if name in seen else self.shards.entries[name].size
                seen[name] = None
            rows = self._blocks[position][0] - self._blocks[last][0]
            position += 1
        return list(now), [name for name in seen if name not in now]
