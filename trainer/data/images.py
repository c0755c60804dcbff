"""Store the decoded images of each split in memory or on disk, or decode them each time they are read."""

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
    get_error_message,
    make_row_decoder,
    without_autograph,
)
from trainer.data.host import allocate_array, count_usable_cpus, get_default_memory_budget
from trainer.data.open import OpenedData
from trainer.data.order import Block, BlockShards, compute_block_shards, make_sequence_blocks
from trainer.data.records import locate_records, read_source_name
from trainer.data.remote import replace_local_paths
from trainer.data.shard_gate import LocalShards, ShardGate, compute_max_rows_ahead
from trainer.data.splits import SPLITS, describe_class_counts, select_examples
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.names import encode_file_name
from trainer.storage.base import STALE_SECONDS
from trainer.storage.disk import choose_disk_budget, format_bytes, get_free_bytes
from trainer.storage.local import compute_file_crc32c, delete_temporary_files, temporary_file, write_atomically
from trainer.storage.scratch import open_scratch_file
from trainer.storage.shard_cache import ShardCache
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.types import Dataset, LogMessage, Split

CacheSetting = Literal["auto", "memory", "disk", "none"]  # data.cache
# TensorFlow errors that a corrupt image never causes.
_NON_DATA_ERRORS = (tf.errors.ResourceExhaustedError, tf.errors.UnavailableError,
                    tf.errors.CancelledError, tf.errors.AbortedError)  # fmt: skip
# TensorFlow raises a UnicodeDecodeError instead of its own error if a file name in the message is not UTF-8.
_READ_ERRORS = (tf.errors.OpError, UnicodeDecodeError)
_MAX_LOGGED_IMAGES = 20  # skipped images per split that are logged by name
_BATCH_SIZE = 64  # images per batch while a cache is filled, and in `Pixels.read_images`
_FORMAT_VERSION = 4  # of the disk cache; increment it when a change of the code changes decoded pixels


class BatchSource(Protocol):
    """The rows of a split from which batches are built: decoded images (`Pixels`) or features of a trunk."""

    split: Split
    threads: int | None  # size of a private thread pool; None for TensorFlow's pool

    @property
    def parallel(self) -> int: ...  # number of examples that a pipeline decodes in parallel
    @property
    def unreadable(self) -> dict[int, str]: ...  # index -> reason, for unreadable examples, which get weight 0
    def tensor(self) -> tf.Tensor: ...  # all cached rows, without a copy

    def gather_rows(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Gather the rows of a batch in a tf.data pipeline.

        Args:
            tensor: the result of `tensor()`.
            index: example indices, int64 [b]; `split.count` for padding and for unreadable examples.
            epoch: epoch of each example, int64 [b], because features can differ between epochs.
        """

    def open_gate(self, reader: str, blocks: Iterator[BlockShards], max_rows_ahead: int) -> ShardGate:
        """Return the gate at which the host waits for the shards of a pipeline; see `ShardGate` for the arguments."""


def wrap_array(array: np.ndarray | None) -> tf.Tensor:
    """Wrap an array in a CPU tensor without a copy, by DLPack. A memory-mapped file is read on demand."""
    assert array is not None
    with tf.device("CPU:0"):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@dataclass
class Pixels:
    """The decoded images of a split. Batches are bit-identical with every kind of cache, and without one."""

    split: Split
    size: int  # side S of an image, in pixels
    resize: Resize
    on_error: Literal["fail", "skip"]  # data.on_error
    threads: int | None = None  # size of a private thread pool; None for one decode per CPU, in TensorFlow's pool
    log_message: LogMessage = lambda _: None
    # Called between batches, and while a cache is read; raises StopRequested to cancel.
    check_stop: Callable[[], None] = lambda: None
    array: np.ndarray | None = None  # cache, uint8 [count + 1, S, S, 3], black in the last row; None if not cached
    cached_in: Literal["memory", "disk", "none"] = "none"
    shards: ShardCache | None = None  # fetches shards from a bucket; None if all shards are local
    known_unreadable: dict[int, str] = field(default_factory=dict)  # index -> reason, for unreadable examples
    stored_count: int = 0  # number of images already in the cache while it is filled
    # File to which the pipeline appends the index of each unreadable example; see `decode_blocks`.
    failures: IO[str] = field(default_factory=partial(open_scratch_file, "failures"))

    @property
    def unreadable(self) -> dict[int, str]:
        """The reason, by example index, for each example that could not be read so far."""
        self.collect_failures()
        return self.known_unreadable

    def collect_failures(self) -> None:
        """Add the examples in the file `failures` to `known_unreadable`, and log the first ones."""
        for index in map(int, self.failures):
            if index not in self.known_unreadable:
                self.known_unreadable[index] = find_failure_reason(self, index)
                if len(self.known_unreadable) <= _MAX_LOGGED_IMAGES:
                    self.log_message(f"skipped {describe_example(self, index)}: {self.known_unreadable[index]}")
                if len(self.known_unreadable) == _MAX_LOGGED_IMAGES:
                    self.log_message("further skipped images are only counted")

    @property
    def parallel(self) -> int:
        """Number of images that a pipeline decodes in parallel."""
        return self.threads or count_usable_cpus()

    def tensor(self) -> tf.Tensor:
        """Return the cache as a CPU tensor, without a copy."""
        return wrap_array(self.array)

    def gather_rows(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        """Gather the cached images of a batch; see `BatchSource`."""
        return tf.gather(tensor, index)

    def open_gate(self, reader: str, blocks: Iterator[BlockShards], max_rows_ahead: int) -> ShardGate:
        """Open the gate of a pipeline over this split. It never waits if the images are cached."""
        shards = self.shards or (LocalShards() if self.split.shards else None)
        return ShardGate(None if self.array is not None else shards, self.split, reader, blocks, max_rows_ahead)

    def read_images(self, indices: np.ndarray) -> np.ndarray:
        """Return the images of the examples `indices`, int [k] in any order, as uint8 [k, S, S, 3].

        An unreadable image is black if `on_error` is "skip".

        Raises:
            DataError: an image is unreadable and `on_error` is "fail", or a shard is missing.
        """
        if self.array is not None:
            return np.array(self.array[indices])
        ascending, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        empty = np.zeros((0, self.size, self.size, 3), np.uint8)
        with convert_data_errors(self):
            # With a bucket, one row at a time: the rows of a batch can be in more shards than the shard cache can hold.
            return np.concatenate(
                [empty, *_iterate_decoded(self, ascending, "rows", 1 if self.shards else _BATCH_SIZE)]
            )[inverse]


def describe_example(pixels: Pixels, index: int) -> str:
    """Return an example's name for a message: its file, or `SHARD#RECORD (FILE)`.

    FILE is the file name in the record. It is omitted if the record has no file name or cannot be read.
    """
    name = pixels.split.name_of(index)
    if pixels.split.shards:
        with suppress(OSError, DataError, IndexError):  # the shard is missing, corrupt or truncated
            (record,) = locate_records(select_examples(pixels.split, np.array([index])))
            source = read_source_name(record)
            return f"{name} ({source})" if source else name
    return name


def find_failure_reason(pixels: Pixels, index: int) -> str:
    """Decode an unreadable example again, and return the reason why it fails, or a message that it can be read now.

    A shard in a bucket that is no longer on disk is fetched again.
    """
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
    """Context manager for a loop over batches: convert TensorFlow's error for an unreadable example into a `DataError`.

    TensorFlow's error does not name the example. Therefore the split is decoded again, from `stored_count` to the first
    unreadable example, which can take as long as an epoch. An error is raised unchanged if it is not from the input
    pipeline, if `source` is cached or has features, or if no unreadable example is detected.
    """
    try:
        yield
    except _READ_ERRORS as error:
        if not isinstance(source, Pixels) or source.array is not None or isinstance(error, _NON_DATA_ERRORS):
            raise
        if not re.search("Iterator|Dataset", get_error_message(error)):  # not an error of the input pipeline
            raise
        if not source.stored_count:
            source.log_message(f"an image of {source.split.name} cannot be read; searching for it")
        pixels = source
        probe = Pixels(
            pixels.split, pixels.size, pixels.resize, "skip", pixels.threads,
            check_stop=pixels.check_stop, shards=pixels.shards,
        )  # fmt: skip
        batches = _iterate_from(probe, source.stored_count)
        index = next((min(probe.unreadable) for _ in batches if probe.unreadable), None)
        if index is None:
            raise
        problem = f"cannot decode {describe_example(source, index)}: {find_failure_reason(source, index)}"
        raise DataError(problem, fix="repair or remove it, or set data.on_error=skip") from None


def require_readable(pixels: Pixels, class_names: Sequence[str]) -> None:
    """Raise a DataError if all images of the split, or all training images of a class, are unreadable.

    Images that have not been decoded yet count as readable.
    """
    split, unreadable = pixels.split, pixels.unreadable
    if not unreadable:
        return
    readable_counts = np.bincount(np.delete(split.labels, sorted(unreadable)), minlength=len(class_names))
    is_lost = (np.bincount(split.labels, minlength=len(class_names)) > 0) & (readable_counts == 0)  # by class
    if readable_counts.any() and (split.name != "train" or not is_lost.any()):
        return
    index = next(index for index in sorted(unreadable) if is_lost[split.labels[index]])
    description = (
        f"{split.name} images"
        if not readable_counts.any()
        else f"training images of {class_names[split.labels[index]]}"
    )
    num_images = split.count if not readable_counts.any() else int((split.labels == split.labels[index]).sum())
    problem = (
        f"none of the {num_images} {description} can be decoded, "
        f"the first: {describe_example(pixels, index)}: {unreadable[index]}"
    )
    raise DataError(problem, fix="repair them, or remove the class or split")


def build_row_dataset(pixels: Pixels, block: Callable[[tf.Tensor], Block], count: int | None) -> tf.data.Dataset:
    """Build a dataset of rows (see `decode_blocks`) whose images are decoded each time they are read.

    Args:
        block: function that computes a block from its index, int64.
        count: number of blocks; None for an infinite dataset.
    """
    failures_file = pixels.failures.name if pixels.on_error == "skip" else None
    blocks = build_block_dataset(block, count)
    return decode_blocks(
        blocks, pixels.split, pixels.size, pixels.resize, threads=pixels.parallel, failures_file=failures_file
    )


def _iterate_decoded(
    pixels: Pixels, indices: np.ndarray, reader: str, batch_size: int = _BATCH_SIZE
) -> Iterator[np.ndarray]:
    """Yield the images of the examples `indices`, int64 [n], increasing, in batches: uint8 [b, S, S, 3].

    A batch has `batch_size` images, the last one perhaps fewer. `reader`: name of this pipeline in the shard cache.
    """
    num_blocks, block = make_sequence_blocks(pixels.split, indices, batch_size=1)
    gate = pixels.open_gate(
        reader, compute_block_shards(block, num_blocks), compute_max_rows_ahead(batch_size, pixels.parallel, elements=2)
    )
    images = build_row_dataset(pixels, block, num_blocks).map(without_autograph(lambda row: row["image"]))
    batches = iter(images.batch(batch_size).prefetch(2))
    for _ in range(0, len(indices), batch_size):
        gate.wait_for(batch_size)
        yield next(batches).numpy()
        pixels.check_stop()
        pixels.collect_failures()
    del batches
    gate.close()


def _iterate_from(pixels: Pixels, start: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of the images from index `start` to the end of the split.

    When the caller takes the next batch, the size of the previous one is added to `pixels.stored_count`.
    """
    for images in _iterate_decoded(pixels, np.arange(start, pixels.split.count, dtype=np.int64), "filling"):
        yield images
        pixels.stored_count += len(images)


def _open_disk_cache(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> bool:
    """Map the disk cache, STEM.u8, as `pixels.array`. Return False if it is missing, incomplete or corrupt.

    Also return False if it lists unreadable examples and `pixels.on_error` is "fail".
    """
    pixel_file = stem.with_suffix(".u8")

    def report_block() -> None:
        health.record_progress()
        pixels.check_stop()

    try:
        metadata = json.loads(stem.with_suffix(".json").read_bytes())
        unreadable, crc32c = {int(index): str(reason) for index, reason in metadata["bad"].items()}, metadata["crc32c"]
        if any(not 0 <= index < pixels.split.count for index in unreadable):
            return False
        if pixel_file.stat().st_size != int(np.prod(shape)) or (unreadable and pixels.on_error == "fail"):
            return False
        if _extend_crc(compute_file_crc32c(pixel_file, report_block), unreadable) != crc32c:
            pixels.log_message(f"{pixel_file} is corrupt (checksum mismatch); decoding the images again")
            return False
        # Mode "c" is copy-on-write: DLPack requires writable memory, although nothing writes to it.
        pixels.array, pixels.cached_in = np.memmap(pixel_file, np.uint8, "c", shape=shape), "disk"
    except (OSError, *CONTENT_ERRORS):
        return False
    pixels.known_unreadable.update(unreadable)
    return True


def _extend_crc(crc: int, unreadable: dict[int, str]) -> int:
    """Extend `crc`, the pixels' CRC32C, with the unreadable examples. Return it unchanged if `unreadable` is empty."""
    return google_crc32c.extend(crc, json.dumps(sorted(unreadable.items())).encode()) if unreadable else crc


def _fill_disk_cache(pixels: Pixels, stem: Path, shape: tuple[int, ...]) -> None:
    """Write the pixels to a temporary file, rename it to STEM.u8, and write STEM.json, which marks it as complete."""
    delete_temporary_files(stem.parent, STALE_SECONDS)
    crc, black_image = 0, np.zeros((1, *shape[1:]), np.uint8)
    with temporary_file(stem.with_suffix(".u8")) as temporary_path:
        # Not by a memory-mapped file, because a full disk would kill the process with SIGBUS.
        with open(temporary_path, "wb") as file:
            for images in chain(_iterate_from(pixels), [black_image]):
                file.write(images.data)
                crc = google_crc32c.extend(crc, images.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary_path, stem.with_suffix(".u8"))
    write_atomically(
        stem.with_suffix(".json"), json.dumps({"bad": pixels.unreadable, "crc32c": _extend_crc(crc, pixels.unreadable)})
    )


def build_cache_name(split: Split, size: int, resize: Resize, fingerprint: str) -> str:
    """Return the file name of a split's disk cache, without extension: `pixels-train-224-HASH`.

    HASH covers everything that determines the pixels. `fingerprint` is the dataset's fingerprint.
    """
    # Without the folder of the shards, which can differ at the next start. The fingerprint covers their content.
    ranges = (f"{os.path.basename(shard.path)} {shard.start} {shard.stop}" for shard in split.shards)
    sources = [*split.files, *ranges, split.image_field]
    key = (_FORMAT_VERSION, fingerprint, split.name, split.count, size, resize, split.orientation, *sources)
    digest = hashlib.sha256(encode_file_name("\n".join(map(str, key)))).hexdigest()[:16]
    return f"pixels-{split.name}-{size}-{digest}"


@dataclass(frozen=True)
class CachePlan:
    """Where to cache the decoded images of a split, and why."""

    where: Literal["memory", "disk", "none"]  # none: decode them each time they are read
    bytes: int  # size of the decoded images
    reason: str


def plan_image_cache(
    cache: CacheSetting, num_bytes: int, memory_budget: int, disk_budget: int, read_once: bool
) -> CachePlan:
    """Choose where to cache the decoded images of a split.

    Args:
        cache: data.cache. "auto" chooses memory if the memory budget suffices, else the disk if the disk budget
            suffices, else no cache. Any other value applies regardless of the budgets.
        num_bytes: size of the images in bytes. The budgets are in bytes, too.
        read_once: whether training reads the images only once, to compute features. If so, "auto" does not cache them.
    """
    budgets = f"memory budget {format_bytes(memory_budget)}, disk budget {format_bytes(disk_budget)}"
    if cache != "auto":
        return CachePlan(cache, num_bytes, "as configured")
    if read_once:
        return CachePlan("none", num_bytes, "training reads them once, for features")
    if num_bytes <= max(memory_budget, disk_budget):
        return CachePlan("memory" if num_bytes <= memory_budget else "disk", num_bytes, budgets)
    return CachePlan("none", num_bytes, f"they fit neither {budgets.replace(', ', ' nor ')}")


def plan_image_caches(
    config: RunConfig, dataset: Dataset, size: int, train_images_read_once: bool
) -> dict[str, CachePlan]:
    """Plan the cache of each split of a dataset, and return the plans by split name.

    The splits are planned in the order of `SPLITS`, each with the memory that earlier splits leave. `size` is the image
    side in pixels. If `train_images_read_once`, data.cache=auto does not cache the training images.
    """
    plans: dict[str, CachePlan] = {}
    memory_left = config.runtime.memory_budget or get_default_memory_budget()
    disk_budget, _ = choose_disk_budget(config.runtime.disk_budget, config.runtime.cache_folder)
    for name in [split for split in SPLITS if split in dataset.splits]:
        read_once, num_bytes = name == "train" and train_images_read_once, count_image_bytes(dataset.splits[name], size)
        plans[name] = plan_image_cache(config.data.cache, num_bytes, memory_left, disk_budget, read_once)
        memory_left -= num_bytes if plans[name].where == "memory" else 0
    return plans


def count_image_bytes(split: Split, size: int) -> int:
    """Return the size in bytes of a split's decoded images, including the black image for padding."""
    return (split.count + 1) * size * size * 3


def fill_cache(pixels: Pixels, plan: CachePlan, folder: Path, fingerprint: str) -> None:
    """Fill the cache that `plan` chooses, or open the disk cache that an earlier process completed.

    If the disk cannot be written, nothing is cached, and images are decoded each time they are read.

    Args:
        folder: the folder of all disk caches.
        fingerprint: the dataset's fingerprint, which is part of the file name of a disk cache.

    Raises:
        DataError: a shard is missing, or an image cannot be decoded and `pixels.on_error` is "fail".
        Interrupted: the bucket with the shards does not respond.
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
                free_space = format_bytes(get_free_bytes(folder))
                problem = f"cannot be cached in {folder} ({error.strerror}, {free_space} free)"
                log_message(f"{subject}: {problem}; decoded each time they are read")


class ImageStore:
    """The decoded images of all splits of a run, under one memory budget."""

    def __init__(self, data: OpenedData, config: RunConfig, size: int, check_stop: Callable[[str], None]) -> None:
        """Create the store without opening a split.

        Args:
            size: side of the images in pixels.
            check_stop: called between batches with an activity, such as "while images were decoded"; raises to cancel.
        """
        self.dataset, self.config, self.size = data.dataset, config, size
        self.train_images_read_once = False  # if True, data.cache=auto does not cache the training images
        self._data, self._check, self._opened = data, check_stop, dict[str, Pixels]()

    def open_split(self, name: str) -> Pixels:
        """Return the decoded images of a split. The first call opens the split, and fills its cache if it has one."""
        if name not in self._opened:
            self._opened[name] = self._open(name, self.size, self.config.model.resize, self.config.data.cache)
        return self._opened[name]

    def open_resized(self, name: str, size: int, resize: Resize) -> Pixels:
        """Open the images of a split at another size or with another `resize`. They are not cached."""
        return self._open(name, size, resize, "none")

    def _open(self, name: str, size: int, resize: Resize, cache: CacheSetting) -> Pixels:
        """Open the images of a split at a size, and cache them as `cache`, a value of data.cache, configures."""
        split, runtime = self.dataset.splits[name], self.config.runtime
        check_stop = partial(self._check, f"while the {name} images were decoded")
        on_error, threads, shards = self.config.data.on_error, runtime.data_threads, self._data.shards
        pixels = Pixels(
            split, size, resize, on_error, threads, log_message=self._log, check_stop=check_stop, shards=shards
        )
        num_bytes, read_once = count_image_bytes(split, size), name == "train" and self.train_images_read_once
        disk_budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        plan = plan_image_cache(cache, num_bytes, self.memory_left, disk_budget, read_once)
        fill_cache(pixels, plan, runtime.cache_folder, self.dataset.fingerprint)
        require_readable(pixels, self.dataset.class_names)
        return pixels

    def gather_unreadable(self, control: ControlChannel) -> None:
        """Add the unreadable images that the other workers have detected. All workers must call this together."""
        if control.size == 1 or self.config.data.on_error == "fail":
            return
        local_unreadable = {
            name: {int(index): reason for index, reason in pixels.unreadable.items()}
            for name, pixels in self._opened.items()
        }
        for worker_unreadable in control.reduce("unreadable images", local_unreadable, list):
            for name in worker_unreadable.keys() & self._opened.keys():
                self._opened[name].known_unreadable |= {
                    int(index): reason for index, reason in worker_unreadable[name].items()
                }

    def require_readable(self) -> None:
        """Raise a DataError if an opened split, or a class of the opened training split, has no readable image."""
        for pixels in self._opened.values():
            require_readable(pixels, self.dataset.class_names)

    def describe_readable_counts(self) -> list[str]:
        """Return a line per opened split with unreadable images: how many remain, in total and in rare classes."""
        return [
            f"{name}: {len(pixels.unreadable)} of {pixels.split.count} images could not be decoded, left are "
            + describe_class_counts(np.delete(pixels.split.labels, sorted(pixels.unreadable)), self.dataset.class_names)
            for name, pixels in self._opened.items()
            if pixels.unreadable
        ]

    def read_images(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images of the examples `indices` of a split, uint8 [k, S, S, 3]. See `Pixels.read_images`."""
        return self.open_split(name).read_images(np.asarray(indices, np.int64))

    def close(self) -> None:
        """Stop further transfers of shards from a bucket."""
        if self._data.shards:
            self._data.shards.close()

    def release_split(self, name: str) -> None:
        """Delete the decoded images of a split from memory. The next call of `open_split` opens it again."""
        self._opened.pop(name, None)

    @property
    def memory_left(self) -> int:
        """Bytes of the memory budget that are not used by decoded images. It is negative if they exceed the budget."""
        budget = self.config.runtime.memory_budget or get_default_memory_budget()
        return budget - sum(
            count_image_bytes(pixels.split, pixels.size)
            for pixels in self._opened.values()
            if pixels.cached_in == "memory"
        )

    def name_of(self, split: str, index: int) -> str:
        """Return an example's file, or SHARD#RECORD. A local copy is named by its address in the bucket."""
        return replace_local_paths(self.dataset.splits[split].name_of(index), self.addresses)

    def list_sources(self, name: str, indices: np.ndarray) -> tuple[str, ...]:
        """Return the file names in the records of the examples `indices`, int [k], increasing, of a split.

        The name is "" for a record without a file name. The result is () if the split has no shards, if the first
        record has no file name, or if a shard cannot be read. Shards that are no longer on disk are fetched again.
        """
        split, shards = self.dataset.splits[name], self._data.shards
        if not split.shards:
            return ()
        examples = select_examples(split, indices)

        def read() -> Iterator[str]:
            for path, ranges in groupby(examples.shards, lambda shard: shard.path):
                if shards:
                    shards.require("names", [os.path.basename(path)])
                for record in locate_records(replace(examples, shards=tuple(ranges))):
                    health.record_progress()
                    yield read_source_name(record)

        sources: tuple[str, ...] = ()
        with suppress(OSError, DataError):  # images can be cached although their shard is now missing or corrupt
            names = read()
            sources = (first, *names) if (first := next(names, "")) else ()
        if shards:
            shards.release("names")
        return sources

    @property
    def addresses(self) -> dict[str, str]:
        """Local folder -> the bucket folder that it is a copy of."""
        return self._data.addresses

    def _log(self, text: str) -> None:
        """Log a line in which local copies are named by their addresses in the bucket."""
        log.info(replace_local_paths(text, self.addresses))

    def list_undecodable(self) -> list[str]:
        """Return a line for each unreadable example of the opened splits that was skipped so far, with the reason."""
        pixels_by_split = sorted(self._opened.items())
        return [
            replace_local_paths(f"{describe_example(pixels, index)}: {reason}", self.addresses)
            for _, pixels in pixels_by_split
            for index, reason in sorted(pixels.unreadable.items())
        ]
