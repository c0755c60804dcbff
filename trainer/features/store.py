"""Features of the images of a split: computed once, stored in memory or on disk, and read instead of the images.

`NAME.rows` holds all rows; `NAME.list` has a line with a checksum per stored block. Both only grow, so a start reads
the rows of every earlier one; missing and damaged rows are computed again.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.data.host import fresh_array, usable_cpus
from trainer.data.images import tensor_over
from trainer.data.order import Read
from trainer.data.shard_gate import ShardGate
from trainer.errors import DataError
from trainer.runs.checkpoints import crc32c_hex
from trainer.types import Split

# NumPy dtypes of stored rows; it has no bfloat16, whose bits are stored as uint16.
STORED: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16),
}  # fmt: skip


@dataclass
class Features:
    """Features of the examples of a split that this worker reads; a `BatchSource`, as `Pixels` is."""

    split: Split
    shape: tuple[int, ...]  # of one example
    dtype: str  # float32 | float16 | bfloat16
    views: int  # per example; epoch e reads view e % views
    own: np.ndarray  # int64 increasing: the examples that this worker reads
    threads: int | None = None  # of a private pool for pipelines; None: TensorFlow's
    note: Callable[[str], None] = lambda _: None
    cached_in: Literal["memory", "disk"] = "memory"
    array: np.ndarray | None = None  # [views * (count + 1), *shape], the last row of each view is 0
    file: Path | None = None  # rows on disk, without suffix; None: nothing is written
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [views, count]
    bad: dict[int, str] = field(default_factory=dict)  # index -> why its image could not be read; it has weight 0

    @property
    def parallel(self) -> int:
        return self.threads or usable_cpus()

    @property
    def row_bytes(self) -> int:
        return bytes_of(self.shape, self.dtype, 1, 1)

    @property
    def where(self) -> str:
        return f"{self.file}.rows" if self.file else "memory"

    @property
    def bytes(self) -> int:
        return bytes_of(self.shape, self.dtype, self.views, len(self.own))

    def tensor(self) -> tf.Tensor:
        return tensor_over(self.array)

    def rows_of(self, tensor: tf.Tensor, index: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Gather rows [b, *shape] at int64 indices [b], each of the view of its epoch, int64 [b]."""
        rows = tf.gather(tensor, epoch % self.views * (self.split.count + 1) + index)
        return tf.bitcast(rows, tf.bfloat16) if self.dtype == "bfloat16" else rows

    def gate(self, reader: str, reads: Iterator[Read], ahead: int) -> ShardGate:
        """Return a gate that is always open."""
        return ShardGate(None, self.split, reader, reads, ahead)

    def missing(self, view: int) -> np.ndarray:
        """Return the examples that this worker reads and lacks, bool [count]."""
        required = np.zeros(self.split.count, bool)
        required[self.own] = True
        return required & ~self.known[view]

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Convert `rows` [n, *shape] of any floating dtype for `write`.

        Raises:
            DataError: a value is too large for float16.
        """
        if self.dtype == "bfloat16":
            return np.asarray(tf.bitcast(tf.cast(rows, tf.bfloat16), tf.uint16))
        with np.errstate(over="ignore"):
            typed = rows.astype(STORED[self.dtype], copy=False)
        if self.dtype == "float16" and not np.isfinite(typed).all() and np.isfinite(rows).all():
            problem, fix = "features exceed 65,504, the largest float16 value", "use features_dtype=bfloat16"
            raise DataError(problem, key="features_dtype", value="float16", fix=fix)
        return typed

    def write(self, view: int, index: np.ndarray, rows: np.ndarray, bad: dict[int, str]) -> None:
        """Store `rows` [n, *shape], of the dtype in `STORED`, at increasing indices int64 [n].

        Raises:
            OSError: the disk is full or missing, and the features are not in memory.
        """
        splits = np.flatnonzero(np.diff(index) != 1) + 1
        for indices, values in zip(np.split(index, splits), np.split(rows, splits), strict=True):
            if len(indices):
                self._write_run(view, int(indices[0]), np.ascontiguousarray(values), bad)
        self.bad |= bad

    def _write_run(self, view: int, first: int, rows: np.ndarray, bad: dict[int, str]) -> None:
        count, start = len(rows), view * (self.split.count + 1) + first
        if self.cached_in == "memory":
            assert self.array is not None
            self.array[start : start + count] = rows
        if self.file:
            block = {"view": view, "first": first, "count": count, "crc32c": crc32c_hex(rows),
                     "bad": {i: why for i, why in bad.items() if first <= i < first + count}}  # fmt: skip
            try:
                # Plain writes: a full disk under a mapped file would kill the process.
                with open(self.file.with_suffix(".rows"), "r+b") as file:
                    file.seek(start * self.row_bytes)
                    file.write(rows.data.cast("B"))
                with open(self.file.with_suffix(".list"), "a") as listed:
                    listed.write(json.dumps(block) + "\n")
            except OSError as error:
                if self.cached_in != "memory":
                    raise
                self.note(f"features cannot be stored in {self.file.parent} ({error.strerror}); using memory only")
                remove(self.file)
                self.file = None
        self.known[view, first : first + count] = True

    def complete(self) -> None:
        """Make the features readable; all rows are stored."""
        assert not any(self.missing(view).any() for view in range(self.views))
        if self.cached_in == "disk":
            assert self.file is not None
            # Copy on write, since DLPack requires writable memory; nothing writes.
            shape = (self.views * (self.split.count + 1), *self.shape)
            self.array = np.memmap(self.file.with_suffix(".rows"), STORED[self.dtype], "c", shape=shape)


def remove(file: Path) -> None:
    """Delete stored features; a process that has them open can still read them."""
    for suffix in (".rows", ".list"):
        file.with_suffix(suffix).unlink(missing_ok=True)


def bytes_of(shape: tuple[int, ...], dtype: str, views: int, examples: int) -> int:
    """Return the bytes of stored features."""
    return views * examples * int(np.prod(shape)) * STORED[dtype].itemsize


def open_features(features: Features, file: Path, memory_budget: int, disk_budget: int) -> Features | None:
    """Load the rows of earlier starts, stored under the name `file`, into new `features`; None if there is no room.

    Features within the memory budget are in memory, with a copy on disk if they fit that budget; others on disk only.
    The least recently used features on disk are deleted to keep within its budget. Budgets are in bytes.
    """
    in_memory, on_disk = features.bytes <= memory_budget, features.bytes <= disk_budget
    if not in_memory and not on_disk:
        return None
    features.cached_in = "memory" if in_memory else "disk"
    rows = features.views * (features.split.count + 1)
    features.known = np.zeros((features.views, features.split.count), bool)
    if in_memory:
        features.array = fresh_array((rows, *features.shape), STORED[features.dtype])
    if on_disk:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_room(file, features.bytes, disk_budget)
            with open(file.with_suffix(".rows"), "ab") as sparse:
                sparse.truncate(rows * features.row_bytes)
            file.with_suffix(".list").touch()
            features.file = file
            _load_stored(features)
        except OSError as error:
            features.note(f"features cannot be stored in {file.parent} ({error.strerror})")
            if not in_memory:
                return None
            features.file = None
    return features


def _load_stored(features: Features) -> None:
    """Mark the rows on disk that match their checksums as known, and read them if features are in memory."""
    assert features.file
    damaged, size = 0, features.split.count + 1
    with open(features.file.with_suffix(".rows"), "rb") as rows:
        for line in features.file.with_suffix(".list").read_text(errors="replace").splitlines():
            try:
                block = json.loads(line)
                view, first, count = (int(block[key]) for key in ("view", "first", "count"))
                bad = {int(index): str(why) for index, why in block["bad"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # the process died while it wrote the line
                continue
            if not (0 <= view < features.views and first >= 0 and 0 < count < size - first):
                continue
            start = view * size + first
            rows.seek(start * features.row_bytes)
            content = rows.read(count * features.row_bytes)
            is_intact = crc32c_hex(content) == block["crc32c"]
            damaged += not is_intact
            features.known[view, first : first + count] = is_intact
            if is_intact:
                features.bad |= bad
                if features.array is not None:
                    values = np.frombuffer(content, STORED[features.dtype]).reshape(count, *features.shape)
                    features.array[start : start + count] = values
    if damaged:
        features.note(f"{damaged} blocks of {features.file}.rows are damaged; they are computed again")


def _make_room(file: Path, needed: int, budget: int) -> None:
    """Delete the least recently used features until `needed` more bytes fit the budget."""
    others = []
    for path in file.parent.glob("*.list"):
        rows = path.with_suffix(".rows")
        if path.stem != file.name and rows.exists():
            others.append((path.stat().st_mtime, rows.stat().st_blocks * 512, path.with_suffix("")))
    total = needed + sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if total <= budget:
            return
        remove(other)
        total -= size
