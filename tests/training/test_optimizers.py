"""Schedules at chosen steps against their formulas, and every optimizer by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trainer.config_phases import Optimizer, Schedule
from trainer.training.optimizers import build_optimizer, build_schedule


def rates(steps: list[int], **schedule: Any) -> list[float]:
    rate = build_schedule(Schedule(**schedule), 0.1, total_steps=100, steps_per_epoch=10, batch_size=4)
    return [float(rate(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ({"name": "constant"}, [0, 1, 99], [0.1, 0.1, 0.1]),
        ({"name": "cosine"}, [0, 50, 100], [0.1, 0.05, 0.0]),
        ({"name": "cosine", "final": 0.1}, [0, 25, 100], [0.1, 0.1 * (0.9 * (1 + math.cos(math.pi / 4)) / 2 + 0.1), 0.01]),
        ({"name": "exponential", "decay": 0.9, "every": "1 epochs"}, [0, 5, 10, 20], [0.1, 0.1 * 0.9**0.5, 0.09, 0.081]),
        ({"name": "time", "decay": 0.01}, [0, 1, 50], [0.1, 0.1 / 1.01, 0.1 / 1.5]),
        ({"name": "step", "decay": 0.1, "at": ["20 steps", "200 examples"]}, [0, 19, 20, 49, 50], [0.1, 0.1, 0.01, 0.01, 1e-3]),
        ({"name": "constant", "warmup": "4 steps"}, [0, 1, 3, 4, 5], [0.02, 0.04, 0.08, 0.1, 0.1]),
        ({"name": "cosine", "warmup": "2 epochs"}, [19, 20, 60, 100], [0.1 * 20 / 21, 0.1, 0.05, 0.0]),
    ],
)  # fmt: skip
def test_rate_at_steps(schedule: dict[str, Any], steps: list[int], expected: list[float]) -> None:
    np.testing.assert_allclose(rates(steps, **schedule), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "adam"}, {"beta_1": 0.9}),
        ({"name": "adamw", "weight_decay": 0.02}, {"weight_decay": 0.02}),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ({"name": "rmsprop", "rho": 0.8}, {"rho": 0.8}),
        ({"name": "adamax", "beta_2": 0.99}, {"beta_2": 0.99}),
    ],
)
def test_optimizers_get_their_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    rate = build_schedule(Schedule(), 0.1, total_steps=10, steps_per_epoch=10, batch_size=1)
    made = build_optimizer(Optimizer(**given), rate)
    assert type(made).__name__.lower() == given["name"]
    assert {name: getattr(made, name) for name in expected} == expected
