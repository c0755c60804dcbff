"""Progress of a run: everything a checkpoint holds but the variables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class RunState:
    """Progress of a run, saved with every checkpoint as JSON; floats survive it exactly."""

    phase: int = 0  # index of the phase in progress
    epoch: int = 0  # finished epochs of the run, phases included; seeds order and augmentation
    step: int = 0  # optimizer steps of the run
    phase_step: int = 0  # of this phase
    epoch_step: int = 0  # of this epoch
    best: dict[str, Any] | None = None  # this phase: {"step", "epoch", "value"}
    bad_epochs: int = 0  # since the best
    carried: int | None = None  # step of the best that earlier phases had: what this one began with
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # this epoch: loss, correct, examples
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # the same since the last log line
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a finished epoch
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # one entry a finished phase
    images: float = 0.0  # trained on since the first start
    train_seconds: float = 0.0  # of the clock, when this was saved
    starts: int = 0
    sharding: dict[str, Any] = field(default_factory=dict)  # {"by", "workers", "steps_per_epoch"} it was trained with
    teacher: str | None = None  # fingerprint of the one it learned from

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        return cls(**values)
