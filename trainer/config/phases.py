"""The configuration of a phase: what trains, for how long, how fast. The reference is docs/phases.md."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.base import AUTO, Duration, Section, SomeDuration


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
        adam = {"beta_1", "beta_2", "epsilon"}
        others = {"adamw": adam | {"weight_decay"}, "sgd": {"momentum", "nesterov"},
                  "rmsprop": {"momentum", "rho", "epsilon"}}  # fmt: skip
        known = others.get(self.name, adam)
        unknown = sorted(k for k in self.options if k not in known)
        if unknown:
            raise ValueError(f"optimizer {self.name} has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that are set beside the learning rate."""
        return {k: v for k, v in self if k not in ("name", "learning_rate") and v is not None}


class Schedule(Section):
    """How the learning rate moves within a phase, after a linear warm-up from 0."""

    name: Literal["constant", "cosine", "exponential", "time", "step"] = "constant"
    warmup: SomeDuration = Duration(count=0, unit="steps")
    final: float = Field(0.0, ge=0, le=1)  # cosine: the last rate, as a fraction of the first
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


UNITS: tuple[str, ...] = ("epochs", "steps", "examples")


class Phase(Section):
    """One stretch of training: what trains, for how long, and how fast."""

    thaw: str  # none | all | from_layer:N | last_layers:N | percent:P | from_block:NAME | last_blocks:N | pattern:REGEX
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    examples: int | None = Field(None, ge=1)
    batch_norm: Literal["frozen", "train"] = "frozen"
    backbone_rate: float = Field(1.0, gt=0, le=1)  # of the whole backbone, as a fraction of the head's learning rate
    layer_decay: float = Field(1.0, gt=0, le=1)  # learning rate of a block, as a fraction of that of the block above it
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    early_stopping: EarlyStopping = EarlyStopping()
    features: Literal["auto", "cached", "live"] = "auto"  # cached: what is below all that trains computes once
    features_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # that they are stored in
    augmented_views: int | None = Field(None, ge=1)  # fixed augmentations of an image; null: another one each epoch

    @model_validator(mode="after")
    def _valid(self) -> Phase:
        given = [k for k in UNITS if getattr(self, k) is not None]
        if len(given) != 1:
            was = f"{' and '.join(given)} are set" if given else "none is set"
            raise ValueError(f"set exactly one of epochs, steps, examples ({was}; unset one with KEY=null)")
        if not THAW.fullmatch(self.thaw):
            raise ValueError(
                f"thaw={self.thaw!r} is not none, all, from_layer:N, last_layers:N, percent:P, from_block:NAME, "
                "last_blocks:N or pattern:REGEX"
            )
        return self

    @property
    def duration(self) -> Duration:
        """The length of the phase, at most."""
        unit = next(k for k in UNITS if getattr(self, k) is not None)
        return Duration.model_validate({"count": getattr(self, unit), "unit": unit})


THAW = re.compile(
    r"none|all|(from_layer|last_layers|last_blocks):\d+|percent:(100|\d{1,2})(\.\d+)?|from_block:[\w/]+|pattern:.+"
)


class Advised(Section):
    """`phases=auto`: the phases for few and for many images, like those that the backbone knows or unlike them."""

    domain: Literal["similar", "different"] | None = None  # the images against the backbone's; null: taken as similar
    few_similar: dict[str, Phase] = Field(min_length=1)
    few_different: dict[str, Phase] = Field(min_length=1)
    many_similar: dict[str, Phase] = Field(min_length=1)
    many_different: dict[str, Phase] = Field(min_length=1)


class Auto(Section):
    """The values that are `auto`, to be chosen when the data has been opened (trainer/config/auto.py)."""

    backbone: bool = False
    batch_size: bool = False
    phases: Advised | None = None

    @field_validator("phases", mode="before")
    @classmethod
    def _alone(cls, phases: Any) -> Any:
        if others := [name for name in phases if name != "auto"]:
            raise ValueError(
                f"chooses all phases, but {', '.join(others)} is said beside it; leave that out, or choose a group "
                "such as phases=two_phase"
            )
        return phases["auto"]


def auto_apart(tree: dict[str, Any]) -> dict[str, Any]:
    """The composed `tree` with what is `auto` moved to the key `AUTO`, and a valid value in its place."""
    model, training, phases = (
        tree[k] if isinstance(tree.get(k), dict) else {} for k in ("model", "training", "phases")
    )
    auto: dict[str, Any] = {}
    if model.get("backbone") == "auto":  # stays: no backbone has that name
        auto["backbone"] = True
    if training.get("batch_size") == "auto":
        auto["batch_size"] = True
        tree = {**tree, "training": {k: v for k, v in training.items() if k != "batch_size"}}
    if "auto" in phases:
        auto["phases"] = phases
        tree = {**tree, "phases": {"auto": {"thaw": "none", "steps": 1}}}
    return {**tree, AUTO: auto} if auto else tree
