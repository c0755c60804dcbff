"""The configuration of a phase: trainable layers, length, optimizer and schedule. The reference is docs/phases.md."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, WrapValidator, model_validator

from trainer.config.base import Duration, InvalidValue, Section, SomeDuration


class Optimizer(Section):
    """A Keras optimizer. Options that the named one does not have are refused; null keeps Keras' default."""

    name: Literal["adam", "adamw", "sgd", "rmsprop", "adamax"] = "adam"
    """Class of `keras.optimizers`."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the head at the start of the schedule."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """sgd, rmsprop: momentum."""
    nesterov: bool | None = None
    """sgd: Nesterov momentum."""
    weight_decay: float | None = Field(None, ge=0)
    """adamw: decoupled weight decay per step, relative to the learning rate."""
    beta_1: float | None = Field(None, ge=0, lt=1)
    """adam, adamw, adamax: decay per step of the first moment."""
    beta_2: float | None = Field(None, ge=0, lt=1)
    """adam, adamw, adamax: decay per step of the second moment (adamax: of the infinity norm)."""
    rho: float | None = Field(None, ge=0, lt=1)
    """rmsprop: decay per step of the mean square."""
    epsilon: float | None = Field(None, gt=0)
    """All but sgd: added to the denominator."""

    @model_validator(mode="after")
    def _fits(self) -> Optimizer:
        adam = {"beta_1", "beta_2", "epsilon"}
        others = {"adamw": adam | {"weight_decay"}, "sgd": {"momentum", "nesterov"},
                  "rmsprop": {"momentum", "rho", "epsilon"}}  # fmt: skip
        known = others.get(self.name, adam)
        if unknown := sorted(key for key in self.options if key not in known):
            problem = f"has no {', '.join(unknown)}; its options are {', '.join(sorted(known))}"
            raise InvalidValue(problem, key="name", value=self.name, fix=f"set {', '.join(unknown)} to null")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments other than the learning rate that are set."""
        return {k: v for k, v in self if k not in ("name", "learning_rate") and v is not None}


class Schedule(Section):
    """The learning rate over the steps of a phase, after a linear warm-up from 0."""

    name: Literal["constant", "cosine", "exponential", "time", "step"] = "constant"
    """Formula of the rate (docs/phases.md)."""
    warmup: SomeDuration = Duration(count=0, unit="steps")
    """Length of the linear warm-up, before the schedule."""
    final: float = Field(0.0, ge=0, le=1)
    """cosine: the last rate, as a fraction of the first."""
    decay: float | None = Field(None, gt=0)
    """exponential, step: factor of the rate; time: d in rate / (1 + d x step)."""
    every: SomeDuration | None = None
    """exponential: the length over which the rate falls by one factor `decay`."""
    at: tuple[SomeDuration, ...] = ()
    """step: from the start of the schedule to each multiplication by `decay`."""

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        needed = {"exponential": ("decay", "every"), "time": ("decay",), "step": ("decay", "at")}.get(self.name, ())
        if missing := [key for key in needed if not getattr(self, key)]:
            text = " and ".join(missing)
            raise InvalidValue("is incomplete", key="name", value=self.name, fix=f"set {text}")
        return self


class EarlyStopping(Section):
    """The rule that ends a phase early, when validation has not improved for `patience` epochs."""

    patience: int = Field(0, ge=0)
    """Epochs without improvement after which the phase ends; 0: never."""
    metric: Literal["accuracy", "loss"] = "accuracy"
    """Validation metric that is compared; it also decides which checkpoint is the best."""
    min_delta: float = Field(0.0, ge=0)
    """Least change of the metric that counts as an improvement, in its unit (accuracy: fraction)."""


UNITS: tuple[str, ...] = ("epochs", "steps", "examples")
RULES = "none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME, last_blocks:N or pattern:REGEX"
THAW = re.compile(
    r"none|all|(from_layer|last_layers|last_blocks):\d+|percent:(100|\d{1,2})(\.\d+)?|from_block:[\w/]+|pattern:.+"
)


class Phase(Section):
    """One stretch of training with its own trainable layers, length and learning rate."""

    thaw: str
    """Layers of the backbone that train: none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME,
    last_blocks:N or pattern:REGEX (docs/phases.md)."""
    epochs: float | None = Field(None, gt=0)
    """Length of the phase in epochs."""
    steps: int | None = Field(None, ge=1)
    """Length of the phase in optimizer steps."""
    examples: int | None = Field(None, ge=1)
    """Length of the phase in training examples."""
    batch_norm: Literal["frozen", "train"] = "frozen"
    """BatchNormalization of the backbone: always frozen, or thawed with the layers around it."""
    backbone_rate: float = Field(1.0, gt=0, le=1)
    """Learning-rate multiplier of the whole backbone, relative to the head."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning-rate multiplier of a block, relative to the block above it."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()
    features: Literal["auto", "cached", "live"] = "auto"
    """cached: the features below all trainable layers are computed once; live: at each step; auto: the faster one."""
    features_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type in which cached features are stored."""
    augmented_views: int | None = Field(None, ge=1)
    """Fixed augmentations per image, so that features can be cached; null: a new augmentation in each epoch."""

    @model_validator(mode="after")
    def _valid(self) -> Phase:
        lengths = [key for key in UNITS if getattr(self, key) is not None]
        if len(lengths) != 1:
            problem = f"{' and '.join(lengths)} are set" if lengths else "has no length"
            raise InvalidValue(problem, fix="set exactly one of epochs, steps, examples; unset one with KEY=null")
        if not THAW.fullmatch(self.thaw):
            raise InvalidValue("is no thaw rule", key="thaw", value=self.thaw, fix=f"use {RULES}")
        return self

    @property
    def duration(self) -> Duration:
        """The length of the phase, at most."""
        unit = next(key for key in UNITS if getattr(self, key) is not None)
        return Duration.model_validate({"count": getattr(self, unit), "unit": unit})


NamedPhases = Annotated[dict[str, Phase], Field(min_length=1)]


class PhaseTable(Section):
    """The phases to choose from, for few and for many images, similar to those of the backbone or different."""

    domain: Literal["similar", "different"] | None = None
    """The images compared with those that the backbone was trained on; null: similar."""
    few_similar: NamedPhases
    """Phases for few images of a similar domain."""
    few_different: NamedPhases
    """Phases for few images of a different domain."""
    many_similar: NamedPhases
    """Phases for many images of a similar domain."""
    many_different: NamedPhases
    """Phases for many images of a different domain."""


class AutoPhases(Section):
    """`phases=auto`: phases that are chosen once the training images have been counted (trainer/config/auto.py)."""

    auto: PhaseTable

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, phases: Any) -> Any:
        if others := ", ".join(name for name in phases if name != "auto"):
            fix = f"unset {others}, or choose a group such as phases=two_phase"
            raise InvalidValue(f"chooses all phases, but {others} is given as well", key="auto", fix=fix)
        return phases


_NAMED = TypeAdapter(NamedPhases)


def _read_phases(phases: Any, _union: Any) -> Any:
    is_auto = isinstance(phases, AutoPhases) or (isinstance(phases, dict) and "auto" in phases)
    return AutoPhases.model_validate(phases) if is_auto else _NAMED.validate_python(phases)


Phases = Annotated[
    dict[str, Phase] | AutoPhases, WrapValidator(_read_phases, json_schema_input_type=NamedPhases | AutoPhases)
]
