"""The run state, which a checkpoint stores in addition to the variables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """A run's progress, which every checkpoint stores as JSON. JSON represents the floats exactly."""

    phase: int = 0  # index of the current phase; the number of phases once all are finished
    epoch: int = 0  # finished epochs of all phases; determines the order and the augmentation of the examples
    step: int = 0  # optimizer steps of the run
    phase_step: int = 0  # optimizer steps of the current phase
    epoch_step: int = 0  # optimizer steps of the current epoch
    best: dict[str, Any] | None = None  # best epoch of the current phase: {"step", "epoch", "value", "val_loss"}
    bad_epochs: int = 0  # consecutive epochs of the current phase without improvement
    carried: int | None = None  # step of the best epoch of all earlier phases; None if training.keep is not best
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # over this epoch: losses, correct, examples
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # the same sums since the last log line
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per finished epoch
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # summary of each finished phase, by phase
    images: float = 0.0  # number of training examples that the run has processed
    train_seconds: float = 0.0  # seconds of training up to this checkpoint
    starts: int = 0  # starts of the run up to this checkpoint, including restarts
    sharding: dict[str, Any] = field(default_factory=dict)  # `trainer.data.sharding.ShardingPlan.checkpoint_state`
    teacher: str | None = None  # fingerprint of the teacher's weights; None if there is no teacher

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values, by field name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Build a state from the result of `to_json`."""
        return cls(**values)
