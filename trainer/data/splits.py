"""Splits as the sources build them: choosing examples out of files or record ranges, and hashing what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trainer.contracts import Shard, Split

PARTS = ("train", "validation", "test")


@dataclass
class Found:
    """What a source found, before limits and checks that hold for every source."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    facts: dict[str, str]  # of each file or shard: name below the root, size, hash of its two ends
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group_names: tuple[str, ...] | None = None  # what the numbers in data.group_field mean


def ends_of(path: str | Path, length: int) -> tuple[int, bytes, str]:
    """Size in bytes, the first `length` bytes, and a hash of the first and the last `length` bytes of a file."""
    handle = os.open(path, os.O_RDONLY)  # a Python file would take twice the time of all the rest
    try:
        size = os.fstat(handle).st_size
        head = os.pread(handle, length, 0)
        tail = os.pread(handle, length, max(len(head), size - length))
    finally:
        os.close(handle)
    return size, head, hashlib.sha256(head + tail).hexdigest()[:16]


def take(split: Split, positions: np.ndarray) -> Split:
    """The split that holds only the examples at these positions (int [k], ascending for record splits)."""
    labels = split.labels[positions]
    if split.files:
        return replace(split, labels=labels, files=tuple(split.files[i] for i in positions))
    return replace(split, labels=labels, shards=_ranges(split.shards, positions))


def _ranges(shards: Sequence[Shard], positions: np.ndarray) -> tuple[Shard, ...]:
    """Runs of neighbouring records become one range of their shard."""
    lengths = np.array([shard.stop - shard.start for shard in shards])
    first = np.concatenate([[0], np.cumsum(lengths)])
    which = np.searchsorted(first, positions, side="right") - 1
    record = positions - first[which] + np.array([shard.start for shard in shards], int)[which]
    breaks = np.flatnonzero((np.diff(which) != 0) | (np.diff(record) != 1)) + 1
    return tuple(
        replace(shards[which[run[0]]], start=int(record[run[0]]), stop=int(record[run[-1]]) + 1)
        for run in np.split(np.arange(len(positions)), breaks)
        if len(run)
    )


def turns(labels: np.ndarray, seed: int) -> np.ndarray:
    """For each example the turn at which its class would draw it: 0 for one random example of each class, then 1, ...

    Returns:
        int64 [n], a function of the labels and the seed.
    """
    shuffled = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels, minlength=1)
    starts = np.repeat(np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    result = np.empty(len(labels), np.int64)
    result[by_class] = np.arange(len(labels)) - starts
    return result


def per_class(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` examples of each class, drawn by seed, in their old order."""
    return take(split, np.flatnonzero(turns(split.labels, seed) < limit))


def at_most(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` examples with the classes taking turns, in their old order."""
    if split.count <= limit:
        return split
    return take(split, np.sort(np.argsort(turns(split.labels, seed), kind="stable")[:limit]))


def part_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """How many of `count` examples each part gets: the rounded share, at least 1, while training keeps at least 1."""
    sizes, left = {}, count - 1
    for part, fraction in fractions.items():
        sizes[part] = min(left, max(1, round(count * fraction))) if fraction > 0 else 0
        left -= sizes[part]
    return sizes


def overlap(first: Split, second: Split) -> int:
    """The number of records (or files) that both splits hold."""
    if first.files or second.files:
        return len(set(first.files) & set(second.files))
    ranges: dict[str, list[Shard]] = {}
    for shard in first.shards:
        ranges.setdefault(shard.path, []).append(shard)
    return sum(
        max(0, min(shard.stop, other.stop) - max(shard.start, other.start))
        for shard in second.shards
        for other in ranges.get(shard.path, ())
    )


def fingerprint(found: Found) -> str:
    """16 hex digits over class names, split membership, labels, and the facts of every file; not over the root."""
    digest = hashlib.sha256(repr(found.class_names).encode())
    for name, split in sorted(found.splits.items()):
        digest.update(repr((name, split.count, split.image_field)).encode())
        for path in split.files:
            digest.update(found.facts[path].encode())
        for shard in split.shards:
            digest.update(repr((found.facts[shard.path], shard.start, shard.stop)).encode())
        digest.update(split.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]
