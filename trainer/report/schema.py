"""Schema of report.json; `python scripts/report_schema.py` writes docs/report.schema.json from it."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic supports that of typing from Python 3.12

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]  # 95 %
Number = float | None  # null if it is not finite


def about(description: str) -> Any:
    """Describe a key in the JSON Schema."""
    return Field(description=description)


class ClassScores(TypedDict):
    """Scores of one class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    undefined: Annotated[list[str], about("Scores that are 0 because of a division by zero.")]


class CalibrationBin(TypedDict):
    """Predictions whose probability is in (low, high], with means (null if there are none)."""

    low: float
    high: float
    count: int
    confidence: Number
    accuracy: Number


class GroupScores(TypedDict):
    """Scores of one group of examples."""

    name: str
    n: int
    correct: int
    accuracy: float
    interval: Interval
    macro_f1: float


class Gap(TypedDict):
    """Gap between the best and the worst group."""

    accuracy: float
    highest: str
    lowest: str
    overlap: Annotated[bool, about("True if their intervals overlap.")]


class Groups(TypedDict):
    """Scores by group, if the data has groups."""

    field: str
    rows: list[GroupScores]
    gap: NotRequired[Gap]


class Scores(TypedDict):
    """Scores of the held-out split."""

    split: str
    note: NotRequired[Annotated[str, about("How to read the scores.")]]
    n: int
    correct: int
    accuracy: float
    interval: Interval
    top_5: NotRequired[float]
    top_5_interval: NotRequired[Interval]
    majority: Annotated[float, about("Accuracy of always predicting the most frequent class.")]
    loss: Annotated[float, about("Mean cross entropy, nats.")]
    loss_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    per_class: list[ClassScores]
    confusion: Annotated[list[list[int]], about("Rows: truth; columns: prediction.")]
    mean_confidence: float
    calibration_error: float
    calibration_bins: list[CalibrationBin]
    groups: NotRequired[Groups]


class Phase(TypedDict):
    """Result of one phase; val_ are scores of its phase weights."""

    epochs: float
    seconds: float
    best_epoch: NotRequired[Annotated[int, about("Counted over the whole run.")]]
    kept_step: NotRequired[int]
    kept_from: NotRequired[Annotated[str, about("Earlier phase whose weights were better than its own.")]]
    own_val_accuracy: NotRequired[Number]
    trainable_parameters: NotRequired[int]
    val_accuracy: Number
    val_interval: NotRequired[Interval]
    val_loss: NotRequired[Number]
    val_macro_f1: NotRequired[Number]
    val_top_5: NotRequired[Number]
    val_n: NotRequired[int]


class Epoch(TypedDict):
    """One finished epoch, counted over the whole run from 1."""

    phase: str
    epoch: int
    step: int
    loss: Number
    accuracy: Number
    learning_rate: Number
    seconds: float
    val_loss: NotRequired[Number]
    val_accuracy: NotRequired[Number]
    val_macro_f1: NotRequired[Number]
    val_top_5: NotRequired[Number]
    val_n: NotRequired[int]


class Data(TypedDict, total=False):
    """Data of the run."""

    name: str
    fingerprint: str
    class_names: list[str]
    counts: Annotated[dict[str, int], about("By split.")]
    class_counts: Annotated[dict[str, list[int]], about("By split and class.")]
    notes: list[str]
    skipped: Annotated[list[str], about("Files that could not be read, with the reason.")]
    undecodable: Annotated[list[str], about("Examples that could not be decoded, with the reason.")]


class ExportTiming(TypedDict):
    """Speed of an export."""

    milliseconds_per_image: float


class Export(TypedDict):
    """One exported format with its parity check."""

    path: str
    bytes: int
    examples: int
    accuracy: float
    trainer_accuracy: float
    lost: Annotated[int, about("Examples that only the trainer predicts correctly.")]
    gained: int
    largest_difference: Annotated[Number, about("Of any probability from the trainer's.")]
    timing: ExportTiming
    refused: Annotated[bool, about("True if it lost too much accuracy and was deleted.")]


class LabelError(TypedDict):
    """An example whose label may be wrong."""

    index: int
    file: str
    label: str
    suggestion: str
    label_probability: float
    suggestion_probability: float


class LabelErrors(TypedDict):
    """Number of possible label errors, and the first of them."""

    count: int
    rows: list[LabelError]


class Copy(TypedDict):
    """One of several equal images."""

    split: str
    index: int
    file: str
    label: str


class CopyGroup(TypedDict):
    """Equal images, the first of them listed."""

    count: int
    across_splits: bool
    labels: list[str]
    members: list[Copy]


class Duplicates(TypedDict, total=False):
    """Images that occur more than once; empty without a search."""

    compared: Annotated[dict[str, int], about("Images by split.")]
    across_splits: int
    different_labels: int
    within_one_split_and_class: Annotated[int, about("Groups that are not listed.")]
    groups: list[CopyGroup]


@with_config(ConfigDict(extra="allow"))
class Timing(TypedDict):
    """Values that differ between two equal runs."""

    written: Annotated[str, about("ISO 8601, UTC.")]
    report_seconds: float
    seconds: NotRequired[Annotated[dict[str, float], about("Time since the first start by category.")]]
    goodput: NotRequired[float]
    images: NotRequired[int]
    images_per_second: NotRequired[float]
    starts: NotRequired[int]
    workers: NotRequired[int]
    command: NotRequired[str]
    run: NotRequired[Annotated[str, about("Evaluated run.")]]
    checkpoint_step: NotRequired[int]


@with_config(ConfigDict(extra="forbid"))  # applies to the nested types, too
class Report(TypedDict):
    """A finished run, or an evaluation of one. Equal inputs give equal bytes except for `timing` and `seconds`."""

    title: str
    seed: int
    test: Scores
    phases: dict[str, Phase]
    history: list[Epoch]
    data: Data
    export: dict[str, Export]
    versions: dict[str, str]
    label_errors: LabelErrors
    duplicates: Duplicates
    figures: Annotated[dict[str, str], about("Name -> file in the folder of the report.")]
    timing: Timing
