"""Wait on the host for shards before a pipeline opens them.

A pipeline cannot wait for a file: it contains no Python (`trainer.data.order`), and treats a missing file as unreadable
records. So before the host takes rows from a pipeline, it waits at a gate for every shard that the pipeline can open
before the next wait. `order.compute_block_shards` computes these shards with the function that also computes the blocks
of the pipeline.
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

# Blocks after that of the last pulled row whose shards can be open. One thread reads blocks into the `prefetch(1)` of
# `decoding._add_records`: while rows of block b are pulled, block b + 1 is read and then buffered. Reading of b + 2
# begins when b + 1 leaves the buffer, that is when its first row is pulled.
BLOCKS_AHEAD = 1


def max_rows_ahead(size: int, threads: int, elements: int) -> int:
    """Return the maximum number of rows that a pipeline has pulled beyond those taken from it.

    An element has `size` rows, and `threads` rows are decoded in parallel. The buffers after `batch` hold `elements`
    elements, and each transformation holds one more.
    """
    # Where TensorFlow fuses map and batch, it fills ceil(threads / size) batches concurrently while another is taken.
    return (elements + 4) * size + 2 * threads


class LocalShards:
    """Local shards by path, with the interface of a `ShardCache`.

    It detects missing shards, because a pipeline that skips unreadable examples retries a missing one forever.
    """

    budget = 0  # nothing is prefetched

    def require(self, reader: str, paths: list[str], then: list[str]) -> float:  # noqa: ARG002 - as `ShardCache.require`
        """Raise a DataError for a shard that cannot be opened. Return 0 seconds of waiting."""
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
    """The gate of one iteration of a pipeline over a split. It never waits if `shards` is None."""

    def __init__(
        self,
        shards: ShardCache | LocalShards | None,
        split: Split,
        reader: str,
        blocks: Iterator[BlockShards],
        ahead: int,
    ) -> None:
        """Begin before the first block. `reader` names the pipeline to the cache; `ahead` is `max_rows_ahead`."""
        self.shards, self.reader, self.split, self.ahead, self._source = shards, reader, split, ahead, blocks
        is_cached = isinstance(shards, ShardCache)
        self._names = [os.path.basename(shard.path) if is_cached else shard.path for shard in split.shards]
        self._blocks: deque[tuple[int, list[str]]] = deque()  # rows up to the end of a block, and its shard names
        self._first_index = 0  # index of the first block in `_blocks`
        self._taken = self._rows = 0  # rows taken from the pipeline; rows of all blocks taken from `_source`
        self._required = (-1, -1)  # indices of the first and last block of the latest `require`; -1: none yet

    def wait_for(self, rows: int) -> float:
        """Wait for every shard that the pipeline can open while `rows` more rows are taken. Return the seconds waited.

        Raises:
            DataError: a shard is missing or has changed, or the required shards exceed the disk budget.
            Interrupted: the bucket does not respond.
            OSError: the disk is full.
        """
        if self.shards is None:
            return 0.0
        while self._blocks and self._blocks[0][0] <= self._taken:
            self._blocks.popleft()
            self._first_index += 1
        self._taken += rows
        position = 0  # in `_blocks`, of the block with the last row that can be pulled
        while self._has_block(position) and self._blocks[position][0] <= self._taken + self.ahead:
            position += 1
        last = position + BLOCKS_AHEAD
        required = (self._first_index, self._first_index + last)
        if required == self._required:
            return 0.0
        waited = self.shards.require(self.reader, *self._shards_until(last))
        self._required = required
        return waited

    def close(self) -> None:
        """Release the shards. Call it after the iterator of the pipeline is deleted."""
        if self.shards is not None:
            self.shards.release(self.reader)

    def _has_block(self, position: int) -> bool:
        """Extend `_blocks` up to this position. Return False if there are fewer blocks."""
        for rows, shards in itertools.islice(self._source, max(position + 1 - len(self._blocks), 0)):
            self._rows += rows
            self._blocks.append((self._rows, [self._names[shard] for shard in shards]))
        return position < len(self._blocks)

    def _shards_until(self, last: int) -> tuple[list[str], list[str]]:
        """Return the shards up to position `last`, and later ones to prefetch, up to an epoch or the cache's budget."""
        assert self.shards is not None
        self._has_block(last)
        required = dict.fromkeys(name for _, names in list(self._blocks)[: last + 1] for name in names)
        seen, size, rows, position = dict(required), 0, 0, last + 1
        while size < self.shards.budget and rows < self.split.count and self._has_block(position):
            assert isinstance(self.shards, ShardCache)  # local shards have no budget
            for name in self._blocks[position][1]:
                size += 0 if name in seen else self.shards.entries[name].size
                seen[name] = None
            rows = self._blocks[position][0] - self._blocks[last][0]
            position += 1
        return list(required), [name for name in seen if name not in required]


class ShardGates:
    """The gates of the parts of a global batch that have their own shards, with the interface of a `ShardGate`."""

    def __init__(self, gates: Sequence[ShardGate]) -> None:
        self._gates = gates

    def wait_for(self, rows: int) -> float:
        """Wait until `rows` more rows, equally divided among the parts, can be taken. Return the seconds waited."""
        return sum(gate.wait_for(rows // len(self._gates)) for gate in self._gates)

    def close(self) -> None:
        """Release the shards of all parts."""
        for gate in self._gates:
            gate.close()
