"""Build splits of examples, select from them, hash them, and read the labels of TFRecord shards."""

import glob
import hashlib
import os
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np

from trainer.config.schema import Data
from trainer.config.typed import format_argument
from trainer.data.records import (
    NOT_LABELLED,
    LabelFields,
    index_shard,
    join_first,
    label_error,
    read_labels,
    unreadable_error,
)
from trainer.data.sharding import count_shard_records
from trainer.data.tfds_folder import read_manifest_and_labels
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import encode_file_name, escape_unprintable, normalize_class_name
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import write_atomically
from trainer.storage.staging import has_wildcard
from trainer.types import LogMessage, Shard, Split

SPLITS = ("train", "validation", "test")


@dataclass
class RawData:
    """A dataset as a source provides it, before the selections and checks that all sources have in common."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    identities: dict[str, str]  # path of a file or shard -> its name, size in bytes, and checksum or hash of its ends
    skipped: list[str] = field(default_factory=list)  # unreadable files and records, with the reason
    notes: list[str] = field(default_factory=list)
    ignored: dict[int, str] = field(default_factory=dict)  # class index -> description of the files that are not images
    group_names: tuple[str, ...] | None = None  # names of the values 0, 1, ... of data.group_field


def digest_head_and_tail(path: str | Path, length: int) -> tuple[int, bytes, str]:
    """Return the size of a file in bytes, its first `length` bytes, and a hash of its first and last `length` bytes."""
    handle = os.open(path, os.O_RDONLY)  # faster: a Python file object doubles the time of this function
    try:
        size = os.fstat(handle).st_size
        head = os.pread(handle, length, 0)
        tail = os.pread(handle, length, max(len(head), size - length))
    finally:
        os.close(handle)
    return size, head, hashlib.sha256(head + tail).hexdigest()[:16]


def unused_fractions(data: Data, existing: Container[str]) -> list[str]:
    """Return a note for each fraction of the configuration that is not used, since the data has this split."""
    notes = []
    for name in ("validation", "test"):
        fraction, default = getattr(data, key := f"{name}_fraction"), Data.model_fields[f"{name}_fraction"].default
        if name in existing and fraction not in (0, default):
            notes.append(f"data.{key}={fraction:g} is not used: the data has a {name} split")
    return notes


def count_classes(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Describe the example counts in total and per class, such as "7 (cat 3, dog 4)", for at most the ten rarest."""
    counts = np.bincount(labels, minlength=len(class_names))
    shown = np.arange(len(counts)) if len(counts) <= 10 else np.sort(np.argsort(counts, kind="stable")[:10])
    more = ", ..." * (len(counts) > 10)
    return f"{len(labels)} ({', '.join(f'{class_names[i]} {counts[i]}' for i in shown)}{more})"


def take(split: Split, indices: np.ndarray) -> Split:
    """Return a split of the examples `indices`, int [k], which must be increasing if the split has shards."""
    labels = split.labels[indices]
    if split.groups is not None:
        split = replace(split, groups=tuple(split.groups[i] for i in indices))
    if split.files:
        return replace(split, labels=labels, files=tuple(split.files[i] for i in indices))
    shard_of = np.repeat(np.arange(len(split.shards)), count_shard_records(split))[indices]
    record = np.concatenate([np.arange(0), *(np.arange(s.start, s.stop) for s in split.shards)])[indices]
    breaks = np.flatnonzero((np.diff(shard_of) != 0) | (np.diff(record) != 1)) + 1
    runs = [run for run in np.split(np.arange(len(indices)), breaks) if len(run)]  # of consecutive records
    shards = [replace(split.shards[shard_of[r[0]]], start=int(record[r[0]]), stop=int(record[r[-1]]) + 1) for r in runs]
    return replace(split, labels=labels, shards=tuple(shards))


def rank_within_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rank each example, from 0, in a random order of its class, int64 [n]."""
    shuffled = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    result = np.empty(len(labels), np.int64)
    result[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return result


def select_per_class(split: Split, limit: int, seed: int) -> Split:
    """Select at most `limit` random examples of each class, in unchanged order."""
    return take(split, np.flatnonzero(rank_within_classes(split.labels, seed) < limit))


def select_at_most(split: Split, limit: int, seed: int) -> Split:
    """Select at most `limit` random examples, balanced over the classes as far as possible, in unchanged order."""
    if split.count <= limit:
        return split
    return take(split, np.sort(np.argsort(rank_within_classes(split.labels, seed), kind="stable")[:limit]))


def compute_split_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """Compute the size of each new split, its rounded fraction of `count`, at least 1 if above 0. Train retains 1."""
    sizes, left = {}, count - 1
    for name, fraction in fractions.items():
        sizes[name] = min(left, max(1, round(count * fraction))) if fraction > 0 else 0
        left -= sizes[name]
    return sizes


def count_overlap(first: Split, second: Split) -> int:
    """Count the records that are in both splits."""
    pairs = [(one, other) for one, other in product(first.shards, second.shards) if one.path == other.path]
    return sum(max(0, min(one.stop, other.stop) - max(one.start, other.start)) for one, other in pairs)


def hash_raw_data(raw: RawData) -> str:
    """Hash class names, splits, labels and file identities, independent of the root folder, to 16 hex digits."""
    digest = hashlib.sha256(repr(raw.class_names).encode())
    for name, split in sorted(raw.splits.items()):
        digest.update(repr((name, split.count, split.image_field)).encode())
        for path in split.files:
            digest.update(encode_file_name(raw.identities[path]))
        for shard in split.shards:
            digest.update(repr((raw.identities[shard.path], shard.start, shard.stop)).encode())
        digest.update(split.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


_END_BYTES = 2**16  # of the beginning and the end of a shard, covered by the dataset fingerprint


@dataclass(frozen=True)
class RecordSource:
    """Settings for reading the shards of a source."""

    data: Data
    classes: int  # number of classes
    cache_dir: Path  # stores the labels of shards for later runs
    log_message: LogMessage
    streamed: bool = False  # the shards are fetched later: use manifest and labels file


def read_shards(paths: list[str], source: RecordSource) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Read the labels and identities of shards. Cache the labels of intact shards on disk.

    In a folder that `python -m trainer.prepare` wrote, the identities are those of its manifest, so that a dataset has
    the same fingerprint on a local disk and in a bucket. Local records are still read, to verify their checksums.

    Returns:
        By path, the labels of each shard, int32 [records], -1 for a corrupt or unlabelled record. By path, its
        identity: file name, size, and CRC32C or hash of its ends. A description of each such shard or record.

    Raises:
        DataError: a shard is missing, or not in the manifest; a record has no valid image or label field; or, with
            on_error="fail", a shard is corrupt or a record is not labelled.
    """
    data = source.data
    names = tuple(map(normalize_class_name, data.class_names or ()))
    fields = LabelFields(data.label_field, data.image_field, source.classes, data.label_kind, names)
    how = (data.label_kind, names if data.label_kind == "text" else None)
    labels: dict[str, np.ndarray] = {}
    identities: dict[str, str] = {}
    skipped: list[str] = []
    stored = {folder: read_manifest_and_labels(Path(folder)) for folder in {os.path.dirname(path) for path in paths}}
    for done, path in enumerate(paths):
        health.record_progress()
        name, (entries, stored_labels) = os.path.basename(path), stored[os.path.dirname(path)]
        if source.streamed:
            if name not in entries:
                problem = f"shard {escape_unprintable(path)} is not in the manifest of its folder"
                raise DataError(problem, fix="prepare the dataset again")
            identities[path], labels[path] = entries[name].identity, stored_labels[name]
            continue
        try:
            status = os.stat(path)
            prepared = name in entries and entries[name].bytes == status.st_size
            digest = "" if prepared else digest_head_and_tail(path, _END_BYTES)[2]
            identities[path] = entries[name].identity if prepared else f"{name} {status.st_size} {digest}"
        except OSError as error:
            raise unreadable_error(path, error) from None
        key = repr((identities[path], status.st_mtime_ns, fields.label, fields.image, source.classes))
        key += repr(how) if data.label_kind != "index" else ""
        cached = source.cache_dir / "labels" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        with suppress(OSError, ValueError, KeyError):  # missing or corrupt: read the shard again
            labels[path] = unpack(cached.read_bytes())["labels"]
            continue
        if done % 100 == 0:
            source.log_message(f"reading the labels of {len(paths) - done} shards (once, cached in {cached.parent})")
        index = index_shard(path)
        labels[path], faults = read_labels(path, index, fields)
        faults += [index.fault] if index.fault else []
        if not faults:
            with suppress(OSError):  # a later start reads the shard again
                write_atomically(cached, pack({"labels": labels[path]}))
        elif data.on_error == "fail":
            raise label_error(faults[0], data.label_field)
        skipped += faults
    return labels, identities, skipped


def empty_split_error(name: str, content: str, skipped: Sequence[str]) -> DataError:
    """Build the error for a split that the dataset or the configuration defines, but that has no example."""
    unreadable_ones = f", and {len(skipped)} were skipped as unreadable, the first: {skipped[0]}" if skipped else ""
    fix = "repair them, or remove the split" if skipped else "add examples to it, or use another split"
    return DataError(f"the {name} split has no example: {content}{unreadable_ones}", fix=fix)


def build_split(
    name: str, ranges: list[Shard], labels: dict[str, np.ndarray], source: RecordSource, skipped: Sequence[str]
) -> Split:
    """Build the split of the intact and labelled records in `ranges`.

    Raises:
        DataError: no record is left, none is labelled, or a count differs from dataset_info.json (on_error="fail").
    """
    shards = []
    for shard in ranges:
        count = len(labels[shard.path])
        if count != shard.count and source.data.on_error == "fail":
            path = escape_unprintable(shard.path)
            problem = f"shard {path} holds {count} records, but dataset_info.json lists {shard.count}"
            raise DataError(problem, fix="prepare the dataset again, or set data.on_error=skip to use it nevertheless")
        shards.append(replace(shard, count=count, start=min(shard.start, count), stop=min(shard.stop, count)))
    all_labels = np.concatenate([np.zeros(0, np.int32), *(labels[s.path][s.start : s.stop] for s in shards)])
    split = Split(name, all_labels, shards=tuple(shards), image_field=source.data.image_field)
    readable = np.flatnonzero(all_labels >= 0)
    if not readable.size:
        paths = list(dict.fromkeys(escape_unprintable(shard.path) for shard in ranges))
        content = f"{join_first(paths)} {'has' if len(paths) == 1 else 'have'} {len(all_labels)} records"
        faults = [fault for fault in skipped if any(path in fault for path in paths)]
        if faults and all(fault.endswith(NOT_LABELLED) for fault in faults):
            raise label_error(faults[0], source.data.label_field)
        raise empty_split_error(name, content, faults)
    return take(split, readable)


def find_matching_files(pattern: str) -> list[str]:
    """Return the files that a pattern matches, sorted. A path component that exists literally is not a pattern."""
    components = pattern.split("/")
    for i, component in enumerate(components):
        if has_wildcard(component) and not os.path.lexists("/".join(components[: i + 1])):
            literal = [glob.escape(earlier) for earlier in components[:i]]
            return sorted(filter(os.path.isfile, glob.glob("/".join([*literal, *components[i:]]), recursive=True)))
    return [pattern] if os.path.isfile(pattern) else []


def open_tfrecords(data: Data, cache_dir: Path, log_message: LogMessage) -> RawData:
    """Open the TFRecord files that match data.pattern, and assign them to splits by the configured fractions.

    In path order, the first files are the validation split, the next the test split, and all others the train split. In
    a folder that stores class names, as `trainer.prepare` and TFDS write it, the labels are indices of these.

    Raises:
        DataError: no file matches the pattern, there are fewer files than splits, or a shard cannot be read.
    """
    assert data.pattern
    assert data.class_names
    paths = find_matching_files(os.path.expanduser(data.pattern))
    if not paths:
        if os.path.isdir(os.path.expanduser(data.pattern)):
            files = f"set {format_argument('data.pattern', os.path.join(data.pattern, '*.tfrec*'))}"
            raise DataError("is a folder", key="data.pattern", value=data.pattern, fix=files)
        problem, fix = f"no file matches (searched from {os.getcwd()})", "set the pattern of the shards"
        raise DataError(problem, key="data.pattern", value=data.pattern, fix=fix)
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    names = ["train", *(name for name, fraction in fractions.items() if fraction > 0)]
    if len(paths) < len(names):
        matches = f"matches {len(paths)} file{'s' * (len(paths) > 1)}, too few for the splits {', '.join(names)}"
        zero = " and ".join(f"data.{name}_fraction=0" for name in names[1:])
        fix = f"write more shards (python -m trainer.prepare), or set {zero}"
        raise DataError(matches, key="data.pattern", value=data.pattern, fix=fix)
    sizes = compute_split_sizes(len(paths), fractions)
    class_names = _stored_names(paths, data) or tuple(data.class_names)
    source = RecordSource(data, len(class_names), cache_dir, log_message)
    labels, identities, skipped = read_shards(paths, source)
    shards = [Shard(path, len(labels[path]), 0, len(labels[path])) for path in paths]
    test_start, train_start = sizes["validation"], sizes["validation"] + sizes["test"]
    ranges = {"train": shards[train_start:], "validation": shards[:test_start], "test": shards[test_start:train_start]}
    splits = {name: build_split(name, ranges[name], labels, source, skipped) for name in SPLITS if ranges[name]}
    name = os.path.basename(os.path.dirname(paths[0])) or "tfrecords"
    return RawData(name, class_names, splits, identities, skipped)


def _stored_names(paths: list[str], data: Data) -> tuple[str, ...]:
    """Return the class names that the folders of the shards store, as TFDS does, for labels that are indexes; or ().

    Raises DataError if two folders number their classes differently.
    """
    names: dict[str, tuple[str, ...]] = {}
    for folder in {os.path.dirname(path): None for path in paths} if data.label_kind == "index" else ():
        with suppress(OSError, UnicodeDecodeError):  # without names, or none that TFDS could read
            stored = Path(folder, f"{data.label_field}.labels.txt").read_text().splitlines()
            names[folder] = tuple(map(normalize_class_name, filter(None, stored)))
    if len(set(names.values())) > 1:
        (one, first), (other, second) = [*{v: (k, v) for k, v in names.items()}.values()][:2]
        differ = (
            f"{escape_unprintable(one)} has {join_first(first)}, {escape_unprintable(other)} has {join_first(second)}"
        )
        problem = f"matches folders whose classes are numbered differently: {differ}"
        raise DataError(problem, key="data.pattern", value=data.pattern, fix="give a pattern of one of them")
    return next(iter(names.values()), ())
