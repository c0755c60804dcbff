"""Dataset fingerprints, the hashes by which a run recognizes the data that it began with.

There are three kinds. In addition to the name and size of each file, "ends" covers its first and last bytes (or, for
prepared shards, the checksum in the manifest), "sample" blocks spread over the file, and "content" the whole file.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np

from trainer.data.splits import RawData, hash_raw_data
from trainer.monitoring.health import health
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import write_atomically
from trainer.types import LogMessage

WHOLE_BYTES = 1 << 30  # by default, a dataset of at most this size is read completely
_BLOCK_BYTES = 4096  # size of a sampled block
_MAX_BLOCKS = 16  # per file
_READ_BYTES = 1 << 20
_FILES_PER_TASK = 32
_SETTLED_NS = 2 * 10**9  # a file modified this recently could change again without a new modification time

Kind = Literal["content", "sample"]


def compute_fingerprints(
    raw: RawData, setting: Literal["auto", "content"], cache_dir: Path, streamed: bool, log_message: LogMessage
) -> dict[str, str]:
    """Return the fingerprints of a dataset (16 hex digits) by kind: "ends", and either "content" or "sample".

    The kind is "content" if `setting` is, if the files have at most `WHOLE_BYTES`, or if the shards are `streamed`: the
    bucket has confirmed the checksums in their manifest. Checksums are cached in `cache_dir` by file path, size and
    times, so an unchanged file is read once. A file that was moved or touched is read again, and has the same
    fingerprint.
    """
    splits = raw.splits.values()
    paths = sorted({path for s in splits for path in (*s.files, *(shard.path for shard in s.shards))})
    weakest = {"ends": hash_raw_data(raw)}
    if streamed:
        return weakest | {"content": weakest["ends"]}
    statuses = {path: status for path in paths if (status := _stat(path))}
    size = sum(status.st_size for status in statuses.values())
    kind: Kind = "content" if setting == "content" or size <= WHOLE_BYTES else "sample"
    checksums = _compute_checksums(statuses, kind, cache_dir)
    identities = {path: _format_identity(raw, path, statuses, checksums) for path in paths}
    value = hash_raw_data(replace(raw, identities=identities))
    coverage = "content" if kind == "content" else "samples (data.fingerprint=content: all bytes)"
    files = f"{len(paths):,} file{'s' * (len(paths) != 1)}"
    log_message(f"data fingerprint: {value}, of the {coverage} of {files}, {size / 1e6:,.1f} MB")
    return weakest | {kind: value}


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # decoding reports the file
        return None


def _format_identity(raw: RawData, path: str, statuses: dict[str, os.stat_result], checksums: dict[str, int]) -> str:
    """Format file name, size and checksum, as in the manifest of prepared shards."""
    name = raw.identities[path].rsplit(" ", 2)[0]
    return f"{name} {statuses[path].st_size} {checksums[path]:08x}" if path in checksums else f"{name} unreadable"


def _compute_checksums(statuses: dict[str, os.stat_result], kind: Kind, cache_dir: Path) -> dict[str, int]:
    """Compute the checksum of each readable file. Those of unchanged files are read from the cache."""
    keys = {path: _hash_status(path, status) for path, status in statuses.items()}
    table = cache_dir / "checksums" / f"{kind}-{_digest(os.path.commonpath(statuses), 8).hex() if statuses else ''}.npz"
    known = _read_table(table)
    new = [path for path in statuses if keys[path] not in known]
    checksum = partial(_compute_checksum, read=_read_whole if kind == "content" else _read_sample)

    def checksum_batch(first: int) -> list[int | None]:
        health.record_progress()
        return [checksum(path) for path in new[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each read costs a round trip
        values = chain.from_iterable(pool.map(checksum_batch, range(0, len(new), _FILES_PER_TASK)))
        computed = {path: value for path, value in zip(new, values, strict=True) if value is not None}
    result = {path: known[keys[path]] for path in statuses if keys[path] in known} | computed
    settled = time.time_ns() - _SETTLED_NS
    if computed:
        _write_table(table, {keys[p]: value for p, value in result.items() if statuses[p].st_mtime_ns < settled})
    return result


def _compute_checksum(path: str, read: Callable[[int, int], Iterable[bytes]]) -> int | None:
    """Compute the CRC32C of what `read(handle, size)` yields. None if the file is unreadable: decoding reports it."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            crc = 0
            for block in read(handle, os.fstat(handle).st_size):
                crc = google_crc32c.extend(crc, block)
            return crc
        finally:
            os.close(handle)
    except OSError:
        return None


def _read_whole(handle: int, _size: int) -> Iterable[bytes]:
    while block := os.read(handle, _READ_BYTES):
        health.record_progress()
        yield block


def _read_sample(handle: int, size: int) -> Iterable[bytes]:
    """Yield evenly spaced blocks, including the first and the last one, or the whole of a small file."""
    count = min(_MAX_BLOCKS, 3 + size // _READ_BYTES)
    if size <= count * _BLOCK_BYTES:
        return _read_whole(handle, size)
    return (os.pread(handle, _BLOCK_BYTES, i * (size - _BLOCK_BYTES) // (count - 1)) for i in range(count))


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(os.fsencode(text), digest_size=size).digest()


def _hash_status(path: str, status: os.stat_result) -> int:
    """Hash the path of a file, and the fields of its status that change with its content."""
    times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return int.from_bytes(_digest(f"{os.path.abspath(path)} {times}", 8), "big")


def _read_table(file: Path) -> dict[int, int]:
    """Read the checksums by key. Empty if the file is missing or corrupt."""
    try:
        arrays = unpack(file.read_bytes())
        return dict(zip(arrays["keys"].tolist(), arrays["checksums"].tolist(), strict=True))
    except (OSError, ValueError, KeyError):
        return {}


def _write_table(file: Path, checksums: dict[int, int]) -> None:
    keys, values = np.array(list(checksums), np.uint64), np.array(list(checksums.values()), np.uint32)
    try:
        write_atomically(file, pack({"keys": keys, "checksums": values}))
    except OSError:  # a full or read-only disk: the next start reads the files again
        return
