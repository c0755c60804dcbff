"""Build splits of examples, select examples from them, hash them, and read the labels of TFRecord shards."""

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
    NOT_LABELLED_SUFFIX,
    LabelFields,
    index_shard,
    join_first,
    make_label_error,
    make_unreadable_error,
    read_labels,
)
from trainer.data.sharding import count_shard_records
from trainer.data.tfds_folder import read_manifest_and_labels
from trainer.errors import DataError, format_count
from trainer.monitoring.health import health
from trainer.names import encode_file_name, escape_unprintable, normalize_class_name
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import write_atomically
from trainer.storage.staging import has_wildcard
from trainer.types import LogMessage, Shard, Split

SPLITS = ("train", "validation", "test")


@dataclass
class RawData:
    """A dataset as its source provides it, before the selections and checks that are the same for all sources."""

    name: str  # of the dataset
    class_names: tuple[str, ...]  # by class index
    splits: dict[str, Split]  # train, and validation and test if there are any
    identities: dict[str, str]  # path of a file or shard -> "NAME BYTES HASH", where HASH covers all bytes or both ends
    skipped: list[str] = field(default_factory=list)  # unreadable files and records, each with the reason
    notes: list[str] = field(default_factory=list)  # log lines about the dataset
    ignored: dict[int, str] = field(default_factory=dict)  # class index -> description of its files that are not images
    group_names: tuple[str, ...] | None = None  # of the values 0, 1, ... of data.group_field; None without such names


def digest_head_and_tail(path: str | Path, length: int) -> tuple[int, bytes, str]:
    """Read the first and the last `length` bytes of a file.

    Returns:
        The file's size in bytes, its first `length` bytes, and a hash of both ends, 16 hex digits.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)  # a Python file object would take twice as long
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, length, 0)
        tail = os.pread(descriptor, length, max(len(head), size - length))  # the ends of a short file do not overlap
    finally:
        os.close(descriptor)
    return size, head, hashlib.sha256(head + tail).hexdigest()[:16]


def list_unused_fractions(data: Data, existing: Container[str]) -> list[str]:
    """Return a note for each configured split fraction that is not used because the dataset already has the split.

    A fraction counts as configured unless it is 0 or the default.

    Args:
        existing: names of the splits that the dataset has.
    """
    notes = []
    for name in ("validation", "test"):
        fraction, default = getattr(data, key := f"{name}_fraction"), Data.model_fields[f"{name}_fraction"].default
        if name in existing and fraction not in (0, default):
            notes.append(f"data.{key}={fraction:g} is not used: the data has a {name} split")
    return notes


def describe_class_counts(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Describe the number of examples in total and in each of the ten rarest classes, such as "7 (cat 3, dog 4)"."""
    counts = np.bincount(labels, minlength=len(class_names))
    class_indices = np.arange(len(counts)) if len(counts) <= 10 else np.sort(np.argsort(counts, kind="stable")[:10])
    ellipsis = ", ..." if len(counts) > 10 else ""
    return f"{len(labels)} ({', '.join(f'{class_names[i]} {counts[i]}' for i in class_indices)}{ellipsis})"


def select_examples(split: Split, indices: np.ndarray) -> Split:
    """Return a split with only the examples at `indices`, int [k], which must be increasing if the split has shards."""
    labels = split.labels[indices]
    if split.groups is not None:
        split = replace(split, groups=tuple(split.groups[i] for i in indices))
    if split.files:
        return replace(split, labels=labels, files=tuple(split.files[i] for i in indices))
    shard_index = np.repeat(np.arange(len(split.shards)), count_shard_records(split))[indices]
    record_index = np.concatenate([np.arange(0), *(np.arange(s.start, s.stop) for s in split.shards)])[indices]
    breaks = np.flatnonzero((np.diff(shard_index) != 0) | (np.diff(record_index) != 1)) + 1
    ranges = [r for r in np.split(np.arange(len(indices)), breaks) if len(r)]  # consecutive records of one shard
    shards = [
        replace(split.shards[shard_index[r[0]]], start=int(record_index[r[0]]), stop=int(record_index[r[-1]]) + 1)
        for r in ranges
    ]
    return replace(split, labels=labels, shards=tuple(shards))


def rank_within_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Shuffle the examples of each class, and return each example's rank in its class, from 0, int64 [n].

    Args:
        labels: class index of each example, int [n].
    """
    shuffled = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    sorted_by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[sorted_by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def select_per_class(split: Split, limit: int, seed: int) -> Split:
    """Select at most `limit` random examples of each class, and retain their order."""
    return select_examples(split, np.flatnonzero(rank_within_classes(split.labels, seed) < limit))


def select_at_most(split: Split, limit: int, seed: int) -> Split:
    """Select at most `limit` random examples, and retain their order.

    The classes get equal numbers of examples (or 1 more), except that a class with fewer examples gets all of them.
    """
    if split.count <= limit:
        return split
    return select_examples(split, np.sort(np.argsort(rank_within_classes(split.labels, seed), kind="stable")[:limit]))


def compute_split_sizes(count: int, fractions: dict[str, float]) -> dict[str, int]:
    """Compute the sizes of new splits, by name, from their fractions of `count` examples.

    A size is count * fraction, rounded, but at least 1 if the fraction is above 0. The train split gets the remaining
    examples, and at least one. So if `count` is small, the last splits get fewer examples, or none.
    """
    sizes, remaining = {}, count - 1
    for name, fraction in fractions.items():
        sizes[name] = min(remaining, max(1, round(count * fraction))) if fraction > 0 else 0
        remaining -= sizes[name]
    return sizes


def count_overlap(first: Split, second: Split) -> int:
    """Count the records that are in both splits."""
    pairs = [(a, b) for a, b in product(first.shards, second.shards) if a.path == b.path]
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in pairs)


def hash_raw_data(raw: RawData) -> str:
    """Hash class names, splits, labels and file identities to 16 hex digits, which do not depend on the root folder."""
    digest = hashlib.sha256(repr(raw.class_names).encode())
    for name, split in sorted(raw.splits.items()):
        digest.update(repr((name, split.count, split.image_field)).encode())
        for path in split.files:
            digest.update(encode_file_name(raw.identities[path]))
        for shard in split.shards:
            digest.update(repr((raw.identities[shard.path], shard.start, shard.stop)).encode())
        digest.update(split.labels.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


_END_BYTES = 2**16  # number of bytes at each end of a shard that are hashed for its identity if no manifest lists it


@dataclass(frozen=True)
class RecordSource:
    """Settings for reading the shards of a dataset."""

    data: Data
    num_classes: int
    cache_dir: Path  # stores the labels of shards for later runs
    log_message: LogMessage
    streamed: bool = False  # whether shards are not yet local, so that labels are read from the folder's labels file


def read_shards(paths: list[str], source: RecordSource) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Read the labels and identities of shards, or load the labels that an earlier process cached on disk.

    The labels of a shard are cached if all of its records are intact and labelled. In a folder that
    `python -m trainer.prepare` wrote, identities are read from the manifest, so that a dataset has the same fingerprint
    on a local disk and in a bucket. The labels of a local shard are nevertheless read from its records, unless they are
    cached, so that checksums are verified.

    Returns:
        Path -> labels of the shard, int32 [records], -1 for a corrupt or unlabelled record; path -> identity of the
        shard, "NAME BYTES HASH"; and a description of each truncated or corrupt shard, and of each corrupt or
        unlabelled record.

    Raises:
        DataError: a shard cannot be read, or a streamed shard is not in the manifest; a record has no valid image or
            label field; or a shard or record is corrupt or unlabelled, and data.on_error is "fail".
    """
    data = source.data
    class_names = tuple(map(normalize_class_name, data.class_names or ()))
    fields = LabelFields(data.label_field, data.image_field, source.num_classes, data.label_kind, class_names)
    label_format = (data.label_kind, class_names if data.label_kind == "text" else None)
    labels: dict[str, np.ndarray] = {}
    identities: dict[str, str] = {}
    skipped: list[str] = []
    manifests = {folder: read_manifest_and_labels(Path(folder)) for folder in {os.path.dirname(path) for path in paths}}
    for position, path in enumerate(paths):
        health.record_progress()
        name, (entries, stored_labels) = os.path.basename(path), manifests[os.path.dirname(path)]
        if source.streamed:
            if name not in entries:
                problem = f"shard {escape_unprintable(path)} is not in the manifest of its folder"
                raise DataError(problem, fix="prepare the dataset again")
            identities[path], labels[path] = entries[name].identity, stored_labels[name]
            continue
        try:
            stat = os.stat(path)
            has_entry = name in entries and entries[name].bytes == stat.st_size
            digest = "" if has_entry else digest_head_and_tail(path, _END_BYTES)[2]
            identities[path] = entries[name].identity if has_entry else f"{name} {stat.st_size} {digest}"
        except OSError as error:
            raise make_unreadable_error(path, error) from None
        key_fields = (identities[path], stat.st_mtime_ns, fields.label_field, fields.image_field, source.num_classes)
        cache_key = repr(key_fields)
        cache_key += repr(label_format) if data.label_kind != "index" else ""
        cache_file = source.cache_dir / "labels" / f"{hashlib.sha256(cache_key.encode()).hexdigest()[:24]}.npz"
        with suppress(OSError, ValueError, KeyError):  # missing or corrupt: read the shard again
            labels[path] = unpack(cache_file.read_bytes())["labels"]
            continue
        if position % 100 == 0:
            source.log_message(
                f"reading the labels of {len(paths) - position} shards (once, cached in {cache_file.parent})"
            )
        shard_index = index_shard(path)
        labels[path], errors = read_labels(path, shard_index, fields)
        errors += [shard_index.error] if shard_index.error else []
        if not errors:
            with suppress(OSError):  # without cached labels, a later process reads the shard again
                write_atomically(cache_file, pack({"labels": labels[path]}))
        elif data.on_error == "fail":
            raise make_label_error(errors[0], data.label_field)
        skipped += errors
    return labels, identities, skipped


def make_empty_split_error(name: str, content: str, skipped: Sequence[str]) -> DataError:
    """Build the error for a split that the dataset or the configuration defines, but that has no examples.

    Args:
        name: train, validation or test.
        content: a clause that describes the split's content, such as "a.tfrec has 3 records".
        skipped: descriptions of the split's unreadable files or records.
    """
    skipped_clause = f", and {len(skipped)} were skipped as unreadable, the first: {skipped[0]}" if skipped else ""
    fix = "repair them, or remove the split" if skipped else "add examples to it, or use another split"
    return DataError(f"the {name} split has no example: {content}{skipped_clause}", fix=fix)


def build_split(
    name: str, ranges: list[Shard], labels: dict[str, np.ndarray], source: RecordSource, skipped: Sequence[str]
) -> Split:
    """Build a split from the intact and labelled records in `ranges`.

    Args:
        ranges: the record ranges that the split consists of.
        labels: path -> labels of the shard, int32 [records], -1 for a corrupt or unlabelled record.
        skipped: descriptions of all corrupt or unlabelled shards and records of the dataset. The error for an empty
            split lists those of its own shards.

    Raises:
        DataError: no record is intact and labelled, or the number of records in a shard differs from its `Shard.count`
            and data.on_error is "fail".
    """
    shards = []
    for shard in ranges:
        count = len(labels[shard.path])
        if count != shard.count and source.data.on_error == "fail":
            path = escape_unprintable(shard.path)
            problem = f"shard {path} holds {format_count(count, 'record')}, but dataset_info.json lists {shard.count}"
            raise DataError(problem, fix="prepare the dataset again, or set data.on_error=skip to use it nevertheless")
        shards.append(replace(shard, count=count, start=min(shard.start, count), stop=min(shard.stop, count)))
    all_labels = np.concatenate([np.zeros(0, np.int32), *(labels[s.path][s.start : s.stop] for s in shards)])
    split = Split(name, all_labels, shards=tuple(shards), image_field=source.data.image_field)
    readable_indices = np.flatnonzero(all_labels >= 0)
    if not readable_indices.size:
        paths = list(dict.fromkeys(escape_unprintable(shard.path) for shard in ranges))
        content = (
            f"{join_first(paths)} {'has' if len(paths) == 1 else 'have'} {format_count(len(all_labels), 'record')}"
        )
        errors = [error for error in skipped if any(path in error for path in paths)]
        if errors and all(error.endswith(NOT_LABELLED_SUFFIX) for error in errors):
            raise make_label_error(errors[0], source.data.label_field)
        raise make_empty_split_error(name, content, errors)
    return select_examples(split, readable_indices)


def find_matching_files(pattern: str) -> list[str]:
    """Return the files that a glob pattern matches, sorted.

    A path component that exists literally, such as a folder `photos [2024]`, is not a pattern.
    """
    components = pattern.split("/")
    for i, component in enumerate(components):
        if has_wildcard(component) and not os.path.lexists("/".join(components[: i + 1])):
            escaped = [glob.escape(literal) for literal in components[:i]]
            return sorted(filter(os.path.isfile, glob.glob("/".join([*escaped, *components[i:]]), recursive=True)))
    return [pattern] if os.path.isfile(pattern) else []


def open_tfrecords(data: Data, cache_dir: Path, log_message: LogMessage) -> RawData:
    """Open the TFRecord files that match data.pattern, and assign them to splits by the configured fractions.

    In path order, the first files are the validation split, the next files the test split, and all others the train
    split. If labels are class indices from 0 and a shard's folder has a file with class names, as TFDS and
    `python -m trainer.prepare` write it, these names replace data.class_names. Labels are cached in `cache_dir`.

    Raises:
        DataError: no file matches the pattern, there are fewer files than splits, folders store different class names,
            a shard or record cannot be read or has no valid label, or a split has no example.
    """
    assert data.pattern
    assert data.class_names
    paths = find_matching_files(os.path.expanduser(data.pattern))
    if not paths:
        if os.path.isdir(os.path.expanduser(data.pattern)):
            folder_fix = f"set {format_argument('data.pattern', os.path.join(data.pattern, '*.tfrec*'))}"
            raise DataError("is a folder", key="data.pattern", value=data.pattern, fix=folder_fix)
        problem, fix = f"no file matches (searched from {os.getcwd()})", "set the pattern of the shards"
        raise DataError(problem, key="data.pattern", value=data.pattern, fix=fix)
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    names = ["train", *(name for name, fraction in fractions.items() if fraction > 0)]
    if len(paths) < len(names):
        mismatch = f"matches {len(paths)} file{'s' * (len(paths) > 1)}, too few for the splits {', '.join(names)}"
        overrides = " and ".join(f"data.{name}_fraction=0" for name in names[1:])
        fix = f"write more shards (python -m trainer.prepare), or set {overrides}"
        raise DataError(mismatch, key="data.pattern", value=data.pattern, fix=fix)
    split_sizes = compute_split_sizes(len(paths), fractions)
    class_names = _read_class_names(paths, data) or tuple(data.class_names)
    source = RecordSource(data, len(class_names), cache_dir, log_message)
    labels, identities, skipped = read_shards(paths, source)
    shards = [Shard(path, len(labels[path]), 0, len(labels[path])) for path in paths]
    test_start, train_start = split_sizes["validation"], split_sizes["validation"] + split_sizes["test"]
    ranges = {"train": shards[train_start:], "validation": shards[:test_start], "test": shards[test_start:train_start]}
    splits = {name: build_split(name, ranges[name], labels, source, skipped) for name in SPLITS if ranges[name]}
    name = os.path.basename(os.path.dirname(paths[0])) or "tfrecords"
    return RawData(name, class_names, splits, identities, skipped)


def _read_class_names(paths: list[str], data: Data) -> tuple[str, ...]:
    """Return the class names in TFDS's file LABEL_FIELD.labels.txt in the folders of the shards.

    Return () if no folder has such a file, or if labels are not class indices from 0. Raise a DataError if two folders
    number their classes differently.
    """
    names_by_folder: dict[str, tuple[str, ...]] = {}
    for folder in {os.path.dirname(path): None for path in paths} if data.label_kind == "index" else ():
        with suppress(OSError, UnicodeDecodeError):  # there is no such file, or TFDS could not read it either
            lines = Path(folder, f"{data.label_field}.labels.txt").read_text().splitlines()
            names_by_folder[folder] = tuple(map(normalize_class_name, filter(None, lines)))
    if len(set(names_by_folder.values())) > 1:
        (folder1, names1), (folder2, names2) = [*{n: (f, n) for f, n in names_by_folder.items()}.values()][:2]
        difference = (
            f"{escape_unprintable(folder1)} has {join_first(names1)}, "
            f"{escape_unprintable(folder2)} has {join_first(names2)}"
        )
        problem = f"matches folders whose classes are numbered differently: {difference}"
        raise DataError(problem, key="data.pattern", value=data.pattern, fix="give a pattern of one of them")
    return next(iter(names_by_folder.values()), ())
