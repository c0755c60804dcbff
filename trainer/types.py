"""Types that several packages exchange: dataset, batch, predictions and scores."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from trainer.names import escape_unprintable

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

FINGERPRINT_KINDS = ("content", "sample", "ends")  # the bytes of each file that are hashed, most thorough kind first
LogMessage = Callable[[str], None]  # logs a line
Orientation = Literal["exif", "ignore"]  # exif: images are turned upright
Purpose = Literal["train", "prepare", "evaluate"]  # why a dataset is opened


@dataclass(frozen=True)
class Device:
    """The processor that a replica computes on; of several different GPUs, what all of them have."""

    kind: Literal["CPU", "GPU"] = "CPU"
    name: str = ""
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU
    memory: int | None = None  # bytes of a GPU; None if unknown

    def describe(self, count: int = 1) -> str:
        """Describe devices of this kind: one GPU (NVIDIA H200, compute capability 9.0, 139.8 GiB)."""
        facts = self.name
        if self.compute_capability:
            facts += ", compute capability {}.{}".format(*self.compute_capability)
        if self.memory:
            facts += f", {self.memory / 2**30:.1f} GiB"
        devices = f"{count} {self.kind}s" if count > 1 else f"one {self.kind}"
        return f"{devices} ({facts})" if facts else devices


CPU = Device()


@dataclass(frozen=True)
class Shard:
    """A TFRecord file with `count` records, of which a split uses the indices [`start`, `stop`)."""

    path: str
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Split:
    """The examples of one split, with indices 0 to `count` - 1.

    Either `files` lists one image file per example, or the records in `shards` are the examples, in order.
    """

    name: str  # train | validation | test
    labels: np.ndarray  # int32 [count]
    files: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    image_field: str = "image"
    orientation: Orientation = "exif"
    groups: tuple[str, ...] | None = None  # data.group_field of each example; None if it was not read

    @property
    def count(self) -> int:
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Return the image file of an example, or its shard and record index as `PATH#RECORD`, escaped for display."""
        if self.files:
            return escape_unprintable(self.files[index])
        path, record = self.record_of(index)
        return f"{escape_unprintable(path)}#{record}"

    def record_of(self, index: int) -> tuple[str, int]:
        """Return the shard path of an example, and its record index in the shard."""
        for shard in self.shards:
            if index < shard.stop - shard.start:
                return shard.path, shard.start + index
            index -= shard.stop - shard.start
        raise IndexError(index)


@dataclass(frozen=True)
class Dataset:
    """Labeled images with their class names and splits."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]  # train, and validation and test if there are any
    fingerprint: str  # the most thorough of `fingerprints`
    skipped: tuple[str, ...] = ()  # unreadable files, each with the reason
    notes: tuple[str, ...] = ()  # log lines about the dataset: class imbalance, an empty split, ...
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # kind -> hash of names, labels, sizes and checksums


def require_fingerprint(value: object) -> None:
    """Raise a ValueError unless a value of run.json is the fingerprint of data: a text, or texts by kind."""
    hashes = list(value.values()) if isinstance(value, dict) else [value]
    if not hashes or not all(isinstance(text, str) for text in hashes):
        raise ValueError("data_fingerprint has no text")


def has_fingerprints(dataset: Dataset, recorded: str | Mapping[str, str]) -> bool:
    """Return whether run.json recorded the same dataset, by the most thorough hash that both have.

    Older versions recorded a single hash, of kind "ends".
    """
    earlier = {"ends": recorded} if isinstance(recorded, str) else recorded
    common = [kind for kind in FINGERPRINT_KINDS if kind in earlier and kind in dataset.fingerprints]
    return bool(common) and earlier[common[0]] == dataset.fingerprints[common[0]]


class Batch(TypedDict):
    """The examples of one replica for one step. b is the batch size per replica, S the image side in pixels."""

    image: tf.Tensor  # uint8 [b, S, S, 3], or cached features of the frozen layers
    label: tf.Tensor  # int32 [b]
    weight: tf.Tensor  # float32 [b]: 1 for an example, 0 for padding
    index: tf.Tensor  # int64 [b]: example index in the split
    position: tf.Tensor  # int64 [b]: example index in the global batch
    other_label: NotRequired[tf.Tensor]  # int32 [b]: label of the image that mixup or cutmix mixes in
    mix: NotRequired[tf.Tensor]  # float32 [b]: weight of `label`; `other_label` has 1 - mix
    teacher: NotRequired[tf.Tensor]  # float32 [b, classes]: soft labels, the teacher's probabilities


@dataclass(frozen=True)
class Scored:
    """A network's predictions for examples of a split, ordered by example index."""

    split: str
    indices: np.ndarray  # int64 [n]: example index in the split
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes]
    losses: np.ndarray | tuple[()] = ()  # float32 [n], cross-entropy of the logits, if they were computed


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of a classifier on one split, and the predictions that they summarize."""

    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes], ordered by example index
    names: tuple[str, ...]  # file or record of each example
    metrics: dict[str, object]  # name -> value: accuracy, loss, per-class scores, ...
    sources: tuple[str, ...] = ()  # file name that the record of each example stores, "" for none; () if no record does


def choose_scored_split(splits: Container[str]) -> str:
    """Return the split that is scored at the end: test, or validation if there is no test split."""
    return "test" if "test" in splits else "validation"
