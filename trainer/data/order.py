"""Which example comes when: order and position as pure functions of (seed, epoch, step). No TensorFlow here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from trainer.contracts import Split

STRETCH = 1024  # examples that are read together where no shuffling asks for more
_SHARDS, _WINDOW, _SHARE = 0, 1, 2  # what a random stream is for


@dataclass(frozen=True)
class Block:
    """A stretch of an epoch: r rows in order, and the records that have to be read for them."""

    pieces: np.ndarray  # int64 [k, 3]: shard number, first record, count; none for image files
    place: np.ndarray  # int64 [r]: where among those records the row's example lies
    index: np.ndarray  # int64 [r]: the row's example (0 in padding)
    weight: np.ndarray  # float32 [r]: 1 for an example, 0 for padding
    position: np.ndarray  # int64 [r]: place in the global batch
    epoch: np.ndarray  # int64 [r]


def _pieces(split: Split, shards: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [start, stop) of the given shards laid end to end.

    Returns:
        pieces int64 [k, 3] as in `Block`, and the indices of their examples, int64 [stop - start].
    """
    sizes = np.array([shard.stop - shard.start for shard in split.shards], np.int64)
    first_index = np.cumsum(sizes) - sizes
    ends = np.cumsum(sizes[shards])
    pieces, indices, at = [], [], start
    for k in range(int(np.searchsorted(ends, start, "right")), len(shards)):
        if at >= stop:
            break
        shard = int(shards[k])
        skipped = at - int(ends[k] - sizes[shard])
        count = min(int(sizes[shard]) - skipped, stop - at)
        if count > 0:
            pieces.append((shard, split.shards[shard].start + skipped, count))
            indices.append(first_index[shard] + skipped + np.arange(count, dtype=np.int64))
            at += count
    return np.array(pieces, np.int64).reshape(-1, 3), np.concatenate([np.zeros(0, np.int64), *indices])


def _shuffled_window(split: Split, seed: int, epoch: int, window: int, number: int) -> tuple[np.ndarray, ...]:
    """Pieces, places and indices of window `number` of an epoch of records, its rows in shuffled order."""
    shards = np.random.default_rng([seed, epoch, _SHARDS]).permutation(len(split.shards))
    pieces, indices = _pieces(split, shards, number * window, min((number + 1) * window, split.count))
    place = np.random.default_rng([seed, epoch, _WINDOW, number]).permutation(len(indices))
    return pieces, place, indices[place]


def epoch_order(split: Split, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of the examples in an epoch, a function of (seed, epoch).

    Shards are permuted and laid end to end, then cut into windows of `window` records of which each is shuffled whole.
    Image files can be opened in any order at no cost (and lie sorted by class), so they are one window.

    Returns:
        int64 [count], a permutation of the split's indices.
    """
    if not split.shards:
        return np.random.default_rng([seed, epoch, _WINDOW, 0]).permutation(split.count).astype(np.int64)
    numbers = range(-(-split.count // window))
    return np.concatenate(
        [np.zeros(0, np.int64)] + [_shuffled_window(split, seed, epoch, window, n)[2] for n in numbers]
    )


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Global batches in an epoch; the last one may be padded."""
    return -(-split.count // batch_size)


def _with_padding(
    pieces: np.ndarray, place: np.ndarray, index: np.ndarray, start: int, total: int, batch: int, epoch: int
) -> Block:
    """A block whose first row is row `start` of the epoch; the one that ends it is padded to whole global batches."""
    padding = -total % batch if start + len(index) == total else 0
    rows = len(index) + padding
    return Block(
        pieces=pieces,
        place=np.pad(place, (0, padding)),
        index=np.pad(index, (0, padding)),
        weight=np.pad(np.ones(len(index), np.float32), (0, padding)),
        position=(start + np.arange(rows, dtype=np.int64)) % batch,
        epoch=np.full(rows, epoch, np.int64),
    )


def training_blocks(
    split: Split, *, batch_size: int, seed: int, window: int, first_epoch: int, first_step: int, shuffle: bool
) -> Callable[[int], Block]:
    """Block number 0, 1, ... of the endless stream of epochs that begins at step `first_step` of `first_epoch`.

    What lies before is jumped over by arithmetic: of the first block only the records of its own window are read.
    """
    total, stretch = split.count, window if split.shards and shuffle else STRETCH
    first_epoch += first_step // steps_per_epoch(split, batch_size)
    first_row = first_step % steps_per_epoch(split, batch_size) * batch_size
    per_epoch = -(-total // stretch)
    in_order = np.arange(len(split.shards))

    @lru_cache(maxsize=2)
    def whole_epoch(epoch: int) -> np.ndarray:
        return epoch_order(split, seed, epoch, window) if shuffle else np.arange(total, dtype=np.int64)

    def block(number: int) -> Block:
        epoch, number = divmod(first_row // stretch + number, per_epoch)
        start = number * stretch
        if not split.shards:
            index = whole_epoch(first_epoch + epoch)[start : start + stretch]
            pieces, place = np.zeros((0, 3), np.int64), np.zeros(len(index), np.int64)
        elif shuffle:
            pieces, place, index = _shuffled_window(split, seed, first_epoch + epoch, window, number)
        else:
            pieces, index = _pieces(split, in_order, start, min(start + stretch, total))
            place = np.arange(len(index), dtype=np.int64)
        done = max(first_row - start, 0) if epoch == 0 else 0
        return _with_padding(pieces, place[done:], index[done:], start + done, total, batch_size, first_epoch + epoch)

    return block


def sequence_blocks(split: Split, chosen: np.ndarray, batch_size: int) -> tuple[int, Callable[[int], Block]]:
    """The examples `chosen` (increasing indices) once each, padded to whole batches: number of blocks, and each one."""
    in_order = np.arange(len(split.shards))
    edges = np.searchsorted(chosen, np.arange(0, split.count + STRETCH, STRETCH))
    cuts = [(int(a), int(b)) for a, b in pairwise(edges) if a < b]  # a block spans at most STRETCH records

    def block(number: int) -> Block:
        first, last = cuts[number]
        index = chosen[first:last]
        if split.shards:
            pieces, _ = _pieces(split, in_order, int(index[0]), int(index[-1]) + 1)
        else:
            pieces = np.zeros((0, 3), np.int64)
        return _with_padding(pieces, index - index[0], index, first, len(chosen), batch_size, 0)

    return len(cuts), block


def share_of(split: Split, batch_size: int, share: float) -> np.ndarray:
    """The examples of the first ceil(share * batches) batches of one fixed shuffle (indices may lie sorted by class).

    Returns:
        increasing int64 indices; all of them for share 1.
    """
    if share >= 1:
        return np.arange(split.count, dtype=np.int64)
    batches = int(np.ceil(share * steps_per_epoch(split, batch_size)))
    mixed = np.random.default_rng([0, _SHARE]).permutation(split.count)
    return np.sort(mixed[: batches * batch_size]).astype(np.int64)
