"""Images of a split: decoded once and cached in memory or on disk, or decoded whenever they are read."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import tensorflow as tf

from trainer.config.schema import RunConfig
from trainer.data.decoding import Resize, block_dataset, decoded_rows, decoder, plain
from trainer.data.host import fresh_array, memory_budget_default, usable_cpus
from trainer.data.open import OpenedData
from trainer.data.order import Block, Read, block_reads, sequence_blocks
from trainer.data.shard_gate import LocalShards, ShardGate, rows_ahead
from trainer.data.splits import SPLITS
from trainer.errors import DataError
from trainer.monitoring.log import log
from trainer.storage.local import write_whole
from trainer.storage.shard_cache import Note, ShardCache
from trainer.types import Dataset, Split

Cache = Literal["auto", "memory", "disk", "none"]
# Errors that damaged data never causes.
_NOT_DATA = (tf.errors.ResourceExhaustedError, tf.errors.UnavailableError,
             tf.errors.CancelledError, tf.errors.AbortedError)  # fmt: skip
_LOGGED = 20  # skipped images that are logged by name
_BATCH = 64  # images per batch that fills a cache
_FORMAT = 2  # version of the cache on disk; incremented when decoding changes


class BatchSource(Protocol):
    """Source of batches: decoded images (`Pixels`) or their features (`features.store`)."""

    split: Split
    threads: int | None

    @property
    def parallel(self) -> int: ...  # number of examples processed in parallel
    @property
    def bad(self) -> dict[int, str]: ...  # index -> reason of the examples that could not be read so far (weight 0)
    def tensor(self) -> tf.Tensor: ...  # all rows, not copied

    def rows_of(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Gather rows of `tensor()` in a pipeline: `index` and `epoch` int64 [b], index `split.count` for padding."""

    def gate(self, reader: str, reads: Iterator[Read], ahead: int) -> ShardGate: ...


def tensor_over(array: np.ndarray | None) -> tf.Tensor:
    """Return a tensor over the memory of an array (DLPack); pages of a mapped file load on demand."""
    assert array is not None
    with tf.device("CPU:0"):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@dataclass
class Pixels:
    """The decoded images of a split; batches are bit-identical with every cache."""

    split: Split
    size: int  # side of an image, pixels
    resize: Resize
    on_error: Literal["fail", "skip"]
    threads: int | None = None  # of a private decoding pool; None: one per CPU, in the shared pool
    note: Note = lambda _: None
    check: Callable[[], None] = lambda: None  # called while a cache is filled; raises to stop
    array: np.ndarray | None = None  # uint8 [count + 1, S, S, 3], the last one black; None: decoded when read
    cached_in: Literal["memory", "disk", "none"] = "none"
    shards: ShardCache | None = None  # fetches shards; None: all of them are local
    known_bad: dict[int, str] = field(default_factory=dict)
    filled: int = 0  # images in the cache so far
    failures: IO[str] = field(default_factory=partial(tempfile.NamedTemporaryFile, "r", prefix="kubetune-failures-"))

    @property
    def bad(self) -> dict[int, str]:
        self.collect_failures()
        return self.known_bad

    def collect_failures(self) -> None:
        """Add the examples that the pipeline has newly failed to read to `known_bad`, and log them."""
        for index in map(int, self.failures):
            if index not in self.known_bad:
                self.known_bad[index] = failure_reason(self, index)
                if len(self.known_bad) <= _LOGGED:
                    self.note(f"skipped {self.split.name_of(index)}: {self.known_bad[index]}")
                if len(self.known_bad) == _LOGGED:
                    self.note("further skipped images are only counted")

    @property
    def parallel(self) -> int:
        return self.threads or usable_cpus()

    def tensor(self) -> tf.Tensor:
        return tensor_over(self.array)

    def rows_of(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        return tf.gather(tensor, index)

    def gate(self, reader: str, reads: Iterator[Read], ahead: int) -> ShardGate:
        shards = self.shards or (LocalShards() if self.split.shards else None)
        return ShardGate(None if self.array is not None else shards, self.split, reader, reads, ahead)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the images of these examples, uint8 [k, S, S, 3]; a skipped damaged one is black.

        Raises:
            DataError: an image cannot be decoded, with `on_error` "fail".
        """
        if self.array is not None:
            return np.array(self.array[indices])
        chosen, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        none = np.zeros((0, self.size, self.size, 3), np.uint8)
        with data_errors(self):
            # With fetched shards one row at a time: neighbours can be in many shards, and the cache holds few.
            return np.concatenate([none, *_decoded(self, chosen, "rows", 1 if self.shards else _BATCH)])[inverse]


def failure_reason(pixels: Pixels, index: int) -> str:
    """Read an example again, and return why that fails."""
    split, row = pixels.split, {"index": tf.constant(index, tf.int64)}
    try:
        if split.shards:
            path, _, number = split.name_of(index).rpartition("#")
            if pixels.shards:
                pixels.shards.require("one", [os.path.basename(path)])
            records = list(tf.data.TFRecordDataset(path).skip(int(number)).take(1))
            if not records:
                return "the shard ends before this record"
            row["record"] = records[0]
        decoder(split, pixels.size, pixels.resize)(row)
    except tf.errors.OpError as error:
        # TensorFlow's message without the names of graph nodes.
        text = re.sub(r"\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*?\]|name:\s*$", "", str(error.message).splitlines()[0])
        return text.strip().rstrip(".")
    return "could not be read at first, but can be read now"


@contextmanager
def data_errors(pixels: BatchSource) -> Iterator[None]:
    """Convert TensorFlow errors for damaged data into a `DataError`; wraps every loop over batches of `pixels`.

    TensorFlow's error does not name the example, so the split is searched for it, which can take as long as an epoch.

    Raises:
        DataError: names the image file, or shard and record, and the reason.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not isinstance(pixels, Pixels):
            raise
        from_pipeline = pixels.array is None and re.search("Iterator|Dataset", str(error.message))
        if not from_pipeline or isinstance(error, _NOT_DATA):
            raise
        if not pixels.filled:
            pixels.note(f"an image of {pixels.split.name} cannot be read; searching for it")
        p = pixels
        probe = Pixels(p.split, p.size, p.resize, "skip", p.threads, check=p.check, shards=p.shards)
        index = next((min(probe.bad) for _ in _all_from(probe, p.filled) if probe.bad), None)
        if index is None:
            raise
        problem = f"cannot decode {pixels.split.name_of(index)}: {failure_reason(pixels, index)}"
        raise DataError(problem, fix="repair or remove it, or set data.on_error=skip") from None


def live_rows(pixels: Pixels, block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Return the rows of blocks 0, 1, ... decoded when read; see `decoded_rows`."""
    failures = pixels.failures.name if pixels.on_error == "skip" else None
    blocks = block_dataset(block, count)
    return decoded_rows(blocks, pixels.split, pixels.size, pixels.resize, threads=pixels.parallel, failures=failures)


def _decoded(pixels: Pixels, chosen: np.ndarray, reader: str, rows: int = _BATCH) -> Iterator[np.ndarray]:
    """Yield the images of these examples, increasing indices, as uint8 [<= rows, S, S, 3]."""
    count, block = sequence_blocks(pixels.split, chosen, 1)
    gate = pixels.gate(reader, block_reads(block, count), rows_ahead(rows, pixels.parallel, 2))
    batches = iter(live_rows(pixels, block, count).map(plain(lambda row: row["image"])).batch(rows).prefetch(2))
    for _ in range(0, len(chosen), rows):
        gate.wait_for(rows)
        yield next(batches).numpy()
        pixels.check()
        pixels.collect_failures()
    del batches
    gate.close()


def _all_from(pixels: Pixels, start: int = 0) -> Iterator[np.ndarray]:
    """Yield every image from index `start` on, and count in `pixels.filled` those that the caller has stored."""
    for images in _decoded(pixels, np.arange(start, pixels.split.count, dtype=np.int64), "filling"):
        yield images
        pixels.filled += len(images)


def _open_stored(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> bool:
    """Open the cache on disk; False if it is incomplete."""
    data, about = stem.with_suffix(".u8"), stem.with_suffix(".json")
    try:
        bad = json.loads(about.read_text())["bad"]
        if data.stat().st_size != int(np.prod(shape)) or (bad and pixels.on_error == "fail"):
            return False
        # Copy on write, since DLPack requires writable memory; nothing writes.
        pixels.array, pixels.cached_in = np.memmap(data, np.uint8, "c", shape=shape), "disk"
    except (OSError, ValueError, KeyError):
        return False
    pixels.known_bad.update({int(index): reason for index, reason in bad.items()})
    return True


def _fill_disk(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> None:
    """Write the cache to a temporary file and rename it; the JSON file, written last, marks it as complete."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=stem.name, suffix=".partial", dir=stem.parent)
    try:
        with os.fdopen(handle, "wb") as file:  # plain writes: a full disk under a mapped file would kill the process
            for images in _all_from(pixels):
                file.write(images.data)
            file.write(bytes(int(np.prod(shape[1:]))))  # the black image
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, stem.with_suffix(".u8"))
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    write_whole(stem.with_suffix(".json"), json.dumps({"bad": pixels.bad}))


def cache_name(split: Split, size: int, resize: Resize, fingerprint: str) -> str:
    """Return a unique name for the pixels of a split."""
    # Without the folder of the shards, which may differ at the next start; the fingerprint identifies their content.
    ranges = (f"{os.path.basename(shard.path)} {shard.start} {shard.stop}" for shard in split.shards)
    members = [*split.files, *ranges, split.image_field]
    parts = (_FORMAT, fingerprint, split.name, split.count, size, resize, *members)
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return f"pixels-{split.name}-{size}-{digest}"


def megabytes(count: int) -> str:
    """Format a number of bytes, such as "1.2 GB"."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


@dataclass(frozen=True)
class CachePlan:
    """Cache of the decoded images of a split, their size in bytes, and the reason for the choice."""

    where: Literal["memory", "disk", "none"]
    bytes: int
    reason: str


def plan_image_cache(cache: Cache, needed: int, memory_budget: int, disk_budget: int, once: bool) -> CachePlan:
    """Choose the cache of decoded images; only `auto` respects the budgets, in bytes, and skips images read `once`."""
    budgets = f"memory budget {megabytes(memory_budget)}, disk budget {megabytes(disk_budget)}"
    if cache != "auto":
        return CachePlan(cache, needed, "as configured")
    if once:
        return CachePlan("none", needed, "training reads them once, for features")
    if needed <= memory_budget:
        return CachePlan("memory", needed, budgets)
    if needed <= disk_budget:
        return CachePlan("disk", needed, budgets)
    return CachePlan("none", needed, f"they fit neither {budgets.replace(', ', ' nor ')}")


def plan_image_caches(config: RunConfig, dataset: Dataset, size: int, train_once: bool) -> dict[str, CachePlan]:
    """Plan the caches of the decoded images of all splits, of side `size` pixels."""
    plans: dict[str, CachePlan] = {}
    memory, disk = config.runtime.memory_budget or memory_budget_default(), config.runtime.disk_budget
    for name in [part for part in SPLITS if part in dataset.splits]:
        once = name == "train" and train_once
        plan = plan_image_cache(config.data.cache, image_bytes(dataset.splits[name], size), memory, disk, once)
        memory -= plan.bytes if plan.where == "memory" else 0
        plans[name] = plan
    return plans


def image_bytes(split: Split, size: int) -> int:
    """Return the bytes of the decoded images of a split, and of the black one for padding."""
    return (split.count + 1) * size * size * 3


def fill_cache(pixels: Pixels, plan: CachePlan, folder: Path, fingerprint: str) -> None:
    """Fill the cache of `plan`, or open the one that an earlier run has completed in `folder`.

    If the disk cannot be written, images are decoded when they are read.

    Raises:
        DataError: `on_error` is "fail" and an image cannot be decoded, or a shard is damaged.
    """
    split, note = pixels.split, pixels.note
    shape = (split.count + 1, pixels.size, pixels.size, 3)
    what = f"decoded {split.name} images ({split.count:,} at {pixels.size} px, {megabytes(plan.bytes)})"
    why = "" if plan.reason == "as configured" else f" ({plan.reason})"
    stem = folder / cache_name(split, pixels.size, pixels.resize, fingerprint)
    with data_errors(pixels):
        if plan.where == "memory":
            note(f"{what}: cached in memory{why}")
            array = fresh_array(shape, np.dtype(np.uint8))
            for images in _all_from(pixels):
                array[pixels.filled : pixels.filled + len(images)] = images
            pixels.array, pixels.cached_in = array, "memory"
        elif plan.where == "none":
            note(f"{what}: not cached, decoded whenever they are read ({plan.reason})")
        elif _open_stored(pixels, stem, shape):
            note(f"{what}: read from {stem}.u8, made by an earlier run")
        else:
            note(f"{what}: cached in {stem}.u8{why}")
            try:
                _fill_disk(pixels, stem, shape)
            except OSError as error:
                pixels.filled = 0
                free = shutil.disk_usage(Path(folder).anchor or "/").free
                note(f"{what}: cannot be cached in {folder} ({error.strerror}, {megabytes(free)} free), decoded live")
            else:
                _open_stored(pixels, stem, shape)


class ImageStore:
    """The decoded images of all splits of a run, under one memory budget."""

    def __init__(self, data: OpenedData, config: RunConfig, size: int, check: Callable[[str], None]) -> None:
        """`size`: side of the images, pixels; `check(where)`: called while images are decoded, may raise to stop."""
        self.dataset, self.config, self.size = data.dataset, config, size
        self.train_once = False  # True: training images are read once from now on; `data.cache=auto` skips the cache
        self._data, self._check, self._opened = data, check, dict[str, Pixels]()

    def split(self, name: str) -> Pixels:
        """Return the images of a split; the first call may fill a cache."""
        if name not in self._opened:
            config, once = self.config, name == "train" and self.train_once
            self._opened[name] = self._open(name, self.size, config.model.resize, config.data.cache, once)
        return self._opened[name]

    def at(self, name: str, size: int, resize: Resize) -> Pixels:
        """Return the images of a split at another size, not cached."""
        return self._open(name, size, resize, "none", once=False)

    def _open(self, name: str, size: int, resize: Resize, cache: Cache, once: bool) -> Pixels:
        split, runtime = self.dataset.splits[name], self.config.runtime

        def check() -> None:
            self._check(f"while the {name} images were decoded")

        on_error, threads, shards = self.config.data.on_error, runtime.data_threads, self._data.shards
        pixels = Pixels(split, size, resize, on_error, threads, note=log.info, check=check, shards=shards)
        plan = plan_image_cache(cache, image_bytes(split, size), self.memory_left, runtime.disk_budget, once)
        fill_cache(pixels, plan, runtime.cache_folder, self.dataset.fingerprint)
        return pixels

    def rows(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images of these examples of a split, uint8 [k, S, S, 3]."""
        return self.split(name).rows(np.asarray(indices, np.int64))

    def close(self) -> None:
        """Stop fetching shards."""
        if self._data.shards:
            self._data.shards.close()

    def forget(self, name: str) -> None:
        """Close a split; the next `split` call opens it again and may cache its images."""
        self._opened.pop(name, None)

    @property
    def memory_left(self) -> int:
        """Bytes of the memory budget that decoded images do not use."""
        budget = self.config.runtime.memory_budget or memory_budget_default()
        return budget - sum(image_bytes(p.split, p.size) for p in self._opened.values() if p.cached_in == "memory")

    def name_of(self, split: str, index: int) -> str:
        """Return the file or record of an example, at the address that the user gave."""
        name = self.dataset.splits[split].name_of(index)
        for path, address in self._data.addresses.items():
            if name.startswith(f"{path}/"):
                return address + name[len(path) :]
        return name

    def undecodable(self) -> list[str]:
        """Return the examples skipped by data.on_error=skip, each with the reason."""
        bad = [(name, pixels.bad) for name, pixels in sorted(self._opened.items())]
        return [f"{self.name_of(name, i)}: {reason}" for name, reasons in bad for i, reason in sorted(reasons.items())]
