"""Store the features of a split's images in memory or on disk, so that they are read instead of the images.

On disk, `NAME.rows` contains, for each view, a row for each example and one of zeros for padding, at fixed offsets.
After a block of consecutive rows is written, a JSON line with its range and checksum is appended to `NAME.list`. So a
restart can read the rows that earlier starts wrote. Missing and corrupt rows are computed again.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.data.host import allocate_array, count_usable_cpus
from trainer.data.images import wrap_array
from trainer.data.order import BlockShards
from trainer.data.shard_gate import ShardGate
from trainer.errors import DataError, format_count
from trainer.runs.checkpoints import crc32c_hex
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.types import LogMessage, Split

# NumPy dtypes of stored rows. NumPy has no bfloat16, so its bits are stored as uint16.
STORED_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16),
}  # fmt: skip


@dataclass
class Features:
    """The features of a split's examples that this worker reads. It is a `BatchSource` (`trainer.data.images`)."""

    split: Split
    shape: tuple[int, ...]  # shape of one example's features
    dtype: str  # float32 | float16 | bfloat16
    views: int  # augmented views per example; epoch e reads view e % views
    indices: np.ndarray  # int64 [n], increasing; the examples that this worker reads
    threads: int | None = None  # number of threads in a private pool for pipelines; None for TensorFlow's pool
    log_message: LogMessage = lambda _: None
    cached_in: Literal["memory", "disk"] = "memory"
    array: np.ndarray | None = None  # [views * (count + 1), *shape]; the last row of each view is 0, for padding
    file: Path | None = None  # path of NAME.rows and NAME.list without suffix; None if nothing is on disk
    stored: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [views, count]: which rows are stored
    unreadable: dict[int, str] = field(default_factory=dict)  # index -> reason; these examples have weight 0

    @property
    def parallel(self) -> int:
        """Number of examples that a pipeline processes in parallel."""
        return self.threads or count_usable_cpus()

    @property
    def row_bytes(self) -> int:
        """Size of one example's features in one view, in bytes."""
        return count_feature_bytes(self.shape, self.dtype, num_views=1, num_examples=1)

    @property
    def location(self) -> str:
        """Where the rows are stored, for log lines: the path of NAME.rows, or "memory" if they are not on disk."""
        return f"{self.file}.rows" if self.file else "memory"

    @property
    def num_bytes(self) -> int:
        """Size of all views of the examples that this worker reads, in bytes.

        Rows of other examples are never written: their memory pages and disk blocks are not allocated.
        """
        return count_feature_bytes(self.shape, self.dtype, self.views, len(self.indices))

    def tensor(self) -> tf.Tensor:
        """Return all rows as a tensor that uses the memory of `array`, without a copy."""
        return wrap_array(self.array)

    def gather_rows(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Return the features of examples, each in its epoch's view: [b, *shape] in `dtype`.

        Args:
            tensor: all rows, from the method `tensor`.
            index: example indices, int64 [b]; `split.count` for padding and for unreadable images.
            epoch: epoch of each example, int64 [b].
        """
        rows = tf.gather(tensor, epoch % self.views * (self.split.count + 1) + index)
        return tf.bitcast(rows, tf.bfloat16) if self.dtype == "bfloat16" else rows

    def open_gate(self, reader: str, blocks: Iterator[BlockShards], max_rows_ahead: int) -> ShardGate:
        """Return a gate that never waits, because features are read without the shards of the images."""
        return ShardGate(None, self.split, reader, blocks, max_rows_ahead)

    def find_missing(self, view: int) -> np.ndarray:
        """Return which of this worker's examples have no stored features in a view, as bool [count]."""
        required = np.zeros(self.split.count, bool)
        required[self.indices] = True
        return required & ~self.stored[view]

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Convert rows [n, *shape] of any float dtype to the NumPy dtype in which `write` stores them.

        Raises:
            DataError: a finite value is too large for float16.
        """
        if self.dtype == "bfloat16":
            return np.asarray(tf.bitcast(tf.cast(rows, tf.bfloat16), tf.uint16))
        with np.errstate(over="ignore"):
            converted = rows.astype(STORED_DTYPES[self.dtype], copy=False)
        if self.dtype == "float16" and (np.isfinite(rows) & ~np.isfinite(converted)).any():
            problem, fix = "features exceed 65,504, the largest float16 value", "use features_dtype=bfloat16"
            raise DataError(problem, key="features_dtype", value="float16", fix=fix)
        return converted

    def write(self, view: int, index: np.ndarray, rows: np.ndarray, unreadable: dict[int, str]) -> None:
        """Store the features of examples.

        Args:
            view: index of the view.
            index: example indices, int64 [n], increasing.
            rows: features [n, *shape], encoded by `encode`.
            unreadable: index -> reason, for each example whose image cannot be read.

        Raises:
            OSError: the rows cannot be written to disk, and the features are not in memory.
        """
        run_starts = np.flatnonzero(np.diff(index) != 1) + 1
        for indices, values in zip(np.split(index, run_starts), np.split(rows, run_starts), strict=True):
            if len(indices):
                self._write_block(view, int(indices[0]), np.ascontiguousarray(values), unreadable)
        self.unreadable |= unreadable

    def _write_block(self, view: int, first: int, rows: np.ndarray, unreadable: dict[int, str]) -> None:
        """Store rows of consecutive examples.

        If the disk fails, features in memory are no longer written to disk, and their files are deleted.
        """
        count, start = len(rows), view * (self.split.count + 1) + first
        if self.cached_in == "memory":
            assert self.array is not None
            self.array[start : start + count] = rows
        if self.file:
            block = {"view": view, "first": first, "count": count, "crc32c": crc32c_hex(rows),
                     "bad": {i: why for i, why in unreadable.items() if first <= i < first + count}}  # fmt: skip
            try:
                # Do not write through a mapped file, because a full disk would then kill the process with SIGBUS.
                with open(self.file.with_suffix(".rows"), "r+b") as rows_file:
                    rows_file.seek(start * self.row_bytes)
                    rows_file.write(rows.data.cast("B"))
                with open(self.file.with_suffix(".list"), "a") as list_file:
                    list_file.write("\n" + json.dumps(block) + "\n")  # a kill can have truncated the last line
            except OSError as error:
                if self.cached_in != "memory":
                    raise
                folder = self.file.parent
                self.log_message(f"features cannot be stored in {folder} ({error.strerror}); using memory only")
                with suppress(OSError):  # the features are in memory, so the files are not needed
                    delete_features(self.file)
                self.file = None
        self.stored[view, first : first + count] = True

    def finish_writing(self) -> None:
        """Make the features readable, by `array`. Requires that the rows of all `indices` are stored, in each view."""
        assert not any(self.find_missing(view).any() for view in range(self.views))
        if self.cached_in == "disk":
            assert self.file is not None
            # Mode "c" is copy-on-write: DLPack requires writable memory, although nothing writes to it.
            shape = (self.views * (self.split.count + 1), *self.shape)
            self.array = np.memmap(self.file.with_suffix(".rows"), STORED_DTYPES[self.dtype], "c", shape=shape)


def delete_features(file: Path) -> None:
    """Delete stored features: `file` with the suffixes .rows and .list. Mapped files can still be read."""
    for suffix in (".rows", ".list"):
        file.with_suffix(suffix).unlink(missing_ok=True)


def count_feature_bytes(shape: tuple[int, ...], dtype: str, num_views: int, num_examples: int) -> int:
    """Return the size of stored features in bytes. `shape` is the shape of one example's features in one view."""
    return num_views * num_examples * int(np.prod(shape)) * STORED_DTYPES[dtype].itemsize


def open_features(features: Features, file: Path, memory_budget: int | None, disk_budget: int) -> Features | None:
    """Prepare `features` for writing, and load the rows that earlier processes stored in `file`.

    Features that fit the memory budget are stored in memory, and also on disk if they fit the disk budget. Features
    that fit only the disk budget are stored only on disk. The least recently used features in the same folder are
    deleted to stay within the disk budget. Disk errors are logged, not raised.

    Args:
        features: new features, which are modified and returned.
        file: path of the files on disk, without suffix.
        memory_budget: maximum size in memory, in bytes; None to store the features only on disk.
        disk_budget: maximum total size on disk of the features in the folder, in bytes.

    Returns:
        The features, or None if they fit neither budget, or if they do not fit in memory and the disk fails.
    """
    in_memory = memory_budget is not None and features.num_bytes <= memory_budget
    on_disk = features.num_bytes <= disk_budget
    if not in_memory and not on_disk:
        return None
    features.cached_in = "memory" if in_memory else "disk"
    num_rows = features.views * (features.split.count + 1)
    features.stored = np.zeros((features.views, features.split.count), bool)
    if in_memory:
        features.array = allocate_array((num_rows, *features.shape), STORED_DTYPES[features.dtype])
    if on_disk:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _evict(file, features.num_bytes, disk_budget)
            with open(file.with_suffix(".rows"), "ab") as sparse_file:
                sparse_file.truncate(num_rows * features.row_bytes)
            file.with_suffix(".list").touch()  # marks the features as recently used, for `_evict`
            features.file = file
            _load_rows(features)
        except OSError as error:
            features.log_message(f"features cannot be stored in {file.parent} ({error.strerror})")
            if not in_memory:
                return None
            features.file = None
    return features


def _load_rows(features: Features) -> None:
    """Mark rows on disk that match their checksums as stored, and copy them to `features.array` unless it is None."""
    assert features.file
    corrupt_blocks = set[tuple[int, int, int]]()
    rows_per_view = features.split.count + 1
    with open(features.file.with_suffix(".rows"), "rb") as rows_file:
        for line in features.file.with_suffix(".list").read_text(errors="replace").splitlines():
            try:
                block = json.loads(line)
                view, first, count = (int(block[key]) for key in ("view", "first", "count"))
                checksum = str(block["crc32c"])
                unreadable = {int(index): str(why) for index, why in block["bad"].items()}
            except CONTENT_ERRORS:  # the process was killed while it wrote the line
                continue
            in_range = 0 <= view < features.views and first >= 0 and 0 < count < rows_per_view - first
            if not in_range or any(not first <= index < first + count for index in unreadable):
                continue
            start = view * rows_per_view + first
            rows_file.seek(start * features.row_bytes)
            content = rows_file.read(count * features.row_bytes)
            is_intact = crc32c_hex(content) == checksum
            features.stored[view, first : first + count] = is_intact  # the last line about a row decides
            if not is_intact:
                corrupt_blocks.add((view, first, count))
            else:
                corrupt_blocks.discard((view, first, count))
                features.unreadable |= unreadable
                if features.array is not None:
                    values = np.frombuffer(content, STORED_DTYPES[features.dtype]).reshape(count, *features.shape)
                    features.array[start : start + count] = values
    if corrupt_blocks:
        blocks = format_count(len(corrupt_blocks), "block")
        features.log_message(f"{blocks} of {features.file}.rows corrupt; computing the features again")


def _evict(file: Path, num_required_bytes: int, budget: int) -> None:
    """Delete the least recently used features in the folder, except `file`, until the required bytes fit the budget."""
    other_files = []
    for path in file.parent.glob("*.list"):
        rows_path = path.with_suffix(".rows")
        if path.stem != file.name and rows_path.exists():
            # The space that the sparse file takes on disk: `st_blocks` counts units of 512 bytes.
            other_files.append((path.stat().st_mtime, rows_path.stat().st_blocks * 512, path.with_suffix("")))
    total_bytes = num_required_bytes + sum(num_bytes for _, num_bytes, _ in other_files)
    for _, num_bytes, other_file in sorted(other_files):
        if total_bytes <= budget:
            return
        delete_features(other_file)
        total_bytes -= num_bytes
