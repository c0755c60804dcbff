"""What a run may say: one frozen, validated tree.

Hydra composes plain YAML from `conf/`; `load` turns it into a `RunConfig` or raises one `ConfigError` that lists
every fault, each with its key, its value and what would be right. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trainer.config_faults import describe_faults
from trainer.errors import ConfigError


class Section(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Duration(Section):
    """A length of training: `count` of `unit`. Written "500 steps", "2 epochs" or "10000 examples"."""

    count: float = Field(ge=0)
    unit: Literal["epochs", "steps", "examples"]

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """The number of optimizer steps, rounded to the nearest; at least 1 unless the count is 0."""
        per_unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "examples": 1.0 / batch_size}[self.unit]
        return max(round(self.count * per_unit), 1 if self.count > 0 else 0)


def _read_duration(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(epoch|step|example)s?\s*", value)
        if not match:
            raise ValueError('write it as "500 steps", "2 epochs" or "10000 examples"')
        return {"count": float(match[1]), "unit": match[2] + "s"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"count": float(value), "unit": "steps"}
    return value


SomeDuration = Annotated[Duration, BeforeValidator(_read_duration)]


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

    @model_validator(mode="after")
    def _complete(self) -> Data:
        needed = {"image_folder": ("root",), "tfrecords": ("pattern", "class_names"), "digits": ()}
        missing = [k for k in needed.get(self.source, ()) if not getattr(self, k)]
        if self.source == "tfds" and not (self.name or self.root):
            missing = ["name (or data.root)"]
        if missing:
            raise ValueError(f"data.source={self.source} needs " + " and ".join(f"data.{k}" for k in missing))
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("data.validation_fraction + data.test_fraction must leave something to train on")
        return self


class Model(Section):
    """The backbone, its weights, and the head on top."""

    backbone: str
    weights: str = "imagenet"  # imagenet | glyphs | none | a path to a Keras .weights.h5 or .keras file
    alpha: float | None = Field(None, gt=0)  # MobileNet families only
    image_size: int | None = Field(None, ge=8, le=2048)  # pixels; the backbone's own when null
    resize: Literal["stretch", "crop"] = "stretch"
    pooling: Literal["avg", "max"] = "avg"
    hidden: int | None = Field(None, ge=1)  # units of an extra ReLU layer
    dropout: float = Field(0.0, ge=0, lt=1)
    l2: float = Field(0.0, ge=0)  # on the kernels of the head


class Augmentation(Section):
    """Random changes to a training image; each is a function of (seed, epoch, index) alone."""

    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotation: float = Field(0.0, ge=0, le=180)  # degrees, drawn from +- this
    shift: float = Field(0.0, ge=0, le=1)  # share of the side
    shear: float = Field(0.0, ge=0, lt=90)  # degrees
    zoom: float = Field(0.0, ge=0, lt=1)  # 0.2: scale drawn from [0.8, 1.2]
    contrast: float = Field(0.0, ge=0, lt=1)
    brightness: float = Field(0.0, ge=0, lt=1)  # share of 255
    fill: Literal["nearest", "constant", "reflect"] = "nearest"

    @property
    def active(self) -> bool:
        """Whether anything at all is changed."""
        return any(value for name, value in self if name != "fill")


class Optimizer(Section):
    """A Keras optimizer. Options that the named one does not have are refused."""

    name: Literal["adam", "adamw", "sgd", "rmsprop", "adamax"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    momentum: float | None = Field(None, ge=0, lt=1)  # sgd, rmsprop
    nesterov: bool | None = None  # sgd
    weight_decay: float | None = Field(None, ge=0)  # adamw
    beta_1: float | None = Field(None, ge=0, lt=1)  # adam, adamw, adamax
    beta_2: float | None = Field(None, ge=0, lt=1)
    rho: float | None = Field(None, ge=0, lt=1)  # rmsprop
    epsilon: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Optimizer:
        betas = {"beta_1", "beta_2", "epsilon"}
        known = {
            "adam": betas,
            "adamw": betas | {"weight_decay"},
            "adamax": betas,
            "sgd": {"momentum", "nesterov"},
            "rmsprop": {"momentum", "rho", "epsilon"},
        }[self.name]
        strange = sorted(k for k in self.options if k not in known)
        if strange:
            raise ValueError(f"optimizer {self.name} has no {', '.join(strange)}; it takes {', '.join(sorted(known))}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What was set beyond the name and the learning rate."""
        return {k: v for k, v in self if k not in ("name", "learning_rate") and v is not None}


class Schedule(Section):
    """How the learning rate moves within a phase, after a linear warm-up from 0."""

    name: Literal["constant", "cosine", "exponential", "time", "step"] = "constant"
    warmup: SomeDuration = Duration(count=0, unit="steps")
    final: float = Field(0.0, ge=0, le=1)  # cosine: the last rate, as a share of the first
    decay: float | None = Field(None, gt=0)  # exponential: factor; time: lr / (1 + decay * step); step: factor
    every: SomeDuration | None = None  # exponential: one factor per this long
    at: tuple[SomeDuration, ...] = ()  # step: multiply by `decay` at each

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        needed = {"exponential": ("decay", "every"), "time": ("decay",), "step": ("decay", "at")}.get(self.name, ())
        missing = [k for k in needed if not getattr(self, k)]
        if missing:
            raise ValueError(f"schedule {self.name} needs {' and '.join(missing)}")
        return self


class EarlyStopping(Section):
    """Stop a phase when validation has not improved for `patience` epochs. Patience 0 never stops."""

    patience: int = Field(0, ge=0)  # epochs
    metric: Literal["accuracy", "loss"] = "accuracy"  # also decides which checkpoint is the best
    min_delta: float = Field(0.0, ge=0)


class Phase(Section):
    """One stretch of training: what trains, for how long, and how fast."""

    thaw: str  # none | all | from_layer:100 | last_layers:20 | percent:20 | from_block:block_13 | pattern:REGEX
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    examples: int | None = Field(None, ge=1)
    batch_norm: Literal["frozen", "train"] = "frozen"
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()

    @model_validator(mode="after")
    def _valid(self) -> Phase:
        given = [k for k in ("epochs", "steps", "examples") if getattr(self, k) is not None]
        if len(given) != 1:
            was = f"{' and '.join(given)} are set" if given else "none is set"
            raise ValueError(f"set exactly one of epochs, steps, examples ({was}; unset one with KEY=null)")
        if not THAW.fullmatch(self.thaw):
            raise ValueError(
                f"thaw={self.thaw!r} is not none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME "
                "or pattern:REGEX"
            )
        return self

    @property
    def duration(self) -> Duration:
        """How long the phase lasts at most."""
        unit = next(k for k in ("epochs", "steps", "examples") if getattr(self, k) is not None)
        return Duration.model_validate({"count": getattr(self, unit), "unit": unit})


THAW = re.compile(r"none|all|from_layer:\d+|last_layers:\d+|percent:(100|\d{1,2})(\.\d+)?|from_block:[\w/]+|pattern:.+")


class Training(Section):
    """What holds for every phase."""

    batch_size: int = Field(32, ge=1)  # global: over all replicas and workers
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    clip_norm: float | None = Field(None, gt=0)  # of the gradient of the whole batch
    accumulate: int = Field(1, ge=1)  # pieces that a replica's batch is computed in
    ema: float | None = Field(None, gt=0, lt=1)  # decay a step of averaged weights; null: none
    keep: Literal["best", "last"] = "best"  # which weights a phase hands on and the export takes
    validation_share: float = Field(1.0, gt=0, le=1)  # of the validation batches, between epochs


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


class Export(Section):
    """What is made of the trained model at the end."""

    formats: tuple[Literal["saved_model", "tflite"], ...] = ("saved_model", "tflite")


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
    seed: int = Field(42, ge=0, lt=2**31)
    output_dir: str | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    warm_start: str | None = None  # output_dir of an earlier run, or one of its checkpoints: start from its weights
    experiment_name: str | None = None


def load(tree: dict[str, Any]) -> RunConfig:
    """Validate a composed tree.

    Raises:
        ConfigError: lists every fault at once.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, RunConfig, tree)) from None


def without_regularisation(config: RunConfig) -> RunConfig:
    """For debug=overfit: nothing may stand between the model and one batch."""
    return config.model_copy(
        update={
            "augmentation": Augmentation(),
            "model": config.model.model_copy(update={"dropout": 0.0, "l2": 0.0}),
            "training": config.training.model_copy(update={"label_smoothing": 0.0, "ema": None, "keep": "last"}),
        }
    )
