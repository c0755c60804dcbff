"""The schema of report.json. `python scripts/report_schema.py` writes docs/report.schema.json from it."""

from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on only

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]  # 95 %
Number = float | None  # null where it is not finite


class ClassScores(TypedDict):
    """The scores of one class."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    undefined: list[str]
    """Which of the scores are 0 only because there was nothing to divide by."""


class CalibrationBin(TypedDict):
    """Predictions whose probability is in (low, high]; means, null where there is none."""

    low: float
    high: float
    count: int
    confidence: Number
    accuracy: Number


class GroupScores(TypedDict):
    """The scores of one group of examples."""

    name: str
    n: int
    correct: int
    accuracy: float
    interval: Interval
    macro_f1: float


class Gap(TypedDict):
    """The gap between the best and the worst group."""

    accuracy: float
    highest: str
    lowest: str
    overlap: bool
    """Whether their two intervals overlap."""


class Groups(TypedDict):
    """Scores by group, where the data has groups."""

    field: str
    rows: list[GroupScores]
    gap: NotRequired[Gap]


class Scores(TypedDict):
    """The scores of the split that was held out."""

    split: str
    note: NotRequired[str]
    """How to read the scores."""
    n: int
    correct: int
    accuracy: float
    interval: Interval
    top_5: NotRequired[float]
    top_5_interval: NotRequired[Interval]
    majority: float
    """The accuracy of always answering the most frequent class."""
    loss: float
    """Mean cross entropy, nats."""
    loss_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    per_class: list[ClassScores]
    confusion: list[list[int]]
    """Rows: truth; columns: prediction."""
    mean_confidence: float
    calibration_error: float
    calibration_bins: list[CalibrationBin]
    groups: NotRequired[Groups]


class Phase(TypedDict):
    """The outcome of one phase of training; val_ are scores of the weights that it ends with."""

    epochs: float
    seconds: float
    best_epoch: NotRequired[int]
    """Counted over the whole run."""
    kept_step: NotRequired[int]
    kept_from: NotRequired[str]
    """The earlier phase whose weights were better than its own."""
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
    """The data of the run."""

    name: str
    fingerprint: str
    class_names: list[str]
    counts: dict[str, int]
    """Of each split."""
    class_counts: dict[str, list[int]]
    """Of each split, by class."""
    notes: list[str]
    skipped: list[str]
    """Files that could not be read, with the reason."""
    undecodable: list[str]
    """Examples that counted for nothing, with the reason."""


class ExportTiming(TypedDict):
    """The speed of an export."""

    milliseconds_per_image: float


class Export(TypedDict):
    """One exported format, loaded back and tried."""

    path: str
    bytes: int
    examples: int
    accuracy: float
    trainer_accuracy: float
    lost: int
    """Examples that only the trainer gets right."""
    gained: int
    largest_difference: Number
    """Of any probability."""
    timing: ExportTiming
    refused: bool


class LabelError(TypedDict):
    """An example whose label may be wrong."""

    index: int
    file: str
    label: str
    suggestion: str
    label_probability: float
    suggestion_probability: float


class LabelErrors(TypedDict):
    """The number of labels that may be wrong, and the first of them."""

    count: int
    rows: list[LabelError]


class Copy(TypedDict):
    """One of the pictures that are the same."""

    split: str
    index: int
    file: str
    label: str


class CopyGroup(TypedDict):
    """Pictures that are the same, the first of them named."""

    count: int
    across_splits: bool
    labels: list[str]
    members: list[Copy]


class Duplicates(TypedDict, total=False):
    """Pictures that occur more than once; empty without a search."""

    compared: dict[str, int]
    """Pictures of each split."""
    across_splits: int
    different_labels: int
    within_one_split_and_class: int
    """Groups that are not listed."""
    groups: list[CopyGroup]


@with_config(ConfigDict(extra="allow", use_attribute_docstrings=True))
class Timing(TypedDict):
    """Whatever differs between two equal runs."""

    written: str
    """ISO 8601, UTC."""
    report_seconds: float
    seconds: NotRequired[dict[str, float]]
    """The time since the first start, by category."""
    goodput: NotRequired[float]
    images: NotRequired[int]
    images_per_second: NotRequired[float]
    starts: NotRequired[int]
    workers: NotRequired[int]
    command: NotRequired[str]
    run: NotRequired[str]
    """The run that was evaluated."""
    checkpoint_step: NotRequired[int]


@with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))  # of all that is inside, too
class Report(TypedDict):
    """A finished run, or an evaluation of one. Equal inputs give equal bytes but for `timing` and `seconds`."""

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
    figures: dict[str, str]
    """Name -> file beside the report."""
    timing: Timing
