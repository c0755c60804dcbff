"""Splits of a dataset: limits, fingerprints, and the labels of TFRecord shards."""

import glob
import hashlib
import io
import os
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np

from trainer.config.schema import Data
from trainer.data.records import index_shard, read_labels, unreadable
from trainer.data.tfds_folder import known_shards
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.storage.local import write_whole
from trainer.storage.shard_cache import Note
from trainer.types import Shard, Split

SPLITS = ("train", "validation", "test")


@dataclass
class RawData:
    """The dataset of a source, before the limits and checks that hold for every source."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    facts: dict[str, str]  # by file or shard: name below the root, size in bytes, hash of its two ends
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    group_names: tuple[str, ...] | None = None  # names of the values 0, 1, ... of data.group_field


def ends_of(path: str | Path, length: int) -> tuple[int, bytes, str]:
    """Size in bytes, the first `length` bytes, and a hash of the first and the last `length` bytes of a file."""
    handle = os.open(path, os.O_RDONLY)  # a Python file object doubles the time of this function
    try:
        size = os.fstat(handle).st_size
        head = os.pread(handle, length, 0)
        tail = os.pread(handle, length, max(len(head), size - length))
    finally:
        os.close(handle)
    return size, head, hashlib.sha256(head + tail).hexdigest()[:16]


def take(split: Split, positions: np.ndarray) -> Split:
    """Return the split of the examples at `positions` (int [k], ascending for record splits)."""
    labels = split.labels[positions]
    if split.files:
        return replace(split, labels=labels, files=tuple(split.files[i] for i in positions))
    shards = split.shards
    lengths = np.array([shard.stop - shard.start for shard in shards])
    first = np.concatenate([[0], np.cumsum(lengths)])
    which = np.searchsorted(first, positions, side="right") - 1
    record = positions - first[which] + np.array([shard.start for shard in shards], int)[which]
    breaks = np.flatnonzero((np.diff(which) != 0) | (np.diff(record) != 1)) + 1
    runs = [run for run in np.split(np.arange(len(positions)), breaks) if len(run)]  # of neighbouring records
    ranges = [replace(shards[which[r[0]]], start=int(record[r[0]]), stop=int(record[r[-1]]) + 1) for r in runs]
    return replace(split, labels=labels, shards=tuple(ranges))


def class_rank(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rank of each example in a random order of its class, int64 [n] from 0: a function of labels and seed."""
    shuffled = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels, minlength=1)
    starts = np.repeat(np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    result = np.empty(len(labels), np.int64)
    result[by_class] = np.arange(len(labels)) - starts
    return result


def per_class(split: Split, limit: int, seed: int) -> Split:
    """Draw at most `limit` examples per class by seed; their order stays."""
    return take(split, np.flatnonzero(class_rank(split.labels, seed) < limit))


def at_most(split: Split, limit: int, seed: int) -> Split:
    """Draw at most `limit` examples, equally many per class as far as possible; their order stays."""
    if split.count <= limit:
        return split
    return take(split, np.sort(np.argsort(class_rank(split.labels, seed), kind="stable")[:limit]))


def split_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """Examples per split: the rounded fraction, at least 1, but training keeps at least 1 of `count`."""
    sizes, left = {}, count - 1
    for name, fraction in fractions.items():
        sizes[name] = min(left, max(1, round(count * fraction))) if fraction > 0 else 0
        left -= sizes[name]
    return sizes


def overlap(first: Split, second: Split) -> int:
    """Count the records (or files) that are in both splits."""
    if first.files or second.files:
        return len(set(first.files) & set(second.files))
    return sum(
        max(0, min(one.stop, other.stop) - max(one.start, other.start))
        for one, other in product(first.shards, second.shards)
        if one.path == other.path
    )


def fingerprint(raw: RawData) -> str:
    """Hash class names, splits, labels, and the facts of every file to 16 hex digits; the root does not matter."""
    digest = hashlib.sha256(repr(raw.class_names).encode())
    for name, split in sorted(raw.splits.items()):
        digest.update(repr((name, split.count, split.image_field)).encode())
        for path in split.files:
            digest.update(raw.facts[path].encode())
        for shard in split.shards:
            digest.update(repr((raw.facts[shard.path], shard.start, shard.stop)).encode())
        digest.update(split.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


_ENDS = 2**16  # bytes of each end of a shard that its fingerprint covers


@dataclass(frozen=True)
class RecordSource:
    """Settings for reading the records of a source."""

    data: Data
    classes: int
    cache_dir: Path  # stores the labels of shards that were read before
    note: Note
    streamed: bool = False  # the shards are fetched while they are used: read manifest and labels file instead


def read_shards(paths: list[str], source: RecordSource) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Read labels and facts of shards, and cache the labels on disk.

    In a folder that `python -m trainer.prepare` wrote, the facts are those of its manifest: a dataset has the same
    fingerprint on a local disk and in a bucket. Local records are still read, to verify their checksums.

    Returns:
        By path int32 [records], -1 for a damaged record; by path its name, size and CRC32C or hash of its ends; and
        one sentence per damaged shard or record.

    Raises:
        DataError: a shard is missing or damaged (on_error="fail"), or its fields are not as expected.
    """
    image_field, label_field = source.data.image_field, source.data.label_field
    labels: dict[str, np.ndarray] = {}
    facts: dict[str, str] = {}
    skipped: list[str] = []
    known = {folder: known_shards(Path(folder)) for folder in {os.path.dirname(path) for path in paths}}
    for number, path in enumerate(paths):
        health.progress()
        name, (entries, known_labels) = os.path.basename(path), known[os.path.dirname(path)]
        if source.streamed:
            if name not in entries:
                raise DataError(f"shard {path} is not in the manifest of its folder", fix="prepare the dataset again")
            facts[path], labels[path] = entries[name].facts, known_labels[name]
            continue
        try:
            size, changed = os.path.getsize(path), os.stat(path).st_mtime_ns
            prepared = name in entries and entries[name].bytes == size
            facts[path] = entries[name].facts if prepared else f"{name} {size} {ends_of(path, _ENDS)[2]}"
        except OSError as error:
            raise unreadable(path, error) from None
        key = repr((facts[path], changed, label_field, image_field, source.classes))
        cached = source.cache_dir / "labels" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
        if cached.exists():
            labels[path] = np.load(cached)
            continue
        if number % 100 == 0:
            source.note(f"reading the labels of {len(paths) - number} shards (once, cached in {cached.parent})")
        index = index_shard(path)
        labels[path], faults = read_labels(path, index, label_field, image_field, source.classes)
        faults += [index.fault] if index.fault else []
        if faults and source.data.on_error == "fail":
            fix = "fetch or write it again, or set data.on_error=skip to leave out what is damaged"
            raise DataError(faults[0], fix=fix)
        skipped += faults
        if not faults:
            content = io.BytesIO()
            np.save(content, labels[path])
            write_whole(cached, content.getvalue())
    return labels, facts, skipped


def split_of(name: str, ranges: list[Shard], labels: dict[str, np.ndarray], source: RecordSource) -> Split:
    """Build the split of these ranges, without damaged records.

    Raises:
        DataError: a shard has another number of records than in its metadata (on_error="fail").
    """
    shards = []
    for shard in ranges:
        count = len(labels[shard.path])
        if count != shard.count and source.data.on_error == "fail":
            problem = f"shard {shard.path} holds {count} records, but dataset_info.json lists {shard.count}"
            raise DataError(problem, fix="prepare the dataset again, or set data.on_error=skip to use what is there")
        shards.append(replace(shard, count=count, start=min(shard.start, count), stop=min(shard.stop, count)))
    joined = np.concatenate([np.zeros(0, np.int32), *(labels[s.path][s.start : s.stop] for s in shards)])
    whole = Split(name, joined, shards=tuple(shards), image_field=source.data.image_field)
    return take(whole, np.flatnonzero(whole.labels >= 0))


def open_tfrecords(data: Data, cache_dir: Path, note: Note) -> RawData:
    """Open the files of a pattern: of the sorted files the first validate, the next test, the rest train.

    Raises:
        DataError: no file matches the pattern, there are fewer files than splits, or a shard is not as expected.
    """
    assert data.pattern
    assert data.class_names
    paths = sorted(p for p in glob.glob(os.path.expanduser(data.pattern), recursive=True) if os.path.isfile(p))
    if not paths:
        problem, fix = f"no file matches (searched from {os.getcwd()})", "set the pattern of the shards"
        raise DataError(problem, key="data.pattern", value=data.pattern, fix=fix)
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    names = ["train", *(name for name, fraction in fractions.items() if fraction > 0)]
    if len(paths) < len(names):
        matches = f"matches {len(paths)} file{'s' * (len(paths) > 1)}, too few for the splits {', '.join(names)}"
        zero = " and ".join(f"data.{name}_fraction=0" for name in names[1:])
        fix = f"write more shards (python -m trainer.prepare), or set {zero}"
        raise DataError(matches, key="data.pattern", value=data.pattern, fix=fix)
    sizes = split_sizes(len(paths), fractions)
    first, second = sizes["validation"], sizes["validation"] + sizes["test"]
    files = {"train": paths[second:], "validation": paths[:first], "test": paths[first:second]}
    source = RecordSource(data, len(data.class_names), cache_dir, note)
    labels, facts, skipped = read_shards(paths, source)
    ranges = {name: [Shard(p, len(labels[p]), 0, len(labels[p])) for p in files[name]] for name in SPLITS}
    splits = {name: split_of(name, shards, labels, source) for name, shards in ranges.items() if shards}
    return RawData(os.path.basename(os.path.dirname(paths[0])) or "tfrecords", data.class_names, splits, facts, skipped)
