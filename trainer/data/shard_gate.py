"""Wait on the host for shards before a pipeline opens them.

A pipeline cannot wait for a file, because it contains no Python (see `trainer.data.order`) and treats a missing file as
unreadable records. So before the host takes rows from a pipeline, it waits at a gate for every shard that the pipeline
can open before the next wait. The shards of each block are computed by the function that computes the pipeline's blocks
(`trainer.data.order.compute_block_shards`).
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence

from trainer.data.order import BlockShards
from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

# Number of blocks after the block of the last pulled row whose shards can be open. One thread reads blocks into the
# `prefetch(1)` of `trainer.data.decoding._add_records`. While the rows of block b are pulled, block b + 1 is read and
# buffered. The thread starts to read block b + 2 when block b + 1 leaves the buffer: when its first row is pulled.
BLOCKS_AHEAD = 1


def compute_max_rows_ahead(size: int, threads: int, elements: int) -> int:
    """Return the maximum number of rows that a pipeline has pulled from its blocks, but has not yet delivered.

    Args:
        size: rows per element.
        threads: number of rows that are decoded in parallel.
        elements: number of elements in the buffers after `batch`, without the one that each transformation holds.
    """
    # If TensorFlow fuses map and batch, it fills ceil(threads / size) batches concurrently while it delivers another.
    return (elements + 4) * size + 2 * threads


class LocalShards:
    """Local shards, identified by path, with the part of `ShardCache`'s interface that a gate uses.

    The gate checks that shards can be opened, because a pipeline that skips unreadable examples retries a missing shard
    forever.
    """

    budget = 0  # bytes; nothing is prefetched

    def require(self, reader: str, paths: list[str], then: list[str]) -> float:  # noqa: ARG002 - as `ShardCache.require`
        """Check that the shards can be opened, and return 0.0 (seconds waited). Raises DataError if a shard cannot."""
        for path in paths:
            try:
                open(path, "rb").close()
            except OSError as error:
                problem = (
                    f"{escape_unprintable(path)}: {error.strerror}, but it was readable when the dataset was opened"
                )
                raise DataError(problem, fix="restore the file and start the same command again to resume") from None
        return 0.0

    def release(self, reader: str) -> None:
        """Do nothing: local shards are not evicted."""


class ShardGate:
    """Makes the host wait for the shards that one iteration of a pipeline over a split can open."""

    def __init__(
        self,
        shards: ShardCache | LocalShards | None,
        split: Split,
        reader: str,
        blocks: Iterator[BlockShards],
        max_rows_ahead: int,
    ) -> None:
        """Create a gate from which no rows have been taken.

        Args:
            shards: provides the split's shards. If None, the pipeline reads no shards and the gate never waits.
            split: the split that the pipeline reads.
            reader: name of the pipeline, unique in the cache.
            blocks: for each block of the pipeline, its number of rows and the indices of its shards.
            max_rows_ahead: the result of `compute_max_rows_ahead` for the pipeline.
        """
        self.shards, self.reader, self.split = shards, reader, split
        self.max_rows_ahead, self._block_iterator = max_rows_ahead, blocks
        is_cached = isinstance(shards, ShardCache)
        self._names = [os.path.basename(shard.path) if is_cached else shard.path for shard in split.shards]
        # The blocks that are not yet taken completely: number of rows up to the end of the block, names of its shards.
        self._blocks: deque[tuple[int, list[str]]] = deque()
        self._first_block = 0  # index of the first block in `_blocks`, among all blocks of the pipeline
        self._num_taken = self._num_read = 0  # number of rows taken from the pipeline; of all blocks read so far
        self._required_range = (-1, -1)  # first and last block of the latest `require`; -1 before the first call

    def wait_for(self, num_rows: int) -> float:
        """Wait for every shard that the pipeline can open while `num_rows` more are taken. Return the seconds waited.

        Raises:
            DataError: a shard is missing or has changed, or the required shards exceed the disk budget.
            Interrupted: the bucket does not respond, or (as StopRequested) a stop request cancels the wait.
            OSError: a fetched shard cannot be written to disk.
        """
        if self.shards is None:
            return 0.0
        while self._blocks and self._blocks[0][0] <= self._num_taken:
            self._blocks.popleft()
            self._first_block += 1
        self._num_taken += num_rows
        position = 0  # position in `_blocks` of the block with the last row that can be pulled
        while self._has_block(position) and self._blocks[position][0] <= self._num_taken + self.max_rows_ahead:
            position += 1
        last = position + BLOCKS_AHEAD
        block_range = (self._first_block, self._first_block + last)
        if block_range == self._required_range:
            return 0.0
        seconds = self.shards.require(self.reader, *self._select_shards(last))
        self._required_range = block_range
        return seconds

    def close(self) -> None:
        """Release the shards. Call this after the iterator of the pipeline is deleted."""
        if self.shards is not None:
            self.shards.release(self.reader)

    def _has_block(self, position: int) -> bool:
        """Extend `_blocks` up to `position`, and return whether the pipeline has a block at this position."""
        for num_rows, shards in itertools.islice(self._block_iterator, max(position + 1 - len(self._blocks), 0)):
            self._num_read += num_rows
            self._blocks.append((self._num_read, [self._names[shard] for shard in shards]))
        return position < len(self._blocks)

    def _select_shards(self, last: int) -> tuple[list[str], list[str]]:
        """Return the names of the shards in the blocks up to position `last`, and of later shards to prefetch.

        The later shards end when their blocks have `split.count` rows, or when their bytes reach the cache's budget.
        """
        assert self.shards is not None
        self._has_block(last)
        required_names = dict.fromkeys(name for _, names in list(self._blocks)[: last + 1] for name in names)
        selected_names = dict(required_names)
        later_bytes = 0
        later_rows = 0
        position = last + 1
        while later_bytes < self.shards.budget and later_rows < self.split.count and self._has_block(position):
            assert isinstance(self.shards, ShardCache)  # local shards have the budget 0
            for name in self._blocks[position][1]:
                later_bytes += 0 if name in selected_names else self.shards.infos[name].size
                selected_names[name] = None
            later_rows = self._blocks[position][0] - self._blocks[last][0]
            position += 1
        return list(required_names), [name for name in selected_names if name not in required_names]


class ShardGates:
    """The gates of several parts of a global batch, each with its own shards, used like one `ShardGate`."""

    def __init__(self, gates: Sequence[ShardGate]) -> None:
        """`gates` has one gate per part. All parts have the same number of rows."""
        self._gates = gates

    def wait_for(self, num_rows: int) -> float:
        """Wait until `num_rows` more rows of all parts together can be taken. Return the seconds waited."""
        return sum(gate.wait_for(num_rows // len(self._gates)) for gate in self._gates)

    def close(self) -> None:
        """Release the shards of all parts."""
        for gate in self._gates:
            gate.close()
