"""Compute dataset fingerprints, hashes by which a run recognizes that its dataset has not changed since it began.

Every fingerprint covers the class names, the labels, and the name and size of each file. There are three kinds: "ends"
also covers each file's first and last bytes (for a prepared shard, its checksum in the manifest), "sample" also covers
blocks spread over each file, and "content" also covers all of its bytes.
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
from trainer.errors import format_count
from trainer.monitoring.health import health
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import write_atomically
from trainer.types import LogMessage

MAX_FULL_READ_BYTES = 1 << 30  # with data.fingerprint=auto, a dataset of at most this size is read completely
_BLOCK_BYTES = 4096  # size of a sampled block
_MAX_BLOCKS = 16  # sampled blocks per file
_READ_BYTES = 1 << 20  # bytes per read if a file is read completely
_FILES_PER_TASK = 32  # files that a thread reads in one task; scheduling a task costs more than reading one small file
_SETTLED_NS = 2 * 10**9  # a file modified more recently than this could change without a new modification time

Kind = Literal["content", "sample"]


def compute_fingerprints(
    raw: RawData, setting: Literal["auto", "content"], cache_dir: Path, streamed: bool, log_message: LogMessage
) -> dict[str, str]:
    """Compute the fingerprints of a dataset, and log the most thorough one.

    Checksums are cached by a file's path, size, times and inode, so that an unchanged file is read only once. A file
    that was moved or touched is read again, and the fingerprints stay the same.

    Args:
        setting: data.fingerprint. "auto" reads a sample of each file if all files have more than `MAX_FULL_READ_BYTES`.
        cache_dir: folder below which the checksums are cached.
        streamed: whether the shards are in a bucket. Then nothing is read or logged, because the checksums in their
            manifest have already been compared with the bucket's checksums.

    Returns:
        The fingerprints (16 hex digits) by kind: first "ends", then either "content" or "sample".
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
    file_count = format_count(len(paths), "file")
    log_message(f"data fingerprint: {fingerprint}, of the {coverage} of {file_count}, {size / 1e6:,.1f} MB")
    return fingerprints | {kind: fingerprint}


def _stat(path: str) -> os.stat_result | None:
    """Return the file status of a path, or None if it cannot be read."""
    try:
        return os.stat(path)
    except OSError:  # the file is reported when it is decoded
        return None


def _format_identity(raw: RawData, path: str, stats: dict[str, os.stat_result], checksums: dict[str, int]) -> str:
    """Format a file's identity: "NAME SIZE CHECKSUM", as in the manifest of prepared shards, or "NAME unreadable"."""
    name = raw.identities[path].rsplit(" ", 2)[0]
    return f"{name} {stats[path].st_size} {checksums[path]:08x}" if path in checksums else f"{name} unreadable"


def _compute_checksums(stats: dict[str, os.stat_result], kind: Kind, cache_dir: Path) -> dict[str, int]:
    """Return the checksum of each readable file by path. The checksums of unchanged files are read from the cache."""
    keys = {path: _hash_stat(path, stat) for path, stat in stats.items()}
    folder_digest = _digest(os.path.commonpath(stats), size=8).hex() if stats else ""
    cache_file = cache_dir / "checksums" / f"{kind}-{folder_digest}.npz"
    stored_checksums = _read_cache(cache_file)
    uncached_paths = [path for path in stats if keys[path] not in stored_checksums]
    checksum = partial(_compute_checksum, read=_read_all_bytes if kind == "content" else _read_sampled_blocks)

    def checksum_batch(first: int) -> list[int | None]:
        health.record_progress()
        return [checksum(path) for path in uncached_paths[first : first + _FILES_PER_TASK]]

    with ThreadPoolExecutor(16) as pool:  # on a network disk each read costs a round trip
        values = chain.from_iterable(pool.map(checksum_batch, range(0, len(uncached_paths), _FILES_PER_TASK)))
        new_checksums = {path: value for path, value in zip(uncached_paths, values, strict=True) if value is not None}
    checksums = {path: stored_checksums[keys[path]] for path in stats if keys[path] in stored_checksums} | new_checksums
    max_ns = time.time_ns() - _SETTLED_NS
    if new_checksums:
        _write_cache(cache_file, {keys[p]: value for p, value in checksums.items() if stats[p].st_mtime_ns < max_ns})
    return checksums


def _compute_checksum(path: str, read: Callable[[int, int], Iterable[bytes]]) -> int | None:
    """Return the CRC32C of the blocks of a file that `read(descriptor, size)` yields; `size` is the file size in bytes.

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


def _read_all_bytes(descriptor: int, _size: int) -> Iterable[bytes]:
    """Yield all bytes of a file, in blocks."""
    while block := os.read(descriptor, _READ_BYTES):
        health.record_progress()
        yield block


def _read_sampled_blocks(descriptor: int, size: int) -> Iterable[bytes]:
    """Yield evenly spaced blocks of a file, including the first and the last one. Read a small file completely."""
    count = min(_MAX_BLOCKS, 3 + size // _READ_BYTES)
    if size <= count * _BLOCK_BYTES:
        return _read_all_bytes(descriptor, size)
    return (os.pread(descriptor, _BLOCK_BYTES, i * (size - _BLOCK_BYTES) // (count - 1)) for i in range(count))


def _digest(text: str, size: int) -> bytes:
    """Hash a text to `size` bytes."""
    return hashlib.blake2b(os.fsencode(text), digest_size=size).digest()


def _hash_stat(path: str, stat: os.stat_result) -> int:
    """Hash a file's path, and the fields of its stat result that change with its content, to 64 bits."""
    fields = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    return int.from_bytes(_digest(f"{os.path.abspath(path)} {fields}", size=8), "big")


def _read_cache(file: Path) -> dict[int, int]:
    """Read the cached checksums, by result of `_hash_stat`. Return {} if `file` is missing or corrupt."""
    try:
        arrays = unpack(file.read_bytes())
        return dict(zip(arrays["keys"].tolist(), arrays["checksums"].tolist(), strict=True))
    except (OSError, ValueError, KeyError):
        return {}


def _write_cache(file: Path, checksums: dict[int, int]) -> None:
    """Cache checksums, by result of `_hash_stat`. If the disk fails, they are not cached."""
    keys, values = np.array(list(checksums), np.uint64), np.array(list(checksums.values()), np.uint32)
    try:
        write_atomically(file, pack({"keys": keys, "checksums": values}))
    except OSError:  # a full or read-only disk: the next process reads the files again
        return
