"""Compute dataset fingerprints, the hashes by which a run recognizes the data that it began with.

Every fingerprint covers the class names, the labels, and the name and size of each file. There are three kinds: "ends"
also covers the first and last bytes of each file (for prepared shards, the checksum in the manifest), "sample" covers
blocks spread over the file, and "content" covers all of its bytes.
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

MAX_FULL_READ_BYTES = 1 << 30  # with data.fingerprint=auto, a dataset of at most this size is read completely
_BLOCK_BYTES = 4096  # size of a sampled block
_MAX_BLOCKS = 16  # sampled blocks per file
_READ_BYTES = 1 << 20  # size of a read of a whole file
_FILES_PER_TASK = 32  # scheduling a task costs more than reading one small file
_SETTLED_NS = 2 * 10**9  # a file modified this recently could change again without a new modification time

Kind = Literal["content", "sample"]


def compute_fingerprints(
    raw: RawData, setting: Literal["auto", "content"], cache_dir: Path, streamed: bool, log_message: LogMessage
) -> dict[str, str]:
    """Compute the fingerprints of a dataset, and log the most thorough one.

    Checksums are cached by path, size, times and inode of the file, so that an unchanged file is read only once. A file
    that was moved or touched is read again, and has the same fingerprint.

    Args:
        setting: data.fingerprint. "auto" reads only a sample of the files if they have more than `MAX_FULL_READ_BYTES`.
        cache_dir: folder below which the checksums are cached.
        streamed: whether the shards are in a bucket. The bucket has then confirmed the checksums in their manifest, so
            that nothing is read or logged.

    Returns:
        The fingerprints (16 hex digits) by kind: "ends", and then either "content" or "sample".
    """
    splits = raw.splits.values()
    paths = sorted({path for s in splits for path in (*s.files, *(shard.path for shard in s.shards))})
    fingerprints = {"ends": hash_raw_data(raw)}
    if streamed:
        return fingerprints | {"content": fingerprints["ends"]}
    stats = {path: stat for path in paths if (stat := _stat(path))}
    size = sum(stat.st_size for stat in stats.values())
    kind: Kind = "content" if setting == "content" or size <= MAX_FULL_READ_BYTES else "sample"
    checksums = _compute_checksums(stats, kind, cache_dir)
    identities = {path: _format_identity(raw, path, stats, checksums) for path in paths}
    fingerprint = hash_raw_data(replace(raw, identities=identities))
    coverage = "content" if kind == "content" else "samples (data.fingerprint=content: all bytes)"
    files = f"{len(paths):,} file{'s' * (len(paths) != 1)}"
    log_message(f"data fingerprint: {fingerprint}, of the {coverage} of {files}, {size / 1e6:,.1f} MB")
    return fingerprints | {kind: fingerprint}


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # decoding reports the file
        return None


def _format_identity(raw: RawData, path: str, stats: dict[str, os.stat_result], checksums: dict[str, int]) -> str:
    """Format "NAME SIZE CHECKSUM", as in the manifest of prepared shards, or "NAME unreadable"."""
    name = raw.identities[path].rsplit(" ", 2)[0]
    return f"{name} {stats[path].st_size} {checksums[path]:08x}" if path in checksums else f"{name} unreadable"


def _compute_checksums(stats: dict[str, os.stat_result], kind: Kind, cache_dir: Path) -> dict[str, int]:
    """Return the checksum of each readable file by path. The checksums of unchanged files come from the cache."""
    keys = {path: _hash_stat(path, stat) for path, stat in stats.items()}
    cache_file = cache_dir / "checksums" / f"{kind}-{_digest(os.path.commonpath(stats), 8).hex() if stats else ''}.npz"
    stored = _read_table(cache_file)
    uncached = [path for path in stats if keys[path] not in stored]
    checksum = partial(_compute_checksum, read=_read_whole if kind == "content" else _read_sample)

    def checksum_batch(first: int) -> list[int | None]:
        health.record_progress()
        return [checksum(path) for path in uncached[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each read costs a round trip
        values = chain.from_iterable(pool.map(checksum_batch, range(0, len(uncached), _FILES_PER_TASK)))
        computed = {path: value for path, value in zip(uncached, values, strict=True) if value is not None}
    checksums = {path: stored[keys[path]] for path in stats if keys[path] in stored} | computed
    max_mtime = time.time_ns() - _SETTLED_NS
    if computed:
        _write_table(cache_file, {keys[p]: value for p, value in checksums.items() if stats[p].st_mtime_ns < max_mtime})
    return checksums


def _compute_checksum(path: str, read: Callable[[int, int], Iterable[bytes]]) -> int | None:
    """Return the CRC32C of the blocks that `read(descriptor, size)` yields for a file.

    Return None if the file is unreadable. The error is reported when the file is decoded.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            crc = 0
            for block in read(descriptor, os.fstat(descriptor).st_size):
                crc = google_crc32c.extend(crc, block)
            return crc
        finally:
            os.close(descriptor)
    except OSError:
        return None


def _read_whole(descriptor: int, _size: int) -> Iterable[bytes]:
    while block := os.read(descriptor, _READ_BYTES):
        health.record_progress()
        yield block


def _read_sample(descriptor: int, size: int) -> Iterable[bytes]:
    """Yield evenly spaced blocks of a file, including the first and the last one. Read a small file completely."""
    count = min(_MAX_BLOCKS, 3 + size // _READ_BYTES)
    if size <= count * _BLOCK_BYTES:
        return _read_whole(descriptor, size)
    return (os.pread(descriptor, _BLOCK_BYTES, i * (size - _BLOCK_BYTES) // (count - 1)) for i in range(count))


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(os.fsencode(text), digest_size=size).digest()


def _hash_stat(path: str, stat: os.stat_result) -> int:
    """Hash the path of a file, and the fields of its stat result that change with its content."""
    fields = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    return int.from_bytes(_digest(f"{os.path.abspath(path)} {fields}", 8), "big")


def _read_table(file: Path) -> dict[int, int]:
    """Read the cached checksums by `_hash_stat`. Return {} if the file is missing or corrupt."""
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
