"""The decoded images of a split, cached in memory or on disk, or decoded each time they are read."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Literal, Protocol

import google_crc32c
import numpy as np
import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.config.schema import RunConfig
from trainer.data.decoding import (
    Resize,
    build_block_dataset,
    decode_blocks,
    describe_decoding_error,
    error_message,
    make_row_decoder,
    without_autograph,
)
from trainer.data.host import allocate_array, count_usable_cpus, default_memory_budget
from trainer.data.open import OpenedData
from trainer.data.order import Block, BlockShards, compute_block_shards, make_sequence_blocks
from trainer.data.records import locate_records, read_source_name
from trainer.data.remote import with_addresses
from trainer.data.shard_gate import LocalShards, ShardGate, max_rows_ahead
from trainer.data.splits import SPLITS, count_classes, take
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.names import encode_file_name
from trainer.storage.base import ABANDONED_SECONDS
from trainer.storage.disk import choose_disk_budget, format_bytes, get_free_bytes
from trainer.storage.local import compute_file_crc32c, delete_unfinished, temporary_file, write_atomically
from trainer.storage.scratch import open_scratch_file
from trainer.storage.shard_cache import ShardCache
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.types import Dataset, LogMessage, Split

Cache = Literal["auto", "memory", "disk", "none"]
# Errors that corrupt images never cause.
_NOT_DATA_ERRORS = (tf.errors.ResourceExhaustedError, tf.errors.UnavailableError,
                    tf.errors.CancelledError, tf.errors.AbortedError)  # fmt: skip
# TensorFlow raises the second one if a file name in its message is not UTF-8.
_READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
_MAX_LOGGED = 20  # skipped images that are logged by name
_BATCH = 64  # images per batch, outside of training and evaluation
_FORMAT_VERSION = 4  # of the cache on disk; increment it when decoding changes


class BatchSource(Protocol):
    """The rows of a split that batches are built from: decoded images (`Pixels`) or features of a trunk."""

    split: Split
    threads: int | None

    @property
    def parallel(self) -> int: ...  # examples that a pipeline decodes in parallel
    @property
    def bad(
        self,
    ) -> dict[int, str]: ...  # index -> reason, for examples that were unreadable so far; they have weight 0
    def tensor(self) -> tf.Tensor: ...  # all rows, without a copy

    def gather_rows(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Gather rows of `tensor()` in a pipeline. `index` (`split.count` in padding) and `epoch` are int64 [b]."""

    def open_gate(self, reader: str, blocks: Iterator[BlockShards], ahead: int) -> ShardGate: ...


def wrap_array(array: np.ndarray | None) -> tf.Tensor:
    """Return a CPU tensor that uses the memory of an array (DLPack). Pages of a mapped file load on demand."""
    assert array is not None
    with tf.device("CPU:0"):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@dataclass
class Pixels:
    """The decoded images of a split. Batches are bit-identical with every kind of cache."""

    split: Split
    size: int  # side of an image, in pixels
    resize: Resize
    on_error: Literal["fail", "skip"]
    threads: int | None = None  # of a private thread pool; None: one decode per CPU, in TensorFlow's pool
    log_message: LogMessage = lambda _: None
    check: Callable[[], None] = lambda: None  # called between the batches that fill a cache; can raise to stop
    array: np.ndarray | None = None  # uint8 [count + 1, S, S, 3], the last one black; None: decoded when read
    cached_in: Literal["memory", "disk", "none"] = "none"
    shards: ShardCache | None = None  # fetches shards from a bucket; None: all shards are local
    known_bad: dict[int, str] = field(default_factory=dict)  # index -> reason, for unreadable examples
    stored_count: int = 0  # images in the cache so far, while it is filled
    # File to which the pipeline appends the index of each unreadable example; see `decode_blocks`.
    failures: IO[str] = field(default_factory=partial(open_scratch_file, "failures"))

    @property
    def bad(self) -> dict[int, str]:
        self.collect_failures()
        return self.known_bad

    def collect_failures(self) -> None:
        """Move the indices that the pipeline has written to `failures` into `known_bad`, and log the first ones."""
        for index in map(int, self.failures):
            if index not in self.known_bad:
                self.known_bad[index] = find_failure_reason(self, index)
                if len(self.known_bad) <= _MAX_LOGGED:
                    self.log_message(f"skipped {describe_example(self, index)}: {self.known_bad[index]}")
                if len(self.known_bad) == _MAX_LOGGED:
                    self.log_message("further skipped images are only counted")

    @property
    def parallel(self) -> int:
        return self.threads or count_usable_cpus()

    def tensor(self) -> tf.Tensor:
        return wrap_array(self.array)

    def gather_rows(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        return tf.gather(tensor, index)

    def open_gate(self, reader: str, blocks: Iterator[BlockShards], ahead: int) -> ShardGate:
        shards = self.shards or (LocalShards() if self.split.shards else None)
        return ShardGate(None if self.array is not None else shards, self.split, reader, blocks, ahead)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return these images, uint8 [k, S, S, 3]. An unreadable one is black, or with on_error=fail a DataError."""
        if self.array is not None:
            return np.array(self.array[indices])
        ascending, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        empty = np.zeros((0, self.size, self.size, 3), np.uint8)
        with convert_data_errors(self):
            # One row at a time from a bucket: the rows of a batch can be in more shards than fit the shard cache.
            return np.concatenate([empty, *_iterate_decoded(self, ascending, "rows", 1 if self.shards else _BATCH)])[
                inverse
            ]


def describe_example(pixels: Pixels, index: int) -> str:
    """Return the file of an example, or its shard and record, and the file name that the record stores, if any."""
    name = pixels.split.name_of(index)
    if pixels.split.shards:
        with suppress(OSError, DataError, IndexError):  # a shard that is missing, corrupt or truncated
            (record,) = locate_records(take(pixels.split, np.array([index])))
            source = read_source_name(record)
            return f"{name} ({source})" if source else name
    return name


def find_failure_reason(pixels: Pixels, index: int) -> str:
    """Decode an example again, and return why that fails."""
    split, row = pixels.split, {"index": tf.constant(index, tf.int64)}
    try:
        if split.shards:
            path, record_index = split.record_of(index)
            if pixels.shards:
                pixels.shards.require("one", [os.path.basename(path)])
            records = list(tf.data.TFRecordDataset(encode_file_name(path)).skip(record_index).take(1))
            if not records:
                return "the shard ends before this record"
            row["record"] = records[0]
        make_row_decoder(split, pixels.size, pixels.resize)(row)
    except _READ_ERRORS as error:
        return describe_decoding_error(error)
    return "could not be read at first, but can be read now"


@contextmanager
def convert_data_errors(source: BatchSource) -> Iterator[None]:
    """Convert TensorFlow's error for an unreadable example into a `DataError`. Every loop over batches runs within it.

    TensorFlow's error does not name the example, so the split is decoded up to it, which can take as long as an epoch.
    Errors from outside the input pipeline, or for which no unreadable example is detected, are raised unchanged.
    """
    try:
        yield
    except _READ_ERRORS as error:
        if not isinstance(source, Pixels) or source.array is not None or isinstance(error, _NOT_DATA_ERRORS):
            raise
        if not re.search("Iterator|Dataset", error_message(error)):  # the error is not of the input pipeline
            raise
        if not source.stored_count:
            source.log_message(f"an image of {source.split.name} cannot be read; searching for it")
        s = source
        probe = Pixels(s.split, s.size, s.resize, "skip", s.threads, check=s.check, shards=s.shards)
        index = next((min(probe.bad) for _ in _iterate_from(probe, source.stored_count) if probe.bad), None)
        if index is None:
            raise
        problem = f"cannot decode {describe_example(source, index)}: {find_failure_reason(source, index)}"
        raise DataError(problem, fix="repair or remove it, or set data.on_error=skip") from None


def require_readable(pixels: Pixels, class_names: Sequence[str]) -> None:
    """Raise a DataError if no image of the split, or for train no image of some class, could be decoded so far."""
    split, bad = pixels.split, pixels.bad
    if not bad:
        return
    left = np.bincount(np.delete(split.labels, sorted(bad)), minlength=len(class_names))
    gone = (np.bincount(split.labels, minlength=len(class_names)) > 0) & (left == 0)
    if left.any() and (split.name != "train" or not gone.any()):
        return
    first = next(index for index in sorted(bad) if gone[split.labels[index]])
    what = f"{split.name} images" if not left.any() else f"training images of {class_names[split.labels[first]]}"
    count = split.count if not left.any() else int((split.labels == split.labels[first]).sum())
    problem = f"none of the {count} {what} can be decoded, the first: {describe_example(pixels, first)}: {bad[first]}"
    raise DataError(problem, fix="repair them, or remove the class or split")


def build_row_dataset(pixels: Pixels, block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Build a dataset of the rows of blocks 0 to `count` - 1 (infinite if None), decoded each time they are read."""
    failures = pixels.failures.name if pixels.on_error == "skip" else None
    blocks = build_block_dataset(block, count)
    return decode_blocks(blocks, pixels.split, pixels.size, pixels.resize, threads=pixels.parallel, failures=failures)


def _iterate_decoded(pixels: Pixels, indices: np.ndarray, reader: str, rows: int = _BATCH) -> Iterator[np.ndarray]:
    """Yield the images of examples as uint8 [<= rows, S, S, 3].

    `indices` are increasing. `reader` identifies this pipeline to the shard cache.
    """
    count, block = make_sequence_blocks(pixels.split, indices, 1)
    gate = pixels.open_gate(reader, compute_block_shards(block, count), max_rows_ahead(rows, pixels.parallel, 2))
    images = build_row_dataset(pixels, block, count).map(without_autograph(lambda row: row["image"]))
    batches = iter(images.batch(rows).prefetch(2))
    for _ in range(0, len(indices), rows):
        gate.wait_for(rows)
        yield next(batches).numpy()
        pixels.check()
        pixels.collect_failures()
    del batches
    gate.close()


def _iterate_from(pixels: Pixels, start: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of all images from index `start`. `pixels.stored_count` counts those that are consumed."""
    for images in _iterate_decoded(pixels, np.arange(start, pixels.split.count, dtype=np.int64), "filling"):
        yield images
        pixels.stored_count += len(images)


def _open_disk_cache(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> bool:
    """Open the cache on disk. Return False if it is incomplete or corrupt, or has bad examples with on_error "fail"."""
    data = stem.with_suffix(".u8")

    def report_block() -> None:
        health.record_progress()
        pixels.check()

    try:
        about = json.loads(stem.with_suffix(".json").read_bytes())
        bad, crc32c = {int(index): str(reason) for index, reason in about["bad"].items()}, about["crc32c"]
        if any(not 0 <= index < pixels.split.count for index in bad):
            return False
        if data.stat().st_size != int(np.prod(shape)) or (bad and pixels.on_error == "fail"):
            return False
        if _with_bad(compute_file_crc32c(data, report_block), bad) != crc32c:
            pixels.log_message(f"{data} is corrupt (checksum mismatch); decoding the images again")
            return False
        # Mapped copy-on-write, because DLPack requires writable memory; nothing writes to it.
        pixels.array, pixels.cached_in = np.memmap(data, np.uint8, "c", shape=shape), "disk"
    except (OSError, *CONTENT_ERRORS):
        return False
    pixels.known_bad.update(bad)
    return True


def _with_bad(crc: int, bad: dict[int, str]) -> int:
    """Extend the CRC32C of the pixels by the examples that cannot be decoded, if there are any."""
    return google_crc32c.extend(crc, json.dumps(sorted(bad.items())).encode()) if bad else crc


def _fill_disk_cache(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> None:
    """Write the cache to a temporary file and rename it. Then write the JSON file that marks it as complete."""
    delete_unfinished(stem.parent, ABANDONED_SECONDS)
    crc, black = 0, np.zeros((1, *shape[1:]), np.uint8)
    with temporary_file(stem.with_suffix(".u8")) as partial:
        with open(partial, "wb") as file:  # not mapped: on a full disk, a write to a mapped file kills the process
            for images in chain(_iterate_from(pixels), [black]):
                file.write(images.data)
                crc = google_crc32c.extend(crc, images.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, stem.with_suffix(".u8"))
    write_atomically(stem.with_suffix(".json"), json.dumps({"bad": pixels.bad, "crc32c": _with_bad(crc, pixels.bad)}))


def build_cache_name(split: Split, size: int, resize: Resize, fingerprint: str) -> str:
    """Return the file name, without extension, of the disk cache of a split. It identifies the pixels."""
    # Without the folder of the shards, which can differ at the next start. The fingerprint identifies their content.
    ranges = (f"{os.path.basename(shard.path)} {shard.start} {shard.stop}" for shard in split.shards)
    members = [*split.files, *ranges, split.image_field]
    key = (_FORMAT_VERSION, fingerprint, split.name, split.count, size, resize, split.orientation, *members)
    digest = hashlib.sha256(encode_file_name("\n".join(map(str, key)))).hexdigest()[:16]
    return f"pixels-{split.name}-{size}-{digest}"


@dataclass(frozen=True)
class CachePlan:
    """Where to cache the decoded images of a split, their size in bytes, and the reason for the choice."""

    where: Literal["memory", "disk", "none"]
    bytes: int
    reason: str


def plan_image_cache(cache: Cache, needed: int, memory_budget: int, disk_budget: int, once: bool) -> CachePlan:
    """Choose where to cache decoded images of `needed` bytes.

    With `cache` "auto", they are cached in memory or else on disk if its budget (in bytes) suffices, and not cached if
    training reads them only `once`. Any other value of `cache` applies regardless of the budgets.
    """
    budgets = f"memory budget {format_bytes(memory_budget)}, disk budget {format_bytes(disk_budget)}"
    if cache != "auto":
        return CachePlan(cache, needed, "as configured")
    if once:
        return CachePlan("none", needed, "training reads them once, for features")
    if needed <= max(memory_budget, disk_budget):
        return CachePlan("memory" if needed <= memory_budget else "disk", needed, budgets)
    return CachePlan("none", needed, f"they fit neither {budgets.replace(', ', ' nor ')}")


def plan_image_caches(
    config: RunConfig, dataset: Dataset, size: int, train_images_read_once: bool
) -> dict[str, CachePlan]:
    """Plan the cache of each split, in the order of `SPLITS`, for images with a side of `size` pixels."""
    plans: dict[str, CachePlan] = {}
    memory = config.runtime.memory_budget or default_memory_budget()
    disk, _ = choose_disk_budget(config.runtime.disk_budget, config.runtime.cache_folder)
    for name in [split for split in SPLITS if split in dataset.splits]:
        once, needed = name == "train" and train_images_read_once, count_image_bytes(dataset.splits[name], size)
        plans[name] = plan_image_cache(config.data.cache, needed, memory, disk, once)
        memory -= needed if plans[name].where == "memory" else 0
    return plans


def count_image_bytes(split: Split, size: int) -> int:
    """Count the bytes of the decoded images of a split, including the black image for padding."""
    return (split.count + 1) * size * size * 3


def fill_cache(pixels: Pixels, plan: CachePlan, folder: Path, fingerprint: str) -> None:
    """Fill the cache of `plan`, or open the disk cache that an earlier start completed in `folder`.

    If the disk cannot be written, nothing is cached, and images are decoded each time they are read.

    Raises:
        DataError: a shard is missing, or an image cannot be decoded and `on_error` is "fail".
    """
    split, log_message = pixels.split, pixels.log_message
    shape = (split.count + 1, pixels.size, pixels.size, 3)
    subject = f"decoded {split.name} images ({split.count:,} at {pixels.size} px, {format_bytes(plan.bytes)})"
    suffix = "" if plan.reason == "as configured" else f" ({plan.reason})"
    stem = folder / build_cache_name(split, pixels.size, pixels.resize, fingerprint)
    with convert_data_errors(pixels):
        if plan.where == "memory":
            log_message(f"{subject}: cached in memory{suffix}")
            array = allocate_array(shape, np.dtype(np.uint8))
            for images in _iterate_from(pixels):
                array[pixels.stored_count : pixels.stored_count + len(images)] = images
            pixels.array, pixels.cached_in = array, "memory"
        elif plan.where == "none":
            log_message(f"{subject}: not cached, decoded each time they are read ({plan.reason})")
        elif _open_disk_cache(pixels, stem, shape):
            log_message(f"{subject}: read from {stem}.u8, written by an earlier start")
        else:
            log_message(f"{subject}: cached in {stem}.u8{suffix}")
            try:
                _fill_disk_cache(pixels, stem, shape)
                _open_disk_cache(pixels, stem, shape)
            except OSError as error:
                pixels.stored_count = 0
                free = format_bytes(get_free_bytes(folder))
                problem = f"cannot be cached in {folder} ({error.strerror}, {free} free)"
                log_message(f"{subject}: {problem}; decoded each time they are read")


class ImageStore:
    """The decoded images of all splits of a run, under one memory budget."""

    def __init__(self, data: OpenedData, config: RunConfig, size: int, check: Callable[[str], None]) -> None:
        """Open no split yet. `check` is called with "while the train images were decoded", and can raise to stop."""
        self.dataset, self.config, self.size = data.dataset, config, size
        self.train_images_read_once = False  # if True, data.cache=auto does not cache the training images
        self._data, self._check, self._opened = data, check, dict[str, Pixels]()

    def split(self, name: str) -> Pixels:
        """Return the images of a split. The first call opens the split and can fill a cache."""
        if name not in self._opened:
            self._opened[name] = self._open(name, self.size, self.config.model.resize, self.config.data.cache)
        return self._opened[name]

    def at(self, name: str, size: int, resize: Resize) -> Pixels:
        """Return the images of a split at another size or with another `resize`, not cached."""
        return self._open(name, size, resize, "none")

    def _open(self, name: str, size: int, resize: Resize, cache: Cache) -> Pixels:
        split, runtime = self.dataset.splits[name], self.config.runtime
        check = partial(self._check, f"while the {name} images were decoded")
        on_error, threads, shards = self.config.data.on_error, runtime.data_threads, self._data.shards
        pixels = Pixels(split, size, resize, on_error, threads, log_message=self._log, check=check, shards=shards)
        needed, once = count_image_bytes(split, size), name == "train" and self.train_images_read_once
        disk_budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        plan = plan_image_cache(cache, needed, self.memory_left, disk_budget, once)
        fill_cache(pixels, plan, runtime.cache_folder, self.dataset.fingerprint)
        require_readable(pixels, self.dataset.class_names)
        return pixels

    def gather_unreadable(self, control: ControlChannel) -> None:
        """Add the unreadable images that the other workers have detected; all workers call this."""
        if control.size == 1 or self.config.data.on_error == "fail":
            return
        own = {name: {int(index): why for index, why in p.bad.items()} for name, p in self._opened.items()}
        for detected in control.reduce("unreadable images", own, list):
            for name in detected.keys() & self._opened.keys():
                self._opened[name].known_bad |= {int(index): why for index, why in detected[name].items()}

    def require_readable(self) -> None:
        """Apply `require_readable` to each opened split."""
        for pixels in self._opened.values():
            require_readable(pixels, self.dataset.class_names)

    def describe_remaining(self) -> list[str]:
        """Return a line per split with undecodable images, with the counts that are left, in total and per class."""
        return [
            f"{name}: {len(pixels.bad)} of {pixels.split.count} images could not be decoded, left are "
            + count_classes(np.delete(pixels.split.labels, sorted(pixels.bad)), self.dataset.class_names)
            for name, pixels in self._opened.items()
            if pixels.bad
        ]

    def rows(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images of these examples of a split, uint8 [k, S, S, 3]."""
        return self.split(name).rows(np.asarray(indices, np.int64))

    def close(self) -> None:
        """Start no more transfers of shards from a bucket."""
        if self._data.shards:
            self._data.shards.close()

    def drop(self, name: str) -> None:
        """Drop the images of a split and their cache in memory. The next call of `split` opens it again."""
        self._opened.pop(name, None)

    @property
    def memory_left(self) -> int:
        """Bytes of the memory budget that are not used by decoded images."""
        budget = self.config.runtime.memory_budget or default_memory_budget()
        return budget - sum(
            count_image_bytes(p.split, p.size) for p in self._opened.values() if p.cached_in == "memory"
        )

    def name_of(self, split: str, index: int) -> str:
        """Return the file, or SHARD#RECORD, of an example. For a copy from a bucket, this is the address there."""
        return with_addresses(self.dataset.splits[split].name_of(index), self.addresses)

    def list_sources(self, name: str, indices: np.ndarray) -> tuple[str, ...]:
        """Return the file name that the record of each of these examples stores; () if the first one stores none.

        `indices` are increasing. Shards in a bucket are fetched again if they are not on the local disk any more.
        """
        split, shards = self.dataset.splits[name], self._data.shards
        if not split.shards:
            return ()
        chosen = take(split, indices)

        def read() -> Iterator[str]:
            for path, members in groupby(chosen.shards, lambda shard: shard.path):
                if shards:
                    shards.require("names", [os.path.basename(path)])
                for record in locate_records(replace(chosen, shards=tuple(members))):
                    health.record_progress()
                    yield read_source_name(record)

        sources: tuple[str, ...] = ()
        with suppress(OSError, DataError):  # a shard that is missing or corrupt: the images are cached
            names = read()
            sources = (first, *names) if (first := next(names, "")) else ()
        if shards:
            shards.release("names")
        return sources

    @property
    def addresses(self) -> dict[str, str]:
        """The bucket folder of each local folder that is a copy of one."""
        return self._data.addresses

    def _log(self, text: str) -> None:
        log.info(with_addresses(text, self.addresses))

    def list_undecodable(self) -> list[str]:
        """List the unreadable examples that data.on_error=skip has skipped so far, each with the reason."""
        opened = sorted(self._opened.items())
        return [
            with_addresses(f"{describe_example(pixels, i)}: {why}", self.addresses)
            for _, pixels in opened
            for i, why in sorted(pixels.bad.items())
        ]
