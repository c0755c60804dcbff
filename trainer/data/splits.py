"""Splits of a dataset: drawing examples, fingerprints, and the labels of TFRecord shards."""

import glob
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trainer.config.schema import Data
from trainer.data.records import index_shard, read_labels
from trainer.data.tfds_folder import known_shards
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.storage.local import write_whole
from trainer.storage.shard_cache import Note
from trainer.types import Shard, Split

PARTS = ("train", "validation", "test")


@dataclass
class RawData:
    """The dataset of a source, before the limits and checks that hold for every source."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    facts: dict[str, str]  # of each file or shard: name below the root, size, hash of its two ends
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group_names: tuple[str, ...] | None = None  # of the numbers in data.group_field


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
    """The turn at which each example would be drawn by its class: 0 for one random example of each class, then 1, ...

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
    return (
        split
        if split.count <= limit
        else take(split, np.sort(np.argsort(turns(split.labels, seed), kind="stable")[:limit]))
    )


def part_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """The number of examples of each part: the rounded fraction, at least 1, while training keeps at least 1."""
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


def fingerprint(raw: RawData) -> str:
    """16 hex digits over class names, split membership, labels, and the facts of every file; not over the root."""
    digest = hashlib.sha256(repr(raw.class_names).encode())
    for name, split in sorted(raw.splits.items()):
        digest.update(repr((name, split.count, split.image_field)).encode())
        for path in split.files:
            digest.update(raw.facts[path].encode())
        for shard in split.shards:
            digest.update(repr((raw.facts[shard.path], shard.start, shard.stop)).encode())
        digest.update(split.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------
# Splits over TFRecord shards

_ENDS = 2**16  # bytes of each end of a shard that its fingerprint covers


@dataclass(frozen=True)
class RecordSource:
    """Settings for reading the records of a source."""

    image_field: str
    label_field: str
    classes: int
    cache_dir: Path  # labels of shards that were read before
    on_error: str  # fail | skip
    note: Note
    arriving: bool = False  # the shards come from a bucket while they are used: manifest and labels file must do


def read_shards(paths: list[str], source: RecordSource) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Labels, facts and faults of shards; a second time the labels come from the cache at once.

    Where the folder has a manifest and labels (`python -m trainer.prepare` writes both), the facts are the manifest's,
    so that a dataset has the same fingerprint whether its shards lie here or in a bucket. Records that lie here are
    read all the same: that verifies their checksums.

    Returns:
        For each path int32 [records], -1 where a record is damaged; for each path its name, size and CRC32C or
        hash of its ends; and what is damaged, one sentence each.

    Raises:
        DataError: a shard is missing or damaged (on_error="fail"), or its fields are not as expected.
    """
    labels: dict[str, np.ndarray] = {}
    facts: dict[str, str] = {}
    skipped: list[str] = []
    known = {folder: known_shards(Path(folder)) for folder in {os.path.dirname(path) for path in paths}}
    for number, path in enumerate(paths):
        health.progress()
        name, (entries, known_labels) = os.path.basename(path), known[os.path.dirname(path)]
        if source.arriving:
            if name not in entries:
                raise DataError(f"the manifest beside shard {path} does not name it; prepare the dataset again")
            facts[path], labels[path] = entries[name].facts, known_labels[name]
            continue
        try:
            size, changed = os.path.getsize(path), os.stat(path).st_mtime_ns
            prepared = name in entries and entries[name].bytes == size
            facts[path] = entries[name].facts if prepared else f"{name} {size} {ends_of(path, _ENDS)[2]}"
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}") from None
        key = repr((facts[path], changed, source.label_field, source.image_field, source.classes))
        cached = source.cache_dir / "labels" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        if cached.exists():
            labels[path] = np.load(cached)
            continue
        if number % 100 == 0:
            source.note(f"reading the labels of {len(paths) - number} shards (once; they are kept in {cached.parent})")
        index = index_shard(path)
        labels[path], faults = read_labels(path, index, source.label_field, source.image_field, source.classes)
        faults += [index.fault] if index.fault else []
        if faults and source.on_error == "fail":
            advice = "; write it again, or set data.on_error=skip to leave it out"
            raise DataError(faults[0] + advice * ("data.on_error" not in faults[0]))
        skipped += [fault.split("; ")[0].split(": fetch")[0] for fault in faults]
        if not faults:
            content = io.BytesIO()
            np.save(content, labels[path])
            write_whole(cached, content.getvalue())
    return labels, facts, skipped


def split_of(name: str, ranges: list[Shard], labels: dict[str, np.ndarray], source: RecordSource) -> Split:
    """The split over these ranges, without the records that are damaged.

    Raises:
        DataError: a shard holds another number of records than its metadata says (on_error="fail").
    """
    shards = []
    for shard in ranges:
        count = len(labels[shard.path])
        if count != shard.count and source.on_error == "fail":
            raise DataError(
                f"shard {shard.path} holds {count} records where dataset_info.json says {shard.count}; prepare the "
                "dataset again, or set data.on_error=skip to use what is there"
            )
        shards.append(replace(shard, count=count, start=min(shard.start, count), stop=min(shard.stop, count)))
    parts = [labels[shard.path][shard.start : shard.stop] for shard in shards]
    joined = np.concatenate([np.zeros(0, np.int32), *parts])
    whole = Split(name, joined, shards=tuple(shards), image_field=source.image_field)
    return take(whole, np.flatnonzero(whole.labels >= 0))


def open_tfrecords(data: Data, cache_dir: Path, note: Note) -> RawData:
    """The first validation_fraction of the sorted files validates, the next test_fraction tests, the rest trains.

    Raises:
        DataError: no file fits the pattern, there are fewer files than splits, or a shard is not as expected.
    """
    assert data.pattern
    assert data.class_names
    paths = sorted(p for p in glob.glob(os.path.expanduser(data.pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        raise DataError(f"no file fits data.pattern={data.pattern} (seen from {os.getcwd()})")
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    wanted = ["train", *(part for part, fraction in fractions.items() if fraction > 0)]
    if len(paths) < len(wanted):
        raise DataError(
            f"data.pattern={data.pattern} fits {len(paths)} file{'s' * (len(paths) > 1)}, too few for the splits "
            f"{', '.join(wanted)}: write more shards (python -m trainer.prepare), or set data.validation_fraction=0"
            f"{' and data.test_fraction=0' * (data.test_fraction > 0)}"
        )
    sizes = part_sizes(len(paths), fractions)
    first, second = sizes["validation"], sizes["validation"] + sizes["test"]
    parts = {"train": paths[second:], "validation": paths[:first], "test": paths[first:second]}
    source = RecordSource(data.image_field, data.label_field, len(data.class_names), cache_dir, data.on_error, note)
    labels, facts, skipped = read_shards(paths, source)
    splits = {
        name: split_of(name, [Shard(p, len(labels[p]), 0, len(labels[p])) for p in files], labels, source)
        for name, files in parts.items()
        if files
    }
    return RawData(os.path.basename(os.path.dirname(paths[0])) or "tfrecords", data.class_names, splits, facts, skipped)
