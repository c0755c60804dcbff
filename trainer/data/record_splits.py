"""Splits over TFRecord shards: their counts, their labels, and what of them cannot be read."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.contracts import Shard, Split
from trainer.data.dataset_folder import known_shards
from trainer.data.records import index_shard, read_labels
from trainer.data.splits import ends_of, take
from trainer.errors import DataError
from trainer.watching.signs import signs

Note = Callable[[str], None]
_ENDS = 2**16  # bytes of each end of a shard that its fingerprint covers


@dataclass(frozen=True)
class RecordSource:
    """How the records of a source are to be read."""

    image_field: str
    label_field: str
    classes: int
    cache_dir: Path  # labels of shards that were read before
    on_error: str  # fail | skip
    note: Note
    arriving: bool = False  # the shards come from a bucket while they are used: what the folder says of them must do


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
        signs.moved()
        name, (entries, known_labels) = os.path.basename(path), known[os.path.dirname(path)]
        if source.arriving:
            if name not in entries:
                raise DataError(f"the manifest beside shard {path} does not name it; prepare the dataset again")
            facts[path], labels[path] = entries[name].facts, known_labels[name]
            continue
        try:
            size, changed = os.path.getsize(path), os.stat(path).st_mtime_ns
            if name in entries and entries[name].bytes == size:
                facts[path] = entries[name].facts
            else:
                facts[path] = f"{name} {size} {ends_of(path, _ENDS)[2]}"
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
            advice = (
                "" if "data.on_error" in faults[0] else "; write it again, or set data.on_error=skip to leave it out"
            )
            raise DataError(faults[0] + advice)
        skipped += [fault.split("; ")[0].split(": fetch")[0] for fault in faults]
        if not faults:
            cached.parent.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_suffix(f".{uuid.uuid4().hex}.tmp")
            with open(temporary, "wb") as file:
                np.save(file, labels[path])
            os.replace(temporary, cached)
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
    whole = Split(
        name, np.concatenate([np.zeros(0, np.int32), *parts]), shards=tuple(shards), image_field=source.image_field
    )
    return take(whole, np.flatnonzero(whole.labels >= 0))
