"""The images of one split, decoded once and kept (in memory or on disk), or decoded anew whenever they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import tensorflow as tf

from trainer.data.decoding import Resize, block_dataset, decoded_rows, decoder, plain
from trainer.data.host import fresh_array, usable_cpus
from trainer.data.order import Block, sequence_blocks
from trainer.data.shard_gate import Gate, LocalShards, Read, rows_ahead, sequence_reads
from trainer.errors import DataError
from trainer.features.store import Features
from trainer.storage.shard_cache import ShardCache
from trainer.types import Split

Cache = Literal["auto", "memory", "disk", "none"]
Note = Callable[[str], None]
# An error of these kinds is never the fault of an image.
_NOT_DATA = (
    tf.errors.ResourceExhaustedError,
    tf.errors.UnavailableError,
    tf.errors.CancelledError,
    tf.errors.AbortedError,
)
_NOTES = 20  # skipped images that are named one by one
_BATCH = 64  # images decoded at once, and written to a cache
_FORMAT = 2  # of the cache on disk; counts up when decoding changes


@dataclass
class Pixels:
    """Where the pixels of a split come from. Batches are the same bits whichever way that is."""

    split: Split
    size: int  # side of an image, pixels
    resize: Resize
    on_error: Literal["fail", "skip"]
    threads: int
    note: Note
    check: Callable[[], None] = lambda: None  # called while a cache is filled; raises to leave
    array: np.ndarray | None = None  # uint8 [count + 1, S, S, 3], the last one black; None: decoded when read
    kept: Literal["memory", "disk", "none"] = "none"
    shards: ShardCache | None = None  # where the shards come from while they are read; None: all of them are local
    known_bad: dict[int, str] = field(default_factory=dict)
    filled: int = 0  # images that went into a cache so far
    failures: IO[str] = field(default_factory=partial(tempfile.NamedTemporaryFile, "r", prefix="kubetune-failures-"))

    @property
    def bad(self) -> dict[int, str]:
        """Index -> reason of the images that could not be read so far; they count nowhere (weight 0)."""
        self.take_note()
        return self.known_bad

    def take_note(self) -> None:
        """Learn, and say, what the pipeline could not read since the last time."""
        for line in self.failures:
            index = int(line)
            if index not in self.known_bad:
                self.known_bad[index] = reason_for(self, index)
                if len(self.known_bad) <= _NOTES:
                    self.note(f"skipped {self.split.name_of(index)}: {self.known_bad[index]}")
                if len(self.known_bad) == _NOTES:
                    self.note("further skipped images are only counted")

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory this takes: what is left of a budget for the next split."""
        return self.array.nbytes if self.array is not None and self.kept == "memory" else 0

    def tensor(self) -> tf.Tensor:
        """`array` as a tensor over the same memory (DLPack): nothing is copied, and pages of a file load on demand."""
        assert self.array is not None
        with tf.device("CPU:0"):
            return tf.experimental.dlpack.from_dlpack(self.array.__dlpack__())

    def rows_of(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        """In a pipeline: the images [b, S, S, 3] out of `tensor()` for int64 [b]; `split.count` stands for padding."""
        return tf.gather(tensor, index)

    def gate(self, reader: str, reads: Iterator[Read], ahead: int) -> Gate:
        """What a pipeline over these images has to wait at; the arguments are those of `Gate`."""
        shards = self.shards or (LocalShards() if self.split.shards else None)
        return Gate(None if self.array is not None else shards, self.split, reader, reads, ahead)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The images of these examples, uint8 [k, S, S, 3]; one that cannot be decoded is black.

        Raises:
            DataError: as `data_errors`, unless damaged images are skipped.
        """
        if self.array is not None:
            return np.array(self.array[indices])
        chosen, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        none = np.zeros((0, self.size, self.size, 3), np.uint8)
        with data_errors(self):
            # Few shards may be there at a time, and neighbours here can lie in many.
            return np.concatenate([none, *_decoded(self, chosen, "rows", 1 if self.shards else _BATCH)])[place]


# ---------------------------------------------------------------------------------------------------------------
# What cannot be read


def _sentence(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of graph nodes around it."""
    text = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]|name:\s*$", "", str(error.message).splitlines()[0])
    return text.strip().rstrip(".")


def reason_for(pixels: Pixels, index: int) -> str:
    """Why an example cannot be read: it is tried once more."""
    split, row = pixels.split, {"index": tf.constant(index, tf.int64)}
    try:
        if split.shards:
            path, _, number = split.name_of(index).rpartition("#")
            if pixels.shards:
                pixels.shards.require("one", [os.path.basename(path)])
            found = list(tf.data.TFRecordDataset(path).skip(int(number)).take(1))
            if not found:
                return "the shard breaks off before this record"
            row["record"] = found[0]
        decoder(split, pixels.size, pixels.resize)(row)
    except tf.errors.OpError as error:
        return _sentence(error)
    return "could not be read at first, but can be now"


def _first_unreadable(pixels: Pixels, start: int) -> int | None:
    """The first example from index `start` on that cannot be read; tries them all, in parallel."""
    probe = Pixels(
        pixels.split,
        pixels.size,
        pixels.resize,
        "skip",
        pixels.threads,
        lambda _: None,
        pixels.check,
        shards=pixels.shards,
    )
    for _ in _all_from(probe, start):
        if probe.bad:
            return min(probe.bad)
    return None


@contextmanager
def data_errors(pixels: Pixels | Features) -> Iterator[None]:
    """Around every loop over batches of `pixels`: what TensorFlow raises for damaged data becomes a `DataError`.

    TensorFlow does not say which example it was. So the split is searched for it, which can take as long as an epoch;
    images that were decoded beforehand never get here.

    Raises:
        DataError: names the image file, or shard and record, and the reason.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if isinstance(pixels, Features):
            raise
        from_pipeline = pixels.array is None and re.search("Iterator|Dataset", str(error.message))
        if not from_pipeline or isinstance(error, _NOT_DATA):
            raise
        if not pixels.filled:
            pixels.note(f"an image of {pixels.split.name} cannot be read; looking for it")
        index = _first_unreadable(pixels, pixels.filled)
        if index is None:
            raise
        fault = f"cannot decode {pixels.split.name_of(index)}: {reason_for(pixels, index)}"
        raise DataError(f"{fault}; repair or remove it, or set data.on_error=skip") from None


# ---------------------------------------------------------------------------------------------------------------
# Decoding once and keeping


def live_rows(pixels: Pixels, block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """The rows of blocks 0, 1, ... decoded as they are read; see `decoded_rows`."""
    failures = pixels.failures.name if pixels.on_error == "skip" else None
    blocks = block_dataset(block, count)
    return decoded_rows(blocks, pixels.split, pixels.size, pixels.resize, threads=pixels.threads, failures=failures)


def _decoded(pixels: Pixels, chosen: np.ndarray, reader: str, rows: int = _BATCH) -> Iterator[np.ndarray]:
    """The images of these examples, increasing indices, uint8 [<= rows, S, S, 3] at a time."""
    count, block = sequence_blocks(pixels.split, chosen, 1)
    gate = pixels.gate(reader, sequence_reads(pixels.split, chosen, 1), rows_ahead(rows, pixels.threads, 2))
    batches = iter(live_rows(pixels, block, count).map(plain(lambda row: row["image"])).batch(rows).prefetch(2))
    for _ in range(0, len(chosen), rows):
        gate.before(rows)
        yield next(batches).numpy()
        pixels.check()
        pixels.take_note()
    del batches
    gate.close()


def _all_from(pixels: Pixels, start: int = 0) -> Iterator[np.ndarray]:
    """Every image from index `start` on, to be kept."""
    for images in _decoded(pixels, np.arange(start, pixels.split.count, dtype=np.int64), "filling"):
        yield images
        pixels.filled += len(images)


def _fill_memory(pixels: Pixels, shape: tuple[int, ...]) -> None:
    array = fresh_array(shape, np.dtype(np.uint8))
    done = 0
    for images in _all_from(pixels):
        array[done : done + len(images)] = images
        done += len(images)
    pixels.array, pixels.kept = array, "memory"


def _open_stored(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> bool:
    """Use the cache that an earlier run completed, if there is one."""
    data, about = stem.with_suffix(".u8"), stem.with_suffix(".json")
    try:
        bad = json.loads(about.read_text())["bad"]
        if data.stat().st_size != int(np.prod(shape)) or (bad and pixels.on_error == "fail"):
            return False
        # Copy on write: DLPack takes only writable memory, and nobody writes.
        pixels.array, pixels.kept = np.memmap(data, np.uint8, "c", shape=shape), "disk"
    except (OSError, ValueError, KeyError):
        return False
    pixels.known_bad.update({int(index): reason for index, reason in bad.items()})
    return True


def _fill_disk(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> None:
    """Write beside, rename when complete; the small file that speaks of the bad ones comes last and means done."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for name, write in ((".u8", _all_from(pixels)), (".json", None)):
        handle, partial = tempfile.mkstemp(prefix=stem.name, suffix=".partial", dir=stem.parent)
        try:
            with os.fdopen(
                handle, "wb"
            ) as file:  # plain writes: a full disk under a mapped file would kill the process
                for images in write or ():
                    file.write(images.data)
                file.write(bytes(shape[1] * shape[2] * 3) if write else json.dumps({"bad": pixels.bad}).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, stem.with_suffix(name))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def cache_name(split: Split, size: int, resize: Resize, fingerprint: str) -> str:
    """A name for the pixels of a split that no other pixels have."""
    # Shards are told apart by the fingerprint; the folder they lie in may be another one at the next start.
    ranges = (f"{os.path.basename(shard.path)} {shard.start} {shard.stop}" for shard in split.shards)
    members = [*split.files, *ranges, split.image_field]
    parts = (_FORMAT, fingerprint, split.name, split.count, size, resize, *members)
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return f"pixels-{split.name}-{size}-{digest}"


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def open_pixels(
    split: Split,
    *,
    size: int,
    resize: Resize,
    cache: Cache,
    cache_dir: Path,
    fingerprint: str,
    memory_budget: int,
    disk_budget: int,
    threads: int | None,
    on_error: Literal["fail", "skip"],
    note: Note,
    check: Callable[[], None] = lambda: None,
    shards: ShardCache | None = None,
    why_none: str = "as asked",
) -> Pixels:
    """Decide where the decoded images of a split live, and put them there.

    `auto` takes memory if they fit its budget, else disk if they fit that, else nothing is kept. A budget is in bytes
    and does not bind `memory` or `disk` asked for by name. The cache on disk serves later runs; a fill that was killed
    is done again. Where the disk cannot be written, images are decoded when they are read. `note` is told what was
    chosen and why, and each image that is skipped; `check` is called between batches and may raise to leave. Record
    shards come from `shards` while they are read; None: they are local.

    Raises:
        DataError: `on_error` is "fail" and an image cannot be decoded, or a shard is damaged.
    """
    pixels = Pixels(split, size, resize, on_error, threads or usable_cpus(), note, check, shards=shards)
    shape = (split.count + 1, size, size, 3)
    needed, stem = int(np.prod(shape)), cache_dir / cache_name(split, size, resize, fingerprint)
    what = f"decoded {split.name} images ({split.count:,} at {size} px, {megabytes(needed)})"
    fits_memory, fits_disk = needed <= memory_budget, needed <= disk_budget
    budgets = f"memory budget {megabytes(memory_budget)}, disk budget {megabytes(disk_budget)}"
    with data_errors(pixels):
        if cache == "memory" or (cache == "auto" and fits_memory):
            note(f"{what}: kept in memory" + (f" ({budgets})" if cache == "auto" else ""))
            _fill_memory(pixels, shape)
        elif cache == "disk" or (cache == "auto" and fits_disk):
            if _open_stored(pixels, stem, shape):
                note(f"{what}: taken from {stem}.u8, made by an earlier run")
                return pixels
            note(f"{what}: kept in {stem}.u8" + (f" ({budgets})" if cache == "auto" else ""))
            try:
                _fill_disk(pixels, stem, shape)
            except OSError as error:
                pixels.filled = 0
                free = shutil.disk_usage(Path(cache_dir).anchor or "/").free
                note(f"{what}: cannot be kept in {cache_dir} ({error.strerror}, {megabytes(free)} free); decoding anew")
                return pixels
            _open_stored(pixels, stem, shape)
        else:
            why = why_none if cache == "none" else f"they fit neither {budgets.replace(', ', ' nor ')}"
            note(f"{what}: not kept, decoded whenever they are read ({why})")
    return pixels
