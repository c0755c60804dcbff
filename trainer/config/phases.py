"""The configuration of phases: their trainable layers, length, optimizer and schedule (docs/phases.md)."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, WrapValidator, model_validator

from trainer.config.base import MAX_COUNT, Duration, DurationSetting, InvalidValue, PositiveDuration, Section
from trainer.config.keys import find_first_leaf_key
from trainer.names import find_path_error


class Optimizer(Section):
    """A Keras optimizer. An option can be set only if this optimizer has it; null means the Keras default."""

    name: Literal["adam", "adamw", "sgd", "rmsprop", "adamax", "adagrad", "adadelta", "nadam", "lion"] = "adam"
    """Class in `keras.optimizers`, in lower case."""
    learning_rate: float = Field(1e-3, ge=1e-12, le=1e38)
    """Learning rate of the head at the start of the schedule, after the warm-up."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """sgd, rmsprop: momentum."""
    nesterov: bool | None = None
    """sgd: use Nesterov momentum."""
    weight_decay: float | None = Field(None, ge=0, le=1e3)
    """adamw, adagrad, adadelta, nadam, lion: decoupled weight decay per step, relative to the learning rate."""
    beta_1: float | None = Field(None, ge=0, lt=1)
    """adam, adamw, adamax, nadam: decay rate of the first moment, per step; lion: weight of the momentum in the update,
    which must be above 0."""
    beta_2: float | None = Field(None, ge=0, lt=1)
    """adam, adamw, adamax, nadam: decay rate of the second moment (adamax: of the infinity norm), per step; lion: decay
    rate of the momentum."""
    rho: float | None = Field(None, ge=0, lt=1)
    """rmsprop, adadelta: decay rate of the mean square, per step."""
    epsilon: float | None = Field(None, ge=1e-12, le=1e3)
    """All except sgd and lion: constant added to the denominator."""

    @model_validator(mode="after")
    def _check_options(self) -> Optimizer:
        """Reject options that the optimizer does not have."""
        adam_options = {"beta_1", "beta_2", "epsilon"}
        decay_options = adam_options | {"weight_decay"}
        options_by_name = {"adamw": decay_options, "nadam": decay_options, "lion": decay_options - {"epsilon"},
                  "adagrad": {"weight_decay", "epsilon"}, "adadelta": {"weight_decay", "rho", "epsilon"},
                  "sgd": {"momentum", "nesterov"}, "rmsprop": {"momentum", "rho", "epsilon"}}  # fmt: skip
        valid_options = options_by_name.get(self.name, adam_options)
        if unknown := sorted(key for key in self.options if key not in valid_options):
            problem = f"has no {', '.join(unknown)}; its options are {', '.join(sorted(valid_options))}"
            raise InvalidValue(problem, key="name", value=self.name, fix=f"set {', '.join(unknown)} to null")
        if self.name == "lion" and self.beta_1 == 0:
            raise InvalidValue("is 0, with which lion has no momentum", key="beta_1", fix="use a value above 0")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the Keras class that are set, without the learning rate."""
        return {k: v for k, v in self if k not in ("name", "learning_rate") and v is not None}


class Schedule(Section):
    """The learning rate as a function of the step within a phase, after a linear warm-up."""

    name: Literal["constant", "cosine", "exponential", "time", "step"] = "constant"
    """Formula of the learning rate (docs/phases.md)."""
    warmup: DurationSetting = Duration(count=0, unit="steps")
    """Length of the linear warm-up, after which the schedule starts."""
    final: float = Field(0.0, ge=0, le=1)
    """cosine: final learning rate, as a fraction of the initial one."""
    decay: float | None = Field(None, gt=0, le=1e3)
    """exponential, step: factor by which the learning rate is multiplied; time: d in learning_rate / (1 + d x step)."""
    every: PositiveDuration | None = None
    """exponential: length over which the learning rate is multiplied by `decay` once."""
    at: tuple[DurationSetting, ...] = ()
    """step: positions, from the start of the schedule, at which the learning rate is multiplied by `decay`."""

    @model_validator(mode="after")
    def _check_complete(self) -> Schedule:
        """Require the keys without which the schedule is not defined."""
        required_keys = {"exponential": ("decay", "every"), "time": ("decay",), "step": ("decay", "at")}.get(
            self.name, ()
        )
        if missing_keys := [key for key in required_keys if not getattr(self, key)]:
            raise InvalidValue("is incomplete", key="name", value=self.name, fix=f"set {' and '.join(missing_keys)}")
        for before, after in pairwise(self.at):
            if before.unit == after.unit and before.count >= after.count:
                raise InvalidValue("is not in ascending order", key="at", fix="sort the positions, each given once")
        return self


class EarlyStopping(Section):
    """The rule that ends a phase early if the validation metric has not improved for `patience` epochs."""

    patience: int = Field(0, ge=0, le=MAX_COUNT)
    """Epochs without improvement after which the phase ends; 0: never."""
    metric: Literal["accuracy", "loss"] = "accuracy"
    """Validation metric that is monitored. It also determines the best epoch."""
    min_delta: float = Field(0.0, ge=0, le=1e3)
    """Minimum change of the metric that counts as an improvement; accuracy is a fraction from 0 to 1."""


LENGTH_KEYS: tuple[str, ...] = ("epochs", "steps", "examples")  # keys of a phase, one of which is its length
THAW_SYNTAX = "none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME, last_blocks:N or pattern:REGEX"
THAW = re.compile(
    r"none|all|(from_layer|last_layers|last_blocks):\d+|percent:(100|\d{1,2})(\.\d+)?|from_block:[\w/]+|pattern:.+"
)


class Phase(Section):
    """A stretch of training with its own trainable layers, length and learning rate."""

    thaw: str
    """Layers of the backbone that train: none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME,
    last_blocks:N or pattern:REGEX (docs/phases.md)."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Length of the phase in epochs."""
    steps: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Length of the phase in optimizer steps."""
    examples: int | None = Field(None, ge=1, le=10**12)
    """Length of the phase in training examples."""
    batch_norm: Literal["frozen", "affine", "train"] = "frozen"
    """BatchNormalization layers of the backbone that `thaw` includes. frozen: they do not train; affine: gamma and beta
    train, with frozen statistics; train: gamma and beta train, with the batch's statistics."""
    backbone_rate: float = Field(1.0, ge=1e-6, le=1)
    """Learning-rate multiplier of the backbone, relative to the head."""
    layer_decay: float = Field(1.0, ge=1e-6, le=1)
    """Learning-rate multiplier of a block, relative to the block above it."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()
    features: Literal["auto", "cached", "live"] = "auto"
    """Output of the frozen layers below all trainable ones. cached: computed once; live: computed in each step; auto:
    the faster of the two."""
    features_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Data type in which cached features are stored."""
    augmented_views: int | None = Field(None, ge=1, le=2**16)
    """Number of fixed augmented versions of each image, whose features can be cached; null: a new augmentation in each
    epoch."""

    @model_validator(mode="after")
    def _check_length_and_thaw(self) -> Phase:
        """Require exactly one length, and a valid thaw rule."""
        lengths = [key for key in LENGTH_KEYS if getattr(self, key) is not None]
        if len(lengths) != 1:
            problem = f"has several lengths: {', '.join(lengths)}" if lengths else "has no length"
            raise InvalidValue(problem, fix="set exactly one of epochs, steps, examples; unset one with KEY=null")
        if not THAW.fullmatch(self.thaw):
            raise InvalidValue("is not a thaw rule", key="thaw", value=self.thaw, fix=f"use {THAW_SYNTAX}")
        return self

    @property
    def duration(self) -> Duration:
        """The phase's configured length, which early stopping and debug.max_steps can shorten."""
        unit = next(key for key in LENGTH_KEYS if getattr(self, key) is not None)
        return Duration.model_validate({"count": getattr(self, unit), "unit": unit})


def _check_phase_name(name: str) -> str:
    """Require that a phase name is valid as a folder name, because each phase has a folder in logs/."""
    if "/" in name or find_path_error(name):
        raise InvalidValue("cannot be the name of a folder", value=name, fix="name phases with letters, digits and _")
    return name


NamedPhases = Annotated[dict[Annotated[str, AfterValidator(_check_phase_name)], Phase], Field(min_length=1)]


class PhaseTable(Section):
    """The phases to choose from, by the number of training images and their similarity to the pretraining images."""

    domain: Literal["similar", "different"] | None = None
    """Whether the images are similar to the images on which the backbone was pretrained; null: similar."""
    few_similar: NamedPhases
    """Phases for few images of a similar domain."""
    few_different: NamedPhases
    """Phases for few images of a different domain."""
    many_similar: NamedPhases
    """Phases for many images of a similar domain."""
    many_different: NamedPhases
    """Phases for many images of a different domain."""


class AutoPhases(Section):
    """`phases=auto`: the phases are chosen when the data is opened, by its numbers of training images and classes
    (docs/phases.md)."""

    auto: PhaseTable

    @model_validator(mode="before")
    @classmethod
    def _require_alone(cls, phases: Any) -> Any:
        """Reject named phases in addition to `auto`."""
        if other_names := ", ".join(name for name in phases if name != "auto"):
            fix = f"unset {other_names}, or choose a group such as phases=two_phase"
            name, phase_value = next((name, value) for name, value in phases.items() if name != "auto")
            phase_table = phases["auto"] if isinstance(phases["auto"], dict) else {}
            rows = [row for row, by_name in phase_table.items() if isinstance(by_name, dict) and name in by_name]
            if rows and isinstance(phase_value, dict) and phase_value:
                other_rows = f" (and of {', '.join(rows[1:])})" if rows[1:] else ""
                key = f"phases.auto.{rows[0]}.{name}.{find_first_leaf_key(phase_value)}"
                fix = f"set {key}{other_rows}, or choose a group such as phases=two_phase"
            raise InvalidValue(f"chooses all phases, but {other_names} is set as well", key="auto", fix=fix)
        return phases


_NAMED_PHASES = TypeAdapter(NamedPhases)


def validate_phases(phases: Any, _union: Any) -> dict[str, Phase] | AutoPhases:
    """Validate `phases` as `AutoPhases` if it has the key `auto`, and otherwise as a dict {name: phase}.

    Pydantic alone would try both types, and report the errors of both.
    """
    is_auto = isinstance(phases, AutoPhases) or (isinstance(phases, dict) and "auto" in phases)
    return AutoPhases.model_validate(phases) if is_auto else _NAMED_PHASES.validate_python(phases)


Phases = Annotated[
    dict[str, Phase] | AutoPhases, WrapValidator(validate_phases, json_schema_input_type=NamedPhases | AutoPhases)
]
