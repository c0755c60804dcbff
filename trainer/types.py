"""The small types that packages hand each other."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf


@dataclass(frozen=True)
class Shard:
    """One TFRecord file: `count` records of which this split uses [`start`, `stop`)."""

    path: str
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """The examples of one split. An example's index is its place in this split, 0 <= index < count.

    Either `files` (one image file an example) or `shards` (records in order) is filled.
    """

    name: str  # train | validation | test
    labels: np.ndarray  # int32 [count]
    files: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    image_field: str = "image"
    groups: tuple[str, ...] | None = None  # of each example, by data.group_field; only of the split that is scored last

    @property
    def count(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """The file, or shard and record number, of an example: what a report prints."""
        if self.files:
            return self.files[index]
        for shard in self.shards:
            if index < shard.stop - shard.start:
                return f"{shard.path}#{shard.start + index}"
            index -= shard.stop - shard.start
        raise IndexError(index)


@dataclass(frozen=True)
class Dataset:
    """Labelled images with their class names and splits."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]  # train always; validation and test where the data has them
    fingerprint: str  # of names, labels, sizes and checksums: another dataset has another one
    skipped: tuple[str, ...] = ()  # what could not be read, with the reason
    notes: tuple[str, ...] = field(default=())  # worth printing: imbalance, an empty split, ...


class Batch(TypedDict):
    """What one replica gets for one step; b is its share of the global batch, S the image side in pixels."""

    image: tf.Tensor  # uint8 [b, S, S, 3], or what a trunk made of it
    label: tf.Tensor  # int32 [b]
    weight: tf.Tensor  # float32 [b]: 1 for an example, 0 for padding
    index: tf.Tensor  # int64 [b]: the example's index in its split
    position: tf.Tensor  # int64 [b]: index in the global batch
    other_label: NotRequired[tf.Tensor]  # int32 [b]: with mixup or cutmix, of what was mixed in
    mix: NotRequired[tf.Tensor]  # float32 [b]: and the share of `label`, 1 where nothing was
    teacher: NotRequired[tf.Tensor]  # float32 [b, classes]: a teacher's probabilities, where it answered beforehand


@dataclass(frozen=True)
class Scored:
    """What a classifier answers for examples of a split, ordered by example index."""

    split: str
    indices: np.ndarray  # int64 [n]: of the examples
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes]


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of one pass over one split, and what they were computed from."""

    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes], ordered by example index
    names: tuple[str, ...]  # file or record of each example
    metrics: dict[str, object]  # see trainer/evaluation/metrics.py


def scored_split(splits: Container[str]) -> str:
    """The split that a run is scored on at its end: test, or validation where the data has no test split."""
    return "test" if "test" in splits else "validation"
