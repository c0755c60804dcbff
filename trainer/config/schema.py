"""The configuration of a run: one frozen, validated tree of sections.

Hydra composes nested dicts from the YAML files in `conf/`. `validate_config` validates them and returns a `RunConfig`
if the backbone, batch size, phases and precision are not `auto`, otherwise a `RequestedConfig`. One `ConfigError` lists
all errors. This module does not import TensorFlow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from trainer.config.augmentation import Augmentation
from trainer.config.base import (
    MAX_COUNT,
    RENAMED_KEYS,
    Address,
    Duration,
    DurationSetting,
    InvalidValue,
    PositiveDuration,
    Section,
    translate_validation_error,
)
from trainer.config.distillation import TRAIN_TEACHER, Distillation, get_teacher_address, prefix_teacher_key
from trainer.config.model import Model
from trainer.config.phases import AutoPhases, Phase, Phases
from trainer.errors import ConfigError
from trainer.types import Orientation


class Data(Section):
    """The labelled images: source, splits, order and caches."""

    source: Literal["digits", "image_folder", "csv", "tfds", "tfrecords"]
    """digits: scikit-learn's digits; image_folder: image files in one folder per class; csv: image files that a CSV
    file lists; tfds: a dataset of TensorFlow Datasets (TFDS); tfrecords: TFRecord files."""
    root: Address | None = None
    """image_folder: folder with the images; csv: the CSV file, with the columns file, label and optionally split; tfds:
    folder of one prepared dataset. Local or in a bucket."""
    name: str | None = None
    """tfds: name of the dataset, such as beans or food101:2.0.0."""
    data_dir: Address | None = None
    """tfds: folder of all prepared datasets; null: the TFDS default."""
    download: bool = False
    """tfds: download and prepare the dataset if it is missing."""
    pattern: Address | None = None
    """tfrecords: glob pattern of the files, such as shards/*.tfrec. Local or in a bucket."""
    image_field: str = "image"
    """tfds, tfrecords: field of the encoded image."""
    label_field: str = "label"
    """tfds, tfrecords: field of the class index."""
    class_names: tuple[str, ...] | dict[str, str] | None = None
    """tfrecords: class names, in the order of their indices. Other sources: a list of the source's class names sets
    their order, and a mapping {n01: daisy, n02: red rose} sets the display names of these classes."""
    class_prefix: str | None = None
    """Regular expression of a prefix to remove from class names, except those that data.class_names maps: n[0-9]+-
    turns n02085620-Chihuahua into Chihuahua. null: no prefix."""
    label_kind: Literal["index", "index1", "text", "onehot"] = "index"
    """tfds, tfrecords: content of data.label_field. index: class index from 0; index1: class index from 1; text: one
    of data.class_names; onehot: a one-hot vector."""
    train_split: str = "train"
    """tfds: split of the training examples, which can have a slice, such as train[:80%]."""
    validation_split: str | None = None
    """tfds: split of the validation examples. null: the examples of the split "validation" that data.train_split does
    not use, or data.validation_fraction if there is no such split; none: always data.validation_fraction."""
    test_split: str | None = None
    """tfds: split of the test examples. null: the examples of the split "test" that data.train_split does not use, or
    data.test_fraction if there is no such split; none: always data.test_fraction."""
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    """Fraction of the training examples that becomes the validation split if the data has none."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Fraction of the training examples that becomes the test split if the data has none."""
    split_seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the random splits by data.validation_fraction and data.test_fraction."""
    labels_per_class: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Maximum number of training examples per class, chosen at random; null: all."""
    shuffle_window: int = Field(8192, ge=1, le=MAX_COUNT)
    """digits, tfds, tfrecords: number of records that are shuffled together."""
    shards: int | None = Field(None, ge=1, le=MAX_COUNT)
    """`trainer.prepare`: number of shards of the largest split; other splits have shards of the same size. null: one
    shard per 100 MB."""
    orientation: Orientation = "exif"
    """exif: rotate images by their EXIF orientation, also in the exported model; ignore: use images as stored, because
    their EXIF tags are wrong."""
    on_error: Literal["fail", "skip"] = "fail"
    """What happens if an image or record cannot be read. fail: the run ends; skip: the image or record is skipped."""
    cache: Literal["auto", "memory", "disk", "none"] = "auto"
    """Where decoded images are cached. auto: in memory, else on disk, else nowhere, within the budgets of `runtime`."""
    shard_by: Literal["auto", "record", "file"] = "auto"
    """How the training examples are sharded over n workers. record: each worker reads every n-th record; file: each
    worker reads whole files; auto: file if there are enough files and no virtual replicas, and images are decoded in
    every epoch, else record."""
    fingerprint: Literal["auto", "content"] = "auto"
    """Which bytes the data's fingerprint covers. content: all; auto: all if there is up to 1 GB, otherwise samples."""
    group_field: str | None = None
    """csv: a column; tfds, tfrecords: a field with a string or an integer. Its values are groups that the report scores
    separately."""

    corrections: Address | None = None
    """CSV file with corrections, which are examples to exclude or to relabel, as saved from a report's page
    (docs/report.md). Local or in a bucket."""

    @field_validator("class_names")
    @classmethod
    def _check_class_names(cls, names: Any) -> Any:
        name_by_class = names if isinstance(names, dict) else {}
        if unnamed_classes := [class_name for class_name, name in name_by_class.items() if not name.strip()]:
            raise InvalidValue(f"has no name for {unnamed_classes[0]}", fix="write one, or leave the class out")
        return names

    @field_validator("class_prefix")
    @classmethod
    def _check_class_prefix(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            fix = "write one such as n[0-9]+-, and a backslash before a character that is meant literally"
            raise InvalidValue(f"is not a regular expression ({error})", value=pattern, fix=fix) from None
        return pattern

    @model_validator(mode="after")
    def _check_complete(self) -> Data:
        required_keys = {"image_folder": ("root",), "csv": ("root",), "tfrecords": ("pattern", "class_names")}.get(
            self.source, ()
        )
        missing_keys = [f"data.{key}" for key in required_keys if not getattr(self, key)]
        if self.source == "tfds" and not (self.name or self.root):
            missing_keys = ["data.name (or data.root)"]
        if missing_keys:
            raise InvalidValue(
                "is incomplete", key="source", value=self.source, fix=f"set {' and '.join(missing_keys)}"
            )
        if self.group_field and self.source not in ("csv", "tfds", "tfrecords"):
            problem = f"data.source={self.source} has only image and label"
            fix = "use data.source=csv, tfds or tfrecords"
            raise InvalidValue(problem, key="group_field", value=self.group_field, fix=fix)
        if self.validation_fraction + self.test_fraction >= 1:
            problem = "validation_fraction + test_fraction leave nothing to train on"
            raise InvalidValue(problem, fix="use fractions whose sum is less than 1")
        return self


MIN_CLASS_WEIGHT = 1e-6  # smallest class weight above 0; smaller ones vanish by rounding in float32


def _check_class_weight(weight: float) -> float:
    if 0 < weight < MIN_CLASS_WEIGHT:
        raise InvalidValue("is too small", value=weight, fix=f"use 0, or a weight of at least {MIN_CLASS_WEIGHT:g}")
    return weight


ClassWeight = Annotated[float, Field(ge=0, le=1e6), AfterValidator(_check_class_weight)]


class Training(Section):
    """Settings that apply to all phases."""

    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | Literal["auto"] = 32
    """Examples per step, over all replicas and workers; auto: chosen by the number of images and the GPU memory
    (docs/phases.md)."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """Loss function (docs/training.md)."""
    focal_gamma: float = Field(2.0, ge=0, le=100)
    """focal: exponent gamma of (1 - p), which reduces the loss of examples with a high probability p of their class."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Fraction of the target probability that is spread evenly over all classes."""
    class_weights: Literal["none", "balanced"] | dict[str, ClassWeight] = "none"
    """Weight of an example's loss by its class. none: equal weights; balanced: inversely proportional to the class's
    frequency; or a mapping {CLASS: WEIGHT}."""
    clip_norm: float | None = Field(None, ge=1e-12, le=1e12)
    """L2 norm to which the gradient of the global batch is clipped; null: not clipped."""
    accumulate: int = Field(1, ge=1, le=MAX_COUNT)
    """Number of micro-batches into which a replica splits its batch, to save memory."""
    virtual_replicas: int | None = Field(None, ge=1, le=4096)
    """Number of equal parts into which a global batch is divided, a power of two. A run then has the same bits on any
    number of replicas that divides it (docs/distributed.md). null: one part per replica."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is validated and exported; null: none."""
    keep: Literal["best", "last"] = "best"
    """Weights for the next phase and the export. best: weights of the best epoch; last: weights of the last step."""
    validation_share: float = Field(1.0, gt=0, le=1)
    """Fraction of the validation batches that is scored after each epoch, to select the best epoch. At the end of a
    phase, the selected weights are scored on all batches."""

    def count_micro_batches(self, num_replicas: int) -> int:
        """Return the number of micro-batches per step on each replica, for `num_replicas` replicas on all workers."""
        return self.virtual_replicas // num_replicas if self.virtual_replicas else self.accumulate

    @model_validator(mode="after")
    def _check_virtual_replicas(self) -> Training:
        num_parts = self.virtual_replicas or 1
        if num_parts & (num_parts - 1):
            fix = f"use {1 << (num_parts.bit_length() - 1)} or {1 << num_parts.bit_length()}"
            raise InvalidValue("is not a power of two", key="virtual_replicas", value=str(num_parts), fix=fix)
        if self.virtual_replicas and self.accumulate > 1:
            problem = "cannot be used with training.virtual_replicas"
            raise InvalidValue(problem, key="accumulate", value=str(self.accumulate), fix="set one of the two")
        return self

    @model_validator(mode="after")
    def _check_focal_gamma(self) -> Training:
        if self.loss != "focal" and self.focal_gamma != 2.0:
            problem, value = f"has no effect with training.loss={self.loss}", f"{self.focal_gamma:g}"
            raise InvalidValue(problem, key="focal_gamma", value=value, fix="set training.loss=focal")
        return self


GIGABYTE = 1024**3  # bytes in the unit of `memory_budget_gb` and `disk_budget_gb`
MAX_DEPTH = 100  # maximum nesting of a configuration, in levels; valid ones have about 5


Precision = Literal["float32", "bfloat16", "float16"]


class Runtime(Section):
    """Devices, logs and caches. Only precision, xla, trunk_engine, deterministic and replicas affect the weights."""

    precision: Precision | Literal["auto"] = "float32"
    """Data type of computations; weights and loss are float32. auto: chosen by the device (docs/speed.md)."""
    xla: bool | Literal["auto"] = False
    """Compile the training step with XLA, which makes it 7 to 15 times slower on CPUs; auto: decided for each phase
    (docs/speed.md)."""
    trunk_engine: Literal["auto", "tensorflow", "litert"] = "auto"
    """Library that computes the frozen layers up to the cut (docs/features.md); auto: LiteRT in long phases of mobile
    networks on a CPU, otherwise TensorFlow."""
    deterministic: bool = True
    """Make runs on the same machine bitwise reproducible."""
    replicas: int | None = Field(None, ge=1, le=1024)
    """Replicas per worker; null: one per GPU, or one without GPUs. On CPUs they are logical devices."""
    collectives: Literal["auto", "nccl", "ring"] = "auto"
    """Implementation of the all-reduce between workers."""
    pack_mb: float | None = Field(None, gt=0, le=1e6)
    """Megabytes of gradients per all-reduce; null: all gradients in one."""
    start_timeout: float = Field(600.0, gt=0, le=1e6)
    """Seconds after which a worker stops waiting for the others at the rendezvous."""
    max_restarts_without_progress: int = Field(5, ge=1, le=MAX_COUNT)
    """Number of consecutive restarts without a new step after which the run ends with exit code 3."""
    steps_per_call: int = Field(10, ge=1, le=MAX_COUNT)
    """Optimizer steps per call of the compiled function."""
    log_every: PositiveDuration = Duration(count=20, unit="steps")
    """Interval at which training metrics are logged."""
    checkpoint_every: DurationSetting = Duration(count=1, unit="epochs")
    """Interval between checkpoints, checked at each log interval; best epochs and ends of phases are also saved."""
    keep_checkpoints: int = Field(2, ge=1, le=MAX_COUNT)
    """Number of newest checkpoints to retain, in addition to checkpoints of the best epoch and of ends of phases."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Progress bar or log lines; auto: a bar on a terminal."""
    cache_dir: Address = "~/.cache/kubetune"
    """Local folder of all caches, and of copies of remote files."""
    memory_budget_gb: float | None = Field(None, gt=0, le=1e9)
    """Gigabytes (2^30 bytes) of memory for decoded images and features; null: a quarter of the container's or machine's
    memory."""
    disk_budget_gb: float | None = Field(None, ge=0, le=1e9)
    """Maximum gigabytes (2^30 bytes) in `cache_dir` per cache; null: 50, but at most two fifths of the free disk space
    or of the pod's limit."""
    data_threads: int | None = Field(None, ge=1, le=1024)
    """Number of threads that read and decode images, also in `trainer.prepare`; null: chosen by the number of CPUs."""
    http_port: int | None = Field(None, ge=1, le=65535)
    """Port of /healthz and /metrics; null: no server."""
    stuck_after: float = Field(900.0, gt=0, le=1e9)
    """Seconds without progress after which /healthz returns 503."""
    log_format: Literal["text", "json"] = "text"
    """json: one JSON object per line, with the field names of Cloud Logging."""
    termination_log: str | None = None
    """File that receives the exit code and its reason; in a pod /dev/termination-log. null: none."""

    @model_validator(mode="after")
    def _check_progress(self) -> Runtime:
        if self.log_format == "json" and self.progress == "bar":
            fix = "set runtime.progress=lines or runtime.log_format=text"
            raise InvalidValue("cannot be used with runtime.log_format=json", key="progress", value="bar", fix=fix)
        return self

    @property
    def cache_folder(self) -> Path:
        """`cache_dir` with `~` expanded."""
        return Path(self.cache_dir).expanduser()

    @property
    def memory_budget(self) -> int | None:
        """Bytes of memory for decoded images and features; None means this machine's default."""
        return int(self.memory_budget_gb * GIGABYTE) if self.memory_budget_gb else None

    @property
    def disk_budget(self) -> int | None:
        """Maximum bytes in `cache_folder` per cache; None means this machine's default."""
        return None if self.disk_budget_gb is None else int(self.disk_budget_gb * GIGABYTE)


ExportFormat = Literal["saved_model", "keras", "tflite", "tflite_float16", "tflite_dynamic", "tflite_int8", "onnx"]


class Export(Section):
    """Exports of the trained model for serving."""

    formats: tuple[ExportFormat, ...] = ("saved_model", "tflite")
    """Formats to export (docs/exports.md)."""
    max_accuracy_drop: float = Field(0.01, ge=0, le=1)
    """Maximum drop of an export's accuracy below the model's accuracy, as a fraction from 0 to 1. If the drop is
    larger, the run ends with exit code 2."""


def _require_order(steps: tuple[int, int]) -> tuple[int, int]:
    if steps[0] > steps[1]:
        raise InvalidValue("ends before it begins", fix="use [first, last]")
    return steps


Step = Annotated[int, Field(ge=1, le=MAX_COUNT)]
ProfileSteps = Annotated[tuple[Step, Step], AfterValidator(_require_order)]


class Debug(Section):
    """Limits and checks for trial runs."""

    max_steps: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Optimizer steps after which each phase ends; null: no limit."""
    max_examples: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Maximum number of examples per split; null: all."""
    overfit: bool = False
    """Train on a single batch without regularization, and score that batch."""
    profile_steps: ProfileSteps | None = None
    """[FIRST, LAST]: steps of the run to profile for TensorBoard."""


class RequestedConfig(Section):
    """The configuration as requested. The backbone, the batch size, the phases and the precision can be `auto`."""

    data: Data
    model: Model
    phases: Phases
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    runtime: Runtime = Runtime()
    export: Export = Export()
    debug: Debug = Debug()
    distillation: Distillation | None = None
    seed: int = Field(42, ge=0, lt=2**31)
    """Seed of the random numbers of a run: head weights, example order, augmentation, dropout."""
    output_dir: Address | None = None
    """The run's folder, local or in a bucket; a start with the same folder resumes the run. null: a new folder in
    outputs/."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to resume the run in output_dir. auto: resume it if there is one; never: fail if there is one; must: fail
    if there is none."""
    warm_start: Address | None = None
    """output_dir of an earlier run, or one of its checkpoints, whose weights this run begins with."""
    experiment_name: str | None = None
    """Name in the report and in the names of new folders in outputs/."""

    @model_validator(mode="after")
    def _check_resume(self) -> RequestedConfig:
        if self.resume == "never" and self.distillation and self.distillation.teacher == TRAIN_TEACHER:
            problem = "forbids the second start, that of the student, with distillation.teacher=train"
            raise InvalidValue(problem, key="resume", value="never", fix="use auto")
        return self

    @property
    def auto_keys(self) -> list[str]:
        """Which of model.backbone, training.batch_size, runtime.precision and phases are `auto`."""
        values = {"model.backbone": self.model.backbone, "training.batch_size": self.training.batch_size}
        values["runtime.precision"] = self.runtime.precision
        keys = ["phases"] * isinstance(self.phases, AutoPhases)
        return keys + [key for key, value in values.items() if value == "auto"]

    @property
    def example_limit(self) -> int | None:
        """Maximum number of examples per split (one batch with debug.overfit); None means all."""
        size = self.training.batch_size
        return size if self.debug.overfit and isinstance(size, int) else self.debug.max_examples


class ResolvedTraining(Training):
    """`Training` with its batch size resolved."""

    batch_size: int = Field(32, ge=1, le=MAX_COUNT)


class ResolvedRuntime(Runtime):
    """`Runtime` with its precision resolved."""

    precision: Precision = "float32"


class RunConfig(RequestedConfig):
    """The configuration of a run, in which the backbone, the batch size, the phases and the precision are resolved.

    The weights of a checkpoint depend on these values. Other keys can still be `auto`: `features` and `runtime.xla` are
    decided for each phase when the network is built, and recorded in run.json.
    """

    phases: dict[str, Phase] = Field(min_length=1)
    training: ResolvedTraining = ResolvedTraining()
    runtime: ResolvedRuntime = ResolvedRuntime()

    def count_phase_steps(self, phase: Phase, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps after which a phase ends, unless early stopping ends it before."""
        steps = phase.duration.steps(steps_per_epoch, self.training.batch_size)
        return min(steps, self.debug.max_steps or steps)

    def find_uncacheable_reason(self, phase: Phase) -> str | None:
        """Return the reason why a phase's features cannot be cached; None if they can be cached."""
        if not self.augmentation.active:
            return None
        if self.augmentation.mixes:
            return "augmentation.mixup and cutmix mix other images in every epoch"
        if self.distillation:
            return "the teacher predicts in every step, for the augmented images"
        return None if phase.augmented_views else "augmentation makes other images in every epoch (augmented_views)"

    def find_feature_error(self, name: str) -> ConfigError | None:
        """Return the error in the keys `features` and `augmented_views` of the phase `name`; None if they are valid."""
        phase, is_augmented = self.phases[name], self.augmentation.active
        if phase.augmented_views and phase.augmented_views > 1 and not is_augmented:
            return ConfigError("has no effect without augmentation", key=f"phases.{name}.augmented_views",
                               value=phase.augmented_views, fix="set it to null, or set augmentation")  # fmt: skip
        reason = self.find_uncacheable_reason(phase)
        if phase.features != "cached" or reason is None:
            return None
        fix = "use auto or live"
        if not (phase.augmented_views or self.augmentation.mixes or self.distillation):
            fix = f"set a number of fixed views per image, phases.{name}.augmented_views=4, or {fix}"
        return ConfigError(reason, key=f"phases.{name}.features", value="cached", fix=fix)


def derive_teacher_config(config: RequestedConfig) -> RequestedConfig | None:
    """Return the configuration of the run that trains the teacher; None if `distillation.teacher` is not "train".

    This run has the teacher's model and phases (by default the student's phases), output_dir OUTPUT_DIR/teacher, no
    warm start and no exports, and " teacher" is appended to its experiment_name. Other keys are those of `config`.
    """
    distillation = config.distillation
    if not distillation or distillation.teacher != TRAIN_TEACHER or distillation.model is None:
        return None
    values = dict(config) | {"model": distillation.model, "distillation": None, "warm_start": None}
    values |= {"phases": config.phases if distillation.phases is None else distillation.phases}
    values |= {"experiment_name": f"{config.experiment_name or ''} teacher".strip()}
    values |= {"export": Export(formats=()), "output_dir": config.output_dir and get_teacher_address(config.output_dir)}
    teacher = RequestedConfig.model_construct(**values)  # the values are validated already
    return teacher if teacher.auto_keys else replace_auto(teacher)


def _list_feature_errors(config: RequestedConfig) -> list[ConfigError]:
    """List the errors in the keys `features` and `augmented_views` of all phases; none with phases=auto."""
    if isinstance(config.phases, AutoPhases):
        return []
    resolved = replace_auto(config)  # the errors do not depend on the values that replace `auto`
    return [error for name in config.phases if (error := resolved.find_feature_error(name))]


def validate_config(tree: dict[str, Any]) -> RequestedConfig:
    """Validate a composed configuration.

    Args:
        tree: nested dicts, without interpolations.

    Returns:
        A `RunConfig` if the backbone, the batch size, the phases and the precision are not `auto`, otherwise a
        `RequestedConfig`.

    Raises:
        ConfigError: the configuration is not valid. `errors` lists all errors, except that a key that is not a string,
            or a loop of YAML aliases, is reported alone.
    """
    if problem := _describe_tree_error(tree):
        raise ConfigError(f"the configuration {problem}", fix="put that key in quotes, or remove the loop")
    try:
        config = RequestedConfig.model_validate(tree)
    except ValidationError as error:
        raise translate_validation_error(error, RequestedConfig, tree) from None
    errors = _list_feature_errors(config)
    if (teacher := derive_teacher_config(config)) and config.distillation and config.distillation.phases is not None:
        errors += [prefix_teacher_key(error) for error in _list_feature_errors(teacher)]
    if errors:
        raise ConfigError.combine(errors)
    return config if config.auto_keys else replace_auto(config)


def validate_resolved_config(tree: dict[str, Any]) -> RunConfig:
    """Validate the configuration of an existing run, as parsed from its config.yaml.

    Raises ConfigError if it is not valid, or if its backbone, batch size, phases or precision is `auto`.
    """
    config = validate_config(tree)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "is resolved only when a run begins", key=config.auto_keys[0], value="auto", fix="set a value"
        )
    return config


def _describe_tree_error(value: Any, path: str = "", container_ids: tuple[int, ...] = ()) -> str | None:
    """Describe the first key in `value` that is not a string, or a loop of YAML aliases; None if it has neither.

    Args:
        value: nested dicts and lists, or a scalar.
        path: dotted key of `value`.
        container_ids: `id()` of the dicts and lists that contain `value`, outermost first.
    """
    if not isinstance(value, dict | list):
        return None
    if id(value) in container_ids or len(container_ids) > MAX_DEPTH:
        return f"has a loop, or more than {MAX_DEPTH} levels, at {path[:80]}"
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        name = f"{path}.{key}".lstrip(".")
        # A class can be named 2024, which YAML reads as a number.
        is_class = path in ("training.class_weights", "data.class_names")
        if isinstance(value, dict) and not isinstance(key, str) and not is_class:
            return f"has a key that is not a string, {name}"
        if problem := _describe_tree_error(child, name, (*container_ids, id(value))):
            return problem
    return None


def parse_config(text: str | bytes) -> dict[str, Any]:
    """Parse `text`, the content of a run's config.yaml, and replace old names of keys by their current names.

    Older versions had no data.orientation and trained on images as stored, so that its default here is "ignore".

    Raises:
        ConfigError: `text` is not YAML, is not a mapping, or has a key that is not a string or a loop of aliases.
    """
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"is not YAML ({reason})", fix="restore the file") from None
    if not isinstance(tree, dict):
        raise ConfigError("is empty" if tree is None else "is not a mapping of keys to values", fix="restore the file")
    if problem := _describe_tree_error(tree):
        raise ConfigError(problem, fix="restore the file")
    if isinstance(data := tree.get("data"), dict):
        data.setdefault("orientation", "ignore")
    for old_key, new_key in RENAMED_KEYS.items():
        section, _, name = old_key.rpartition(".")
        section_values = tree.get(section)
        if isinstance(section_values, dict) and name in section_values:
            section_values[new_key.rpartition(".")[2]] = section_values.pop(name)
    return tree


@dataclass(frozen=True)
class AutoValues:
    """The values that replace `auto` in a configuration. The defaults are placeholders for keys that are not `auto`."""

    backbone: str = ""
    batch_size: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)
    precision: Precision = "float32"


def replace_auto(config: RequestedConfig, auto_values: AutoValues = AutoValues()) -> RunConfig:
    """Return the resolved configuration, in which the values in `auto_values` replace `auto`. Other keys are unchanged.

    Nothing is validated again (`model_construct`), because the other values are valid, and the defaults are not.
    """
    training, runtime = dict(config.training), dict(config.runtime)
    if training["batch_size"] == "auto":
        training["batch_size"] = auto_values.batch_size
    if runtime["precision"] == "auto":
        runtime["precision"] = auto_values.precision
    values = dict(config) | {"training": ResolvedTraining.model_construct(**training)}
    values["runtime"] = ResolvedRuntime.model_construct(**runtime)
    if config.model.backbone == "auto":
        values["model"] = config.model.model_copy(update={"backbone": auto_values.backbone})
    if isinstance(config.phases, AutoPhases):
        values["phases"] = auto_values.phases
    return RunConfig.model_construct(**values)


# Section -> key -> value that replaces the user's value if debug.overfit is set.
OVERFIT_VALUES: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.0, "l2": 0.0},
    "training": {"label_smoothing": 0.0, "ema": None, "keep": "last"},
}


def apply_overfit(config: RequestedConfig) -> RequestedConfig:
    """Return the configuration without augmentation, distillation and regularization if debug.overfit is set.

    A batch size of `auto` becomes 32. Without debug.overfit, the configuration is returned unchanged.
    """
    if not config.debug.overfit:
        return config
    batch_size = 32 if config.training.batch_size == "auto" else config.training.batch_size
    training = {"batch_size": batch_size, **OVERFIT_VALUES["training"]}
    overfit_config = config.model_copy(update={
        "augmentation": Augmentation(),
        "distillation": None,
        "model": config.model.model_copy(update=OVERFIT_VALUES["model"]),
        "training": config.training.model_copy(update=training),
    })  # fmt: skip
    return overfit_config if overfit_config.auto_keys else replace_auto(overfit_config)
