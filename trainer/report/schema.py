"""Define the schema of report.json; `python scripts/report_schema.py` writes docs/report.schema.json from it."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # before Python 3.12, pydantic does not support typing.TypedDict

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]  # lower and upper bound, 95 % confidence
Number = float | None  # null if it is not finite


def about(description: str) -> Any:
    """Return a pydantic field with a description for the JSON Schema. A fragment is read after the key's name."""
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
    """Predictions with a confidence in (low, high]; `confidence` (mean) and `accuracy` are null if `count` is 0."""

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
    """Difference between the groups with the highest and the lowest accuracy."""

    accuracy: float
    highest: str
    lowest: str
    overlap: Annotated[bool, about("True if their intervals overlap.")]


class Groups(TypedDict):
    """Scores per group of examples; `field` is the configuration value data.group_field."""

    field: str
    rows: list[GroupScores]
    gap: NotRequired[Gap]


class Scores(TypedDict):
    """Scores on one split. A run scores the test split, or the validation split if there is no test split."""

    split: str
    note: NotRequired[Annotated[str, about("How to read the scores.")]]
    n: int
    correct: int
    accuracy: float
    interval: Interval
    top_5: NotRequired[float]
    top_5_interval: NotRequired[Interval]
    majority: Annotated[float, about("Accuracy of a model that always predicts the most frequent class of the split.")]
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
    """Results of a phase. Keys that begin with val_ are scores of the weights that the phase ends with.

    They are scores on the whole validation split. If training.validation_share is below 1, each epoch is scored on a
    fraction of this split. The val_ keys are then computed at the end of the phase, and `epoch_val_accuracy` is the
    accuracy of the same weights on `epoch_val_n` examples after their epoch.
    """

    epochs: float
    seconds: float
    best_epoch: NotRequired[Annotated[int, about("Counted over the whole run.")]]
    kept_step: NotRequired[Annotated[int, about("Step of the weights that the phase ends with.")]]
    kept_from: NotRequired[Annotated[str, about("Earlier phase whose better weights this phase ends with.")]]
    own_val_accuracy: NotRequired[Annotated[Number, about("Best of the phase itself, if kept_from is present.")]]
    trainable_parameters: NotRequired[int]
    epoch_val_accuracy: NotRequired[Annotated[Number, about("On the fraction that is scored after an epoch.")]]
    epoch_val_n: NotRequired[int]
    val_accuracy: Number
    val_interval: NotRequired[Interval]
    val_loss: NotRequired[Number]
    val_macro_f1: NotRequired[Number]
    val_top_5: NotRequired[Number]
    val_n: NotRequired[int]


class Epoch(TypedDict):
    """A finished epoch; `epoch` counts from 1 over the whole run."""

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
    """The scored dataset and its splits."""

    name: str
    fingerprint: str
    fingerprint_of: Annotated[str, about("What it covers of each file: content, sample, or ends.")]
    class_names: list[str]
    counts: Annotated[dict[str, int], about("By split.")]
    class_counts: Annotated[dict[str, list[int]], about("By split and class.")]
    notes: list[str]
    skipped: Annotated[list[str], about("Files that could not be read, with the reason.")]
    undecodable: Annotated[list[str], about("Examples that could not be decoded, with the reason.")]


class ExportTiming(TypedDict):
    """Speed of an exported model."""

    milliseconds_per_image: float


class Export(TypedDict):
    """An exported model, and a comparison of its predictions with the trainer's predictions."""

    path: str
    bytes: int
    examples: int
    accuracy: float
    trainer_accuracy: Annotated[float, about("Of the trainer on these examples, in the precision of the format.")]
    lost: Annotated[int, about("Examples that only the trainer predicts correctly.")]
    gained: Annotated[int, about("Examples that only the exported model predicts correctly.")]
    p: Annotated[float, about("Of McNemar's exact test that both predict equally well.")]
    largest_difference: Annotated[Number, about("Largest difference of a probability from that of the trainer.")]
    timing: ExportTiming
    refused: Annotated[bool, about("True if it lost too much accuracy and was deleted.")]


class LabelError(TypedDict):
    """An example whose label may be wrong, and the suggested class. `index` is the example's row in predictions.csv."""

    index: int
    file: str
    label: str
    suggestion: str
    label_probability: float
    suggestion_probability: float


class LabelErrors(TypedDict, total=False):
    """Count of possible label errors, and the most likely ones; empty if the model was trained on the examples."""

    count: int
    rows: list[LabelError]


class Copy(TypedDict):
    """One of several duplicate images. `index` is the example's index in its split."""

    split: str
    index: int
    file: str
    label: str


class CopyGroup(TypedDict):
    """A group of duplicate images."""

    count: int
    across_splits: bool
    labels: Annotated[list[str], about("Labels of all members.")]
    members: Annotated[list[Copy], about("The first members.")]


class Duplicates(TypedDict, total=False):
    """Groups of duplicate images; empty if duplicates were not searched for.

    `across_splits` counts the groups that are in several splits, `different_labels` the groups with several labels.
    """

    compared: Annotated[dict[str, int], about("Number of images by split.")]
    across_splits: int
    different_labels: int
    within_one_split_and_class: Annotated[int, about("Number of groups, which are not listed.")]
    groups: list[CopyGroup]


@with_config(ConfigDict(extra="allow"))
class Timing(TypedDict):
    """Values that can differ between runs with equal inputs."""

    written: Annotated[str, about("ISO 8601, UTC.")]
    report_seconds: float
    seconds: NotRequired[Annotated[dict[str, float], about("By category, since the first start.")]]
    goodput: NotRequired[float]
    images: NotRequired[int]
    images_per_second: NotRequired[float]
    starts: NotRequired[int]
    workers: NotRequired[int]
    command: NotRequired[str]
    run: NotRequired[Annotated[str, about("Address of the evaluated run.")]]
    checkpoint_step: NotRequired[int]


class Teacher(TypedDict):
    """The teacher's scores from its own report. They are not compared with the student's scores."""

    split: str
    n: int
    accuracy: float
    interval: Interval
    same_data: Annotated[bool, about("Whether its data has the same fingerprint, and thus the same splits.")]


@with_config(ConfigDict(extra="forbid"))  # also applies to the nested types without a configuration
class Report(TypedDict):
    """Report of a run or of an evaluation. Equal inputs give equal bytes except for `timing` and `seconds`."""

    title: str
    seed: int
    test: Scores
    phases: dict[str, Phase]
    history: list[Epoch]
    data: Data
    export: dict[str, Export]
    teacher: NotRequired[Annotated[Teacher, about("Of a run with a teacher that has a report.")]]
    versions: dict[str, str]
    label_errors: LabelErrors
    duplicates: Duplicates
    figures: Annotated[dict[str, str], about("File in the folder of the report, by name.")]
    timing: Timing
