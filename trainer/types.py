"""Types that several packages use: device, dataset, batch, predictions and scores."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from trainer.names import escape_unprintable

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

# Kinds of fingerprints, by the bytes of each file that are hashed, the most thorough kind first.
FINGERPRINT_KINDS = ("content", "sample", "ends")
LogMessage = Callable[[str], None]  # logs a line
Orientation = Literal["exif", "ignore"]  # exif: images are turned upright by their EXIF orientation
Purpose = Literal["train", "prepare", "evaluate"]  # purpose for which a dataset is opened


@dataclass(frozen=True)
class Device:
    """The processor on which a replica computes. If GPUs differ, it has only their common properties."""

    kind: Literal["CPU", "GPU"] = "CPU"
    name: str = ""  # such as "NVIDIA H200"
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU, such as (9, 0)
    memory: int | None = None  # memory of a GPU in bytes; None if unknown

    def describe(self, count: int = 1) -> str:
        """Describe `count` devices, such as "one GPU (NVIDIA H200, compute capability 9.0, 139.8 GiB)"."""
        properties = self.name
        if self.compute_capability:
            properties += ", compute capability {}.{}".format(*self.compute_capability)
        if self.memory:
            properties += f", {self.memory / 2**30:.1f} GiB"
        devices = f"{count} {self.kind}s" if count > 1 else f"one {self.kind}"
        return f"{devices} ({properties})" if properties else devices


CPU = Device()


@dataclass(frozen=True)
class Shard:
    """A TFRecord file, and the range of its records that a split uses: `start` to `stop` - 1."""

    path: str
    count: int  # number of records in the file
    start: int  # index of the first record that the split uses
    stop: int  # index of the last record that the split uses, plus 1


@dataclass(frozen=True)
class Split:
    """The examples of one split, with indices 0 to `count` - 1.

    Either `files` has the image file of each example, or the examples are the records of `shards`, in their order.
    """

    name: str  # train | validation | test
    labels: np.ndarray  # class index of each example, int32 [count]
    files: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    image_field: str = "image"  # field of the records with the encoded image
    orientation: Orientation = "exif"
    groups: tuple[str, ...] | None = None  # data.group_field of each example; None if it was not read

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def name_of(self, index: int) -> str:
        """Return an example's image file, or its record as "PATH#INDEX", with unprintable characters escaped."""
        if self.files:
            return escape_unprintable(self.files[index])
        path, record = self.record_of(index)
        return f"{escape_unprintable(path)}#{record}"

    def record_of(self, index: int) -> tuple[str, int]:
        """Return the path of the shard that has an example, and the index of the example's record in that shard."""
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
    splits: dict[str, Split]  # by name: train, and optionally validation and test
    fingerprint: str  # the hash of the most thorough kind in `fingerprints`
    skipped: tuple[str, ...] = ()  # unreadable files, each with the reason
    notes: tuple[str, ...] = ()  # log lines about the dataset: class imbalance, an empty split, ...
    fingerprints: Mapping[str, str] = field(default_factory=dict)  # kind -> hash of names, labels, sizes and checksums


def require_fingerprint(value: object) -> None:
    """Raise a ValueError unless a value from run.json is a fingerprint of data: a string, or strings by kind."""
    hashes = list(value.values()) if isinstance(value, dict) else [value]
    if not hashes or not all(isinstance(text, str) for text in hashes):
        raise ValueError("data_fingerprint has no text")


def has_fingerprints(dataset: Dataset, recorded: str | Mapping[str, str]) -> bool:
    """Return whether `recorded` is a dataset's fingerprint, compared by the most thorough kind that both have.

    Args:
        recorded: the fingerprint in run.json: kind -> hash, or a hash of kind "ends" if an older version wrote it.
    """
    recorded_hashes = {"ends": recorded} if isinstance(recorded, str) else recorded
    common_kinds = [kind for kind in FINGERPRINT_KINDS if kind in recorded_hashes and kind in dataset.fingerprints]
    return bool(common_kinds) and recorded_hashes[common_kinds[0]] == dataset.fingerprints[common_kinds[0]]


class Batch(TypedDict):
    """The examples of one replica for one step. b: batch size per replica. S: height and width of images in pixels."""

    image: tf.Tensor  # uint8 [b, S, S, 3], or cached features of the frozen layers
    label: tf.Tensor  # int32 [b]
    weight: tf.Tensor  # float32 [b]: 1 for an example, 0 for padding
    index: tf.Tensor  # int64 [b]: example index in the split
    position: tf.Tensor  # int64 [b]: example index in the global batch
    other_label: NotRequired[tf.Tensor]  # int32 [b]: label of the image that mixup or cutmix mixes in
    mix: NotRequired[tf.Tensor]  # float32 [b]: weight of `label` in the loss; the weight of `other_label` is 1 - mix
    teacher: NotRequired[tf.Tensor]  # float32 [b, classes]: soft labels, the teacher's probabilities


@dataclass(frozen=True)
class SplitPredictions:
    """A network's predictions for n examples of a split, ordered by example index."""

    split: str
    indices: np.ndarray  # int64 [n]: example index in the split
    labels: np.ndarray  # int32 [n]: class index
    probabilities: np.ndarray  # float32 [n, classes]
    losses: np.ndarray | tuple[()] = ()  # float32 [n]: cross-entropy of the logits; () if not computed
    # int64 [m]: indices of the examples with an embedding, ascending; () if no embeddings were requested
    embedded_indices: np.ndarray | tuple[()] = ()
    embeddings: np.ndarray | tuple[()] = ()  # float32 [m, C]: pooled features of these examples


@dataclass(frozen=True)
class EvaluationResult:
    """A classifier's scores on a split, and the predictions from which they are computed."""

    split: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes], ordered by example index
    names: tuple[str, ...]  # name of each example, from `Split.name_of`
    metrics: dict[str, object]  # name -> value: accuracy, loss, per-class scores, ...
    sources: tuple[str, ...] = ()  # file name in the record of each example, "" if it has none; () if no record has one


def choose_scored_split(splits: Container[str]) -> str:
    """Return the split for the final scores: "test", or "validation" if there is no test split."""
    return "test" if "test" in splits else "validation"
