"""Data types that several packages exchange: dataset, batch, predictions and scores."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from trainer.names import printable

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

FINGERPRINT_KINDS = ("content", "sample", "ends")  # what a hash covers of each file, the most thorough one first
LogMessage = Callable[[str], None]  # logs a line
Purpose = Literal["train", "prepare", "evaluate"]  # what data is opened for


@dataclass(frozen=True)
class Shard:
    """One TFRecord file with `count` records, of which the split uses records [`start`, `stop`)."""

    path: str
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """Examples of one split, with indices 0 to `count` - 1.

    Either `files` is set, with one image file per example, or `shards`, whose records are the examples in order.
    """

    name: str  # train | validation | test
    labels: np.ndarray  # int32 [count]
    files: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    image_field: str = "image"
    orientation: Literal["exif", "ignore"] = "exif"  # whether images are turned upright by their EXIF orientation
    groups: tuple[str, ...] | None = None  # value of data.group_field per example; set for `scored_split` only

    @property
    def count(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Return the image file of an example, or its shard and record as `PATH#RECORD`; printable."""
        if self.files:
            return printable(self.files[index])
        path, record = self.record_of(index)
        return f"{printable(path)}#{record}"

    def record_of(self, index: int) -> tuple[str, int]:
        """Return the shard of an example, and the number of its record in the shard."""
        for shard in self.shards:
            if index < shard.stop - shard.start:
                return shard.path, shard.start + index
            index -= shard.stop - shard.start
        raise IndexError(index)


@dataclass(frozen=True)
class Dataset:
    """Labelled images with their class names and splits."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]  # train, and validation and test if the data has them
    fingerprint: str  # hash of file names, labels, sizes and checksums: the most thorough one of `fingerprints`
    skipped: tuple[str, ...] = ()  # unreadable files, each with the reason
    notes: tuple[str, ...] = ()  # log lines about the data: class imbalance, an empty split, ...
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # by `FINGERPRINT_KINDS`


def require_fingerprint(value: object) -> None:
    """Raise a ValueError unless a value of run.json is the fingerprint of data: a text, or texts by kind."""
    hashes = list(value.values()) if isinstance(value, dict) else [value]
    if not hashes or not all(isinstance(text, str) for text in hashes):
        raise ValueError("data_fingerprint has no text")


def has_fingerprints(dataset: Dataset, recorded: str | Mapping[str, str]) -> bool:
    """Return whether run.json recorded the same data: by the most thorough hash that both have.

    A run of an older version recorded a single hash, of kind "ends".
    """
    earlier = {"ends": recorded} if isinstance(recorded, str) else recorded
    common = [kind for kind in FINGERPRINT_KINDS if kind in earlier and kind in dataset.fingerprints]
    return bool(common) and earlier[common[0]] == dataset.fingerprints[common[0]]


class Batch(TypedDict):
    """Examples of one replica for one step; b is the batch size per replica, S the image side in pixels."""

    image: tf.Tensor  # uint8 [b, S, S, 3], or cached features of the frozen layers
    label: tf.Tensor  # int32 [b]
    weight: tf.Tensor  # float32 [b]: 1 for an example, 0 for padding
    index: tf.Tensor  # int64 [b]: index in the split
    position: tf.Tensor  # int64 [b]: index in the global batch
    other_label: NotRequired[tf.Tensor]  # int32 [b]: label of the image that mixup or cutmix mixes in
    mix: NotRequired[tf.Tensor]  # float32 [b]: weight of `label`; `other_label` has 1 - mix
    teacher: NotRequired[tf.Tensor]  # float32 [b, classes]: soft labels, the teacher's probabilities


@dataclass(frozen=True)
class Scored:
    """Predictions of a network for examples of a split, ordered by example index."""

    split: str
    indices: np.ndarray  # int64 [n]: index in the split
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes]
    losses: np.ndarray | tuple[()] = ()  # float32 [n], cross-entropy of the logits, if they were computed


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a classifier on one split, with the predictions that they are computed from."""

    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes], ordered by example index
    names: tuple[str, ...]  # file or record of each example
    metrics: dict[str, object]  # by name: accuracy, loss, per-class scores, ...


def scored_split(splits: Container[str]) -> str:
    """Return the split of the final scores: test, or validation if the data has no test split."""
    return "test" if "test" in splits else "validation"
