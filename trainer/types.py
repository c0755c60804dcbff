"""Small types used by several packages."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf


@dataclass(frozen=True)
class Shard:
    """One TFRecord file of `count` records; the split uses records [`start`, `stop`)."""

    path: str
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """Examples of one split, indexed by 0 <= index < count.

    Either `files` (one image file per example) or `shards` (records in order) is set.
    """

    name: str  # train | validation | test
    labels: np.ndarray  # int32 [count]
    files: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    image_field: str = "image"
    groups: tuple[str, ...] | None = None  # data.group_field per example, for the split of the final scores only

    @property
    def count(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Return the file, or shard#record, of an example, as reports print it."""
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
    fingerprint: str  # hash of names, labels, sizes and checksums
    skipped: tuple[str, ...] = ()  # unreadable files, with the reason
    notes: tuple[str, ...] = ()  # for the log: imbalance, an empty split, ...


class Batch(TypedDict):
    """Batch of one replica for one step; b is the per-replica batch size, S the image side in pixels."""

    image: tf.Tensor  # uint8 [b, S, S, 3], or the features of a trunk
    label: tf.Tensor  # int32 [b]
    weight: tf.Tensor  # float32 [b]: 1 for an example, 0 for padding
    index: tf.Tensor  # int64 [b]: index in the split
    position: tf.Tensor  # int64 [b]: index in the global batch
    other_label: NotRequired[tf.Tensor]  # int32 [b]: of the second image of mixup or cutmix
    mix: NotRequired[tf.Tensor]  # float32 [b]: weight of `label` in a mixed example, 1 without mixing
    teacher: NotRequired[tf.Tensor]  # float32 [b, classes]: cached probabilities of the teacher


@dataclass(frozen=True)
class Scored:
    """Predictions of a classifier for examples of a split, ordered by example index."""

    split: str
    indices: np.ndarray  # int64 [n]: index in the split
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes]


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one pass over one split, with the predictions they are computed from."""

    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes], ordered by example index
    names: tuple[str, ...]  # file or record of each example
    metrics: dict[str, object]  # see trainer/evaluation/metrics.py


def scored_split(splits: Container[str]) -> str:
    """Return the split of the final scores: test, or validation where the data has no test split."""
    return "test" if "test" in splits else "validation"
