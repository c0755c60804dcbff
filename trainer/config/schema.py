"""The configuration of a run: one frozen, validated tree.

Hydra composes plain YAML from `conf/`; `load` turns it into a `RunConfig` or raises one `ConfigError` that lists
every fault, each with its key, its value and what would be right. Nothing here imports TensorFlow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from trainer.config.base import AUTO, Duration, Section, SomeDuration, describe_faults
from trainer.config.phases import Auto, Phase, auto_apart
from trainer.errors import ConfigError


class Data(Section):
    """Where labelled images come from, and how they are split and read."""

    source: Literal["digits", "image_folder", "tfds", "tfrecords"]
    root: str | None = None  # image_folder; or the folder of one prepared TFDS dataset
    name: str | None = None  # tfds: "beans", "food101:2.0.0", ...
    data_dir: str | None = None  # tfds: where prepared datasets lie (TFDS's own default when null)
    download: bool = False  # tfds: may download and prepare
    pattern: str | None = None  # tfrecords: "shards/*.tfrec"
    image_field: str = "image"
    label_field: str = "label"
    class_names: tuple[str, ...] | None = None  # tfrecords: must be given
    train_split: str = "train"  # tfds split strings, slices included: "train[:80%]"
    validation_split: str | None = None
    test_split: str | None = None
    validation_fraction: float = Field(0.2, ge=0, lt=1)  # taken from the training part where there is no split
    test_fraction: float = Field(0.0, ge=0, lt=1)
    split_seed: int = Field(42, ge=0)
    labels_per_class: int | None = Field(None, ge=1)  # train on this many labelled examples a class
    shuffle_window: int = Field(8192, ge=1)  # records that are shuffled together
    shards: int | None = Field(None, ge=1)  # what `prepare` writes; one per ~100 MB when null
    on_error: Literal["fail", "skip"] = "fail"
    cache: Literal["auto", "memory", "disk", "none"] = "auto"  # decoded pixels
    shard_by: Literal["auto", "record", "file"] = "auto"  # what each of several workers reads
    group_field: str | None = None  # tfds, tfrecords: text or whole numbers; scores are told apart by its values

    @model_validator(mode="after")
    def _complete(self) -> Data:
        needed = {"image_folder": ("root",), "tfrecords": ("pattern", "class_names"), "digits": ()}
        missing = [k for k in needed.get(self.source, ()) if not getattr(self, k)]
        if self.source == "tfds" and not (self.name or self.root):
            missing = ["name (or data.root)"]
        if missing:
            raise ValueError(f"data.source={self.source} needs " + " and ".join(f"data.{k}" for k in missing))
        if self.group_field and self.source not in ("tfds", "tfrecords"):
            raise ValueError(
                f"data.group_field={self.group_field}: data.source={self.source} has no fields beside image and label; "
                "only tfds and tfrecords have"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("data.validation_fraction + data.test_fraction must leave something to train on")
        return self


class Model(Section):
    """The backbone, its weights, and the head on top."""

    backbone: str  # of keras.applications; auto: the advice table (docs/phases.md)
    weights: str = "imagenet"  # imagenet | glyphs | none | a path to a Keras .weights.h5 or .keras file
    alpha: float | None = Field(None, gt=0)  # MobileNet families only
    image_size: int | None = Field(None, ge=8, le=2048)  # pixels; the backbone's own when null
    resize: Literal["stretch", "crop"] = "stretch"
    pooling: Literal["avg", "max"] = "avg"
    hidden: int | None = Field(None, ge=1)  # units of an extra ReLU layer
    dropout: float = Field(0.0, ge=0, lt=1)
    l2: float = Field(0.0, ge=0)  # on the kernels of the head

    @model_validator(mode="after")
    def _fits_any(self) -> Model:
        if self.backbone == "auto" and self.weights not in ("imagenet", "none"):
            raise ValueError(f"backbone=auto may choose any network, weights={self.weights} fits one: say which")
        if self.backbone == "auto" and self.alpha is not None:
            raise ValueError(f"backbone=auto may choose a network without alpha: unset alpha={self.alpha:g}")
        return self


def _read_rotation(value: Any) -> Any:
    ranges = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 180 for x in ranges):
        raise ValueError("degrees from 0 to 180, or two of them: [40, 108] draws from each range and adds up")
    return value


Rotation = Annotated[float | tuple[float, float], BeforeValidator(_read_rotation)]


class Augmentation(Section):
    """Random changes to a training image; each is a function of (seed, epoch, index) alone. 0 is off."""

    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotation: Rotation = 0.0  # degrees, drawn from +- this; [40, 108]: from each range, added up
    shift: float = Field(0.0, ge=0, le=1)  # fraction of the side
    shear: float = Field(0.0, ge=0, lt=90)  # degrees
    zoom: float = Field(0.0, ge=0, lt=1)  # 0.2: scale drawn from [0.8, 1.2]
    stretch: float = Field(0.0, ge=0, lt=1)  # 0.2: width and height scaled apart, each from [0.8, 1.2]
    crop: float = Field(0.0, ge=0, lt=1)  # least part of the area that a crop keeps, its aspect from 3/4 to 4/3
    contrast: float = Field(0.0, ge=0, lt=1)
    brightness: float = Field(0.0, ge=0, lt=1)  # fraction of 255
    saturation: float = Field(0.0, ge=0, le=1)
    hue: float = Field(0.0, ge=0, le=0.5)  # fraction of a turn
    randaugment: int = Field(0, ge=0, le=14)  # operations that an image goes through
    magnitude: int = Field(9, ge=0, le=30)  # of those operations
    cutout: float = Field(0.0, ge=0, le=1)  # side of a grey square, as a fraction of the image's
    mixup: float = Field(0.0, ge=0)  # alpha of Beta(alpha, alpha); neighbours in a batch are mixed
    cutmix: float = Field(0.0, ge=0)  # alpha; with mixup too, each takes half of the examples
    fill: Literal["nearest", "constant", "reflect"] = "nearest"

    @property
    def active(self) -> bool:
        """Whether anything at all is changed; `fill` and `magnitude` alone change nothing."""
        return any(value for name, value in self if name not in ("fill", "magnitude"))

    @property
    def mixes(self) -> bool:
        """Whether examples are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def rotations(self) -> tuple[float, ...]:
        """The ranges of rotation, degrees; none where it is off."""
        ranges = self.rotation if isinstance(self.rotation, tuple) else (self.rotation,)
        return tuple(most for most in ranges if most)


class Training(Section):
    """What holds for every phase."""

    batch_size: int = Field(32, ge=1)  # global: over all replicas and workers; auto: the advice table
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: float = Field(2.0, ge=0)  # focal: (1 - p)^gamma makes easy examples count less
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    clip_norm: float | None = Field(None, gt=0)  # of the gradient of the whole batch
    accumulate: int = Field(1, ge=1)  # pieces that a replica's batch is computed in
    ema: float | None = Field(None, gt=0, lt=1)  # decay a step of averaged weights; null: none
    keep: Literal["best", "last"] = "best"  # which weights a phase hands on and the export takes
    validation_share: float = Field(1.0, gt=0, le=1)  # of the validation batches, between epochs

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.loss != "focal" and self.focal_gamma != 2.0:
            raise ValueError(f"focal_gamma={self.focal_gamma:g} needs training.loss=focal")
        return self


class Distillation(Section):
    """A teacher beside the labels: loss = alpha x label's + (1 - alpha) x temperature^2 x KL(teacher, student)."""

    teacher: str  # output_dir of an earlier run, or of a SavedModel that a run exported; local or gs://
    alpha: float = Field(0.1, ge=0, lt=1)  # weight of the loss against the labels
    temperature: float = Field(1.0, gt=0)  # softens both answers


GIGABYTE = 1024**3


class Runtime(Section):
    """How the machine is used. Nothing here changes what is learned, but precision, xla and deterministic."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    xla: bool = False
    deterministic: bool = True
    replicas: int | None = Field(None, ge=1)  # null: every GPU, else one; on CPU: that many logical devices
    collectives: Literal["auto", "nccl", "ring"] = "auto"  # how several workers add up gradients
    pack_mb: float | None = Field(None, gt=0)  # megabytes of gradients added up at once; null: all
    start_timeout: float = Field(600.0, gt=0)  # seconds for all workers to find each other
    max_fruitless_restarts: int = Field(5, ge=1)  # starts in a row without a step of progress, then exit code 3
    steps_per_call: int = Field(10, ge=1)  # optimizer steps in one device call
    log_every: SomeDuration = Duration(count=20, unit="steps")
    checkpoint_every: SomeDuration = Duration(count=1, unit="epochs")
    keep_checkpoints: int = Field(2, ge=1)
    progress: Literal["auto", "bar", "lines"] = "auto"
    cache_dir: str = "~/.cache/kubetune"
    memory_budget_gb: float | None = Field(None, gt=0)  # decoded images in memory; null: a quarter of the machine's
    disk_budget_gb: float = Field(50.0, ge=0)
    data_threads: int | None = Field(None, ge=1)
    http_port: int | None = Field(None, ge=1, le=65535)  # serves /healthz and /metrics; null: nothing is served
    stuck_after: float = Field(900.0, gt=0)  # seconds without any progress, after which /healthz answers 503
    log_format: Literal["text", "json"] = "text"  # json: one object a line, with the field names of Cloud Logging
    termination_log: str | None = None  # file that gets the reason of the exit; /dev/termination-log in a pod

    @model_validator(mode="after")
    def _fits(self) -> Runtime:
        if self.log_format == "json" and self.progress == "bar":
            raise ValueError("a progress bar is no JSON: set runtime.progress=lines or runtime.log_format=text")
        return self

    @property
    def cache_folder(self) -> Path:
        """`cache_dir` with `~` expanded."""
        return Path(self.cache_dir).expanduser()

    @property
    def memory_budget(self) -> int | None:
        """Bytes of memory that decoded images and features may take; None: the default of the machine."""
        return int(self.memory_budget_gb * GIGABYTE) if self.memory_budget_gb else None

    @property
    def disk_budget(self) -> int:
        """Bytes of `cache_folder` that each cache may take."""
        return int(self.disk_budget_gb * GIGABYTE)


ExportFormat = Literal["saved_model", "keras", "tflite", "tflite_float16", "tflite_dynamic", "tflite_int8", "onnx"]


class Export(Section):
    """What is made of the trained model at the end."""

    formats: tuple[ExportFormat, ...] = ("saved_model", "tflite")  # docs/exports.md
    max_accuracy_drop: float = Field(
        0.01, ge=0, le=1
    )  # fraction of the scored examples; a worse file ends the run with 2


class Debug(Section):
    """Shortcuts for looking at a run before paying for it."""

    max_steps: int | None = Field(None, ge=1)  # a phase ends after this many steps
    max_examples: int | None = Field(None, ge=1)  # of each split
    overfit: bool = False  # train on one batch, without regularisation, and score that batch
    profile_steps: tuple[int, int] | None = None  # [first, last] step of the run, traced for TensorBoard


class RunConfig(Section):
    """Everything a run was told."""

    data: Data
    model: Model
    phases: dict[str, Phase] = Field(min_length=1)
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    runtime: Runtime = Runtime()
    export: Export = Export()
    debug: Debug = Debug()
    distillation: Distillation | None = None
    seed: int = Field(42, ge=0, lt=2**31)
    output_dir: str | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    warm_start: str | None = None  # output_dir of an earlier run, or one of its checkpoints: start from its weights
    experiment_name: str | None = None
    auto: Auto | None = Field(None, alias=AUTO, exclude=True)  # still to be chosen; never so in a saved configuration

    @model_validator(mode="after")
    def _features_fit(self) -> RunConfig:
        faults = [
            f"phases.{name}.{fault}"
            for name, phase in self.phases.items()
            if (fault := self.feature_config_error(phase))
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def example_limit(self) -> int | None:
        """Examples of each split that are used at most: one batch with debug.overfit; None: all."""
        return self.training.batch_size if self.debug.overfit else self.debug.max_examples

    def phase_steps(self, phase: Phase, steps_per_epoch: int) -> int:
        """Optimizer steps that a phase takes at most."""
        steps = phase.duration.steps(steps_per_epoch, self.training.batch_size)
        return min(steps, self.debug.max_steps or steps)

    def why_not_cacheable(self, phase: Phase) -> str | None:
        """Why no phase like this can compute the features of its frozen layers once; None where it can."""
        if not self.augmentation.active:
            return None
        if self.augmentation.mixes:
            return "augmentation.mixup and cutmix mix other images in every epoch"
        if self.distillation:
            return "the teacher answers in every step, for what augmentation made of the images"
        return None if phase.augmented_views else "augmentation makes other images in every epoch (augmented_views)"

    def feature_config_error(self, phase: Phase) -> str | None:
        """The fault in what a phase asks of cached features; None where there is none."""
        views, active = phase.augmented_views, self.augmentation.active
        if views and views > 1 and not active:
            return f"augmented_views={views}: nothing augments, every view would be the same; leave it null"
        why = self.why_not_cacheable(phase)
        if phase.features != "cached" or why is None:
            return None
        if active and not views and not self.augmentation.mixes and not self.distillation:
            return "features=cached: with augmentation, say how many fixed views of each image, augmented_views=4"
        return f"features=cached: {why}; say features=auto or live"


def load(tree: dict[str, Any]) -> RunConfig:
    """Validate a composed tree.

    Raises:
        ConfigError: lists every fault at once.
    """
    tree = auto_apart(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, RunConfig, tree)) from None


def apply_overfit(config: RunConfig) -> RunConfig:
    """The configuration that is trained: with debug.overfit nothing may stand between the model and one batch."""
    if not config.debug.overfit:
        return config
    auto = config.auto.model_copy(update={"batch_size": False}) if config.auto else None  # it would be of that batch
    return config.model_copy(
        update={
            "auto": auto,
            "augmentation": Augmentation(),
            "distillation": None,
            "model": config.model.model_copy(update={"dropout": 0.0, "l2": 0.0}),
            "training": config.training.model_copy(update={"label_smoothing": 0.0, "ema": None, "keep": "last"}),
        }
    )
