"""Features of the images of a split below a cut: computed once, stored in memory or on disk, read instead of images.

On disk a file holds all rows, and a list beside it says which of them are there, with a checksum a piece. Both only
grow, so a start takes over the rows of any earlier one: those that are missing or damaged are computed again.
"""

import json
import os
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
from trainer.runs.checkpoints import checksum
from trainer.types import Split

# How numpy holds them; it has no bfloat16, whose bits are kept as they are.
STORED: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16),
}  # fmt: skip
_SUFFIXES = (".rows", ".list")


@dataclass
class Features:
    """Features of those examples of a split that this worker reads; a `BatchSource`, as `Pixels` is."""

    split: Split
    shape: tuple[int, ...]  # of one example
    dtype: str  # float32 | float16 | bfloat16
    views: int  # of each example; epoch e reads view e % views
    own: np.ndarray  # int64 increasing: the examples that this worker reads
    threads: int | None = None  # of a pool of their own for pipelines over them; None: TensorFlow's
    note: Callable[[str], None] = lambda _: None
    kept: Literal["memory", "disk"] = "memory"
    array: np.ndarray | None = None  # [views * (count + 1), *shape], the last row of each view is 0
    file: Path | None = None  # the rows on disk; None: nothing is written
    known: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [views, count]
    bad: dict[int, str] = field(default_factory=dict)  # index -> why its image could not be read; it counts nowhere

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
        """Rows [b, *shape] at int64 indices [b], each of the view that belongs to its epoch, int64 [b]."""
        rows = tf.gather(tensor, epoch % self.views * (self.split.count + 1) + index)
        return tf.bitcast(rows, tf.bfloat16) if self.dtype == "bfloat16" else rows

    def gate(self, reader: str, reads: Iterator[Read], ahead: int) -> ShardGate:
        """A gate with nothing to wait for."""
        return ShardGate(None, self.split, reader, reads, ahead)

    def missing(self, view: int) -> np.ndarray:
        """Examples that this worker reads and lacks, bool [count]."""
        wanted = np.zeros(self.split.count, bool)
        wanted[self.own] = True
        return wanted & ~self.known[view]

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """`rows` [n, *shape] of any floating type as `write` takes them.

        Raises:
            DataError: a value is too large for float16.
        """
        if self.dtype == "bfloat16":
            return np.asarray(tf.bitcast(tf.cast(rows, tf.bfloat16), tf.uint16))
        with np.errstate(over="ignore"):
            typed = rows.astype(STORED[self.dtype], copy=False)
        if self.dtype == "float16" and not np.isfinite(typed).all() and np.isfinite(rows).all():
            raise DataError(
                "features_dtype=float16 holds numbers up to 65,504, and there are larger ones; take bfloat16"
            )
        return typed

    def write(self, view: int, index: np.ndarray, rows: np.ndarray, bad: dict[int, str]) -> None:
        """Store `rows` [n, *shape], typed as in `STORED`, of increasing indices int64 [n].

        Raises:
            OSError: the disk is full or gone, and memory does not hold them.
        """
        cuts = np.flatnonzero(np.diff(index) != 1) + 1
        for part, values in zip(np.split(index, cuts), np.split(rows, cuts), strict=True):
            if len(part):
                self._write_run(view, int(part[0]), np.ascontiguousarray(values), bad)
        self.bad |= bad

    def _write_run(self, view: int, first: int, rows: np.ndarray, bad: dict[int, str]) -> None:
        count, start = len(rows), view * (self.split.count + 1) + first
        if self.kept == "memory":
            assert self.array is not None
            self.array[start : start + count] = rows
        if self.file:
            piece = {"view": view, "first": first, "count": count, "crc32c": checksum(rows),
                     "bad": {i: why for i, why in bad.items() if first <= i < first + count}}  # fmt: skip
            try:
                _write_at(self.file.with_suffix(".rows"), start * self.row_bytes, rows.data.cast("B"))
                with open(self.file.with_suffix(".list"), "a") as listed:
                    listed.write(json.dumps(piece) + "\n")
            except OSError as error:
                if self.kept != "memory":
                    raise
                self.note(f"features cannot be kept in {self.file.parent} ({error.strerror}); in memory alone, then")
                remove(self.file)
                self.file = None
        self.known[view, first : first + count] = True

    def complete(self) -> None:
        """All rows are there: from now on they can be read."""
        assert not any(self.missing(view).any() for view in range(self.views))
        if self.kept == "disk":
            assert self.file is not None
            # Copy on write: DLPack takes only writable memory, and nobody writes.
            shape = (self.views * (self.split.count + 1), *self.shape)
            self.array = np.memmap(self.file.with_suffix(".rows"), STORED[self.dtype], "c", shape=shape)


def _write_at(path: Path, offset: int, content: memoryview) -> None:
    # Plain writes: a full disk under a mapped file would kill the process.
    handle = os.open(path, os.O_WRONLY)
    try:
        while content:
            written = os.pwrite(handle, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(handle)


def remove(file: Path) -> None:
    """Delete the features of a name; a process that has them open can still read them."""
    for suffix in _SUFFIXES:
        file.with_suffix(suffix).unlink(missing_ok=True)


def bytes_of(shape: tuple[int, ...], dtype: str, views: int, examples: int) -> int:
    """Bytes of stored features."""
    return views * examples * int(np.prod(shape)) * STORED[dtype].itemsize


def open_features(features: Features, file: Path, memory_budget: int, disk_budget: int) -> Features | None:
    """Take over rows of earlier starts under the name `file` into new `features`; None where there is no room.

    In memory if they fit its budget, with a copy on disk for the next start if they fit that one; else on disk. To keep
    to the budget of the disk, the least recently used features are deleted. Budgets are in bytes.
    """
    in_memory, on_disk = features.bytes <= memory_budget, features.bytes <= disk_budget
    if not in_memory and not on_disk:
        return None
    features.kept = "memory" if in_memory else "disk"
    rows = features.views * (features.split.count + 1)
    features.known = np.zeros((features.views, features.split.count), bool)
    if in_memory:
        features.array = fresh_array((rows, *features.shape), STORED[features.dtype])
    if on_disk:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_room(file, features.bytes, disk_budget)
            with open(file.with_suffix(".rows"), "ab") as whole:
                whole.truncate(rows * features.row_bytes)  # a hole, where nothing was written yet
            file.with_suffix(".list").touch()
            features.file = file
            _take_over(features)
        except OSError as error:
            features.note(f"features cannot be kept in {file.parent} ({error.strerror})")
            if not in_memory:
                return None
            features.file = None
    return features


def _take_over(features: Features) -> None:
    """Mark the rows on disk that match their checksums as known, and read them where features are in memory."""
    assert features.file
    damaged = 0
    size = features.split.count + 1
    with open(features.file.with_suffix(".rows"), "rb") as rows:
        for line in features.file.with_suffix(".list").read_text(errors="replace").splitlines():
            try:
                piece = json.loads(line)
                view, first, count = (int(piece[key]) for key in ("view", "first", "count"))
                bad = {int(index): str(why) for index, why in piece["bad"].items()}
                fits = 0 <= view < features.views and first >= 0 and 0 < count < size - first
            except (ValueError, KeyError, TypeError, AttributeError):  # the process died while it wrote the line
                fits = False
            if not fits:
                continue
            start = view * size + first
            rows.seek(start * features.row_bytes)
            content = rows.read(count * features.row_bytes)
            whole = checksum(content) == piece["crc32c"]
            damaged += not whole
            features.known[view, first : first + count] = whole
            if whole:
                features.bad |= bad
                if features.array is not None:
                    values = np.frombuffer(content, STORED[features.dtype]).reshape(count, *features.shape)
                    features.array[start : start + count] = values
    if damaged:
        features.note(f"{damaged} pieces of {features.file}.rows are damaged; they are computed again")


def _make_room(file: Path, needed: int, budget: int) -> None:
    """Delete what was not used for longest until `needed` bytes more fit the budget."""
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
