"""The images of one split, decoded once and kept (in memory or on disk), or decoded anew whenever they are read."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.contracts import Split
from trainer.data.decode import block_dataset, decoded_rows, decoder, encoded_rows
from trainer.data.machine import memory_budget_default as memory_budget_default
from trainer.data.machine import usable_cpus
from trainer.data.order import Block, sequence_blocks
from trainer.errors import DataError
from trainer.imaging import Resize

Cache = Literal["auto", "memory", "disk", "none"]
Note = Callable[[str], None]
_BATCH = 64  # images written to a cache at once
_FORMAT = 1  # of the cache on disk; counts up when decoding changes


@dataclass
class Pixels:
    """Where the pixels of a split come from. Batches are the same bits whichever way that is."""

    split: Split
    size: int  # side of an image, pixels
    resize: Resize
    on_error: Literal["fail", "skip"]
    threads: int
    note: Note
    array: np.ndarray | None = None  # uint8 [count + 1, S, S, 3], the last one black; None: decoded when read
    kept: Literal["memory", "disk", "none"] = "none"
    bad: dict[int, str] = field(default_factory=dict)  # index -> reason of images that count nowhere (weight 0)
    recent: deque[Block] = field(default_factory=deque)  # what is being read: where to look for what broke

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory this takes: what is left of a budget for the next split."""
        return self.array.nbytes if self.array is not None and self.kept == "memory" else 0

    def tensor(self) -> tf.Tensor:
        """`array` as a tensor over the same memory (DLPack): nothing is copied, and pages of a file load on demand."""
        assert self.array is not None
        with tf.device("CPU:0"):
            return tf.experimental.dlpack.from_dlpack(self.array.__dlpack__())

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The images of these examples, uint8 [k, S, S, 3]; one that cannot be decoded is black.

        Raises:
            DataError: as `data_errors`, unless damaged images are skipped.
        """
        if self.array is not None:
            return np.array(self.array[indices])
        chosen, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        count, block = sequence_blocks(self.split, chosen, 1)
        with data_errors(self):
            images = [row["image"].numpy() for row in live_rows(self, block, count)]
        return np.stack(images)[place] if images else np.zeros((0, self.size, self.size, 3), np.uint8)

    def remember(self, block: Block, rows: int = 16 * 1024) -> Block:
        """Keep the blocks of the last `rows` rows at hand for `data_errors`; returns the block."""
        self.recent.append(block)
        while sum(len(b.index) for b in self.recent) - len(self.recent[0].index) > rows:
            self.recent.popleft()
        return block

    def record_bad(self, indices: np.ndarray) -> np.bool_:
        """Note that these examples cannot be read and count nowhere."""
        for index in map(int, indices):
            if index not in self.bad:
                self.bad[index] = _reason(self, index)
                self.note(f"skipped {self.split.name_of(index)}: {self.bad[index]}")
        return np.bool_(True)


# ---------------------------------------------------------------------------------------------------------------
# What cannot be read


def _sentence(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of graph nodes around it."""
    text = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]|name:\s*$", "", str(error.message).splitlines()[0])
    return text.strip().rstrip(".")


def _reason(pixels: Pixels, index: int) -> str:
    """Why an example cannot be decoded."""
    split, row = pixels.split, {"index": tf.constant(index, tf.int64)}
    try:
        if split.shards:
            path, _, number = split.name_of(index).rpartition("#")
            row["record"] = next(iter(tf.data.TFRecordDataset(path).skip(int(number)).take(1)))
        decoder(split, pixels.size, pixels.resize)(row)
    except tf.errors.OpError as error:
        return _sentence(error)
    return "could not be read at first, but can be now"


def _damaged_shard(split: Split, block: Block) -> DataError | None:
    """The first shard of a block that breaks off or holds fewer records than it had when it was counted."""
    for number in block.pieces[:, 0]:
        shard, found = split.shards[number], 0
        try:
            for _ in tf.data.TFRecordDataset(shard.path):
                found += 1
        except tf.errors.OpError as error:
            return DataError(
                f"shard {shard.path} is damaged after {found} records: {_sentence(error)}; prepare it again"
            )
        if found < shard.stop:
            return DataError(f"shard {shard.path} holds {found} records, {shard.stop} are needed; prepare it again")
    return None


def _find_fault(pixels: Pixels) -> DataError | None:
    """What among the blocks being read is damaged: they are read once more, keeping count of what fails."""
    split = pixels.split
    for block in list(pixels.recent):
        if (fault := _damaged_shard(split, block)) is not None:
            return fault
        blocks = block_dataset(lambda _, block=block: block, 1)  # type: ignore[misc]
        rows = encoded_rows(blocks, split)
        for row in decoded_rows(rows, split, pixels.size, pixels.resize, skip=True, threads=pixels.threads):
            if bool(row["failed"]):
                index = int(row["index"])
                return DataError(
                    f"cannot decode {split.name_of(index)}: {_reason(pixels, index)}; "
                    "repair or remove it, or set data.on_error=skip"
                )
    return None


# What damaged or missing data can raise, through whatever runs the iterator; not a lost peer or a lack of memory.
_DATA_FAULTS = (
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnknownError,
)


@contextmanager
def data_errors(pixels: Pixels) -> Iterator[None]:
    """Around every loop over batches of `pixels`: what TensorFlow raises for damaged data becomes a `DataError`.

    Raises:
        DataError: names the image file, record or shard, and the reason.
    """
    try:
        yield
    except _DATA_FAULTS:
        fault = _find_fault(pixels)
        if fault is None:
            raise
        raise fault from None


# ---------------------------------------------------------------------------------------------------------------
# Decoding once and keeping


def live_rows(pixels: Pixels, block: Callable[[int], Block], count: int | None) -> tf.data.Dataset:
    """The rows of blocks 0, 1, ... decoded as they are read; see `decoded_rows`."""
    rows = encoded_rows(block_dataset(lambda number: pixels.remember(block(number)), count), pixels.split)
    skip = pixels.on_error == "skip"
    return decoded_rows(rows, pixels.split, pixels.size, pixels.resize, skip=skip, threads=pixels.threads)


def _decode_all(pixels: Pixels) -> Iterator[np.ndarray]:
    """Every image in index order, uint8 [<= 64, S, S, 3] at a time; notes those that fail."""
    count, block = sequence_blocks(pixels.split, np.arange(pixels.split.count, dtype=np.int64), 1)
    for batch in live_rows(pixels, block, count).batch(_BATCH).prefetch(2):
        failed = batch["failed"].numpy()
        if failed.any():
            pixels.record_bad(batch["index"].numpy()[failed])
        yield batch["image"].numpy()


def _fill_memory(pixels: Pixels, shape: tuple[int, ...]) -> None:
    # Fresh pages: zero, aligned as DLPack wants them, and counted against the process only once they are written.
    array = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
    done = 0
    for images in _decode_all(pixels):
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
    pixels.bad.update({int(index): reason for index, reason in bad.items()})
    return True


def _fill_disk(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> None:
    """Write beside, rename when complete; the small file that speaks of the bad ones comes last and means done."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for name, write in ((".u8", _decode_all(pixels)), (".json", None)):
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


def _cache_stem(pixels: Pixels, cache_dir: Path, fingerprint: str) -> Path:
    split = pixels.split
    members = [*split.files, *(f"{s.path} {s.start} {s.stop}" for s in split.shards), split.image_field]
    parts = (_FORMAT, fingerprint, split.name, split.count, pixels.size, pixels.resize, *members)
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser() / f"pixels-{split.name}-{pixels.size}-{digest}"


def _megabytes(count: int) -> str:
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
) -> Pixels:
    """Decide where the decoded images of a split live, and put them there.

    `auto` takes memory if they fit its budget, else disk if they fit that, else nothing is kept. A budget is in bytes
    and does not bind `memory` or `disk` asked for by name. The cache on disk serves later runs; a fill that was killed
    is done again. Where the disk cannot be written, images are decoded when they are read. `note` is told what was
    chosen and why, and each image that is skipped.

    Raises:
        DataError: `on_error` is "fail" and an image cannot be decoded, or a shard is damaged.
    """
    pixels = Pixels(split, size, resize, on_error, threads or usable_cpus(), note)
    shape = (split.count + 1, size, size, 3)
    needed, stem = int(np.prod(shape)), _cache_stem(pixels, cache_dir, fingerprint)
    what = f"decoded {split.name} images ({split.count:,} at {size} px, {_megabytes(needed)})"
    fits_memory, fits_disk = needed <= memory_budget, needed <= disk_budget
    budgets = f"memory budget {_megabytes(memory_budget)}, disk budget {_megabytes(disk_budget)}"
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
                free = shutil.disk_usage(Path(cache_dir).anchor or "/").free
                note(
                    f"{what}: cannot be kept in {cache_dir} ({error.strerror}, {_megabytes(free)} free); decoding anew"
                )
                return pixels
            _open_stored(pixels, stem, shape)
        else:
            why = "as asked" if cache == "none" else f"they fit neither {budgets.replace(', ', ' nor ')}"
            note(f"{what}: not kept, decoded whenever they are read ({why})")
    pixels.recent.clear()
    return pixels
