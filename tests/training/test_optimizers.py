"""Schedules and optimizers against their formulas and against plain Keras, step by step; rates of single variables."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.training.small_network import SmallNetwork, arrays, stream
from trainer.config.phases import Optimizer, Schedule
from trainer.training import variables
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS, BATCH = 12, 8
OPTIMIZERS: list[tuple[dict[str, Any], Callable[[float], Any]]] = [
    ({"name": "sgd", "momentum": 0.9}, lambda rate: keras.optimizers.SGD(rate, momentum=0.9)),
    (
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    ),
    ({"name": "adam"}, lambda rate: keras.optimizers.Adam(rate)),
    ({"name": "adamw"}, lambda rate: keras.optimizers.AdamW(rate)),
    ({"name": "adamw", "weight_decay": 0.3}, lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.3)),
    ({"name": "rmsprop"}, lambda rate: keras.optimizers.RMSprop(rate)),
    (
        {"name": "rmsprop", "rho": 0.8, "momentum": 0.5},
        lambda rate: keras.optimizers.RMSprop(rate, rho=0.8, momentum=0.5),
    ),
    ({"name": "adamax", "beta_2": 0.99}, lambda rate: keras.optimizers.Adamax(rate, beta_2=0.99)),
]
NAMES = ["-".join(map(str, given.values())) for given, _ in OPTIMIZERS]

# Of 12 steps, three an epoch, eight examples a step; from 0.02.
SCHEDULES: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    ({"name": "constant"}, lambda _: 0.02),
    ({"name": "exponential", "decay": 0.9, "every": "5 steps"}, lambda s: 0.02 * 0.9 ** (s / 5)),
    ({"name": "time", "decay": 0.5}, lambda s: 0.02 / (1 + 0.5 * s)),
    ({"name": "cosine", "final": 0.1}, lambda s: 0.02 * (0.1 + 0.9 * (1 + math.cos(math.pi * s / 12)) / 2)),
    (
        {"name": "cosine", "warmup": "1 epochs"},
        lambda s: 0.02 * ((s + 1) / 4 if s < 3 else (1 + math.cos(math.pi * (s - 3) / 9)) / 2),
    ),
    ({"name": "constant", "warmup": "4 steps"}, lambda s: 0.02 * min((s + 1) / 5, 1)),
    (
        {"name": "step", "decay": 0.1, "at": ["1 epochs", "64 examples"]},
        lambda s: 0.02 * (1 if s < 3 else 0.1 if s < 8 else 0.01),
    ),
]


def schedule_of(**given: Any) -> Any:
    return build_schedule(Schedule(**given), 0.02, total_steps=STEPS, steps_per_epoch=3, batch_size=BATCH)


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


def stepwise(optimizer: Any) -> list[np.ndarray]:
    """All weights after each of `STEPS` steps of ours, 20 examples in batches of 8."""
    network = SmallNetwork()
    step = TrainingStep(tf.distribute.get_strategy(), network, network.variables, optimizer, StepSettings(seed=1))
    batches, found = iter(stream(20, BATCH)), []
    for done in range(STEPS):
        step.run(batches, 1, done, done)
        found.append(flat(network))
    return found


def flat(network: SmallNetwork) -> np.ndarray:
    return np.concatenate([value.ravel() for value in variables.read(network.variables).values()])


def keras_stepwise(optimizer: Any, rate: Callable[[int], float]) -> list[np.ndarray]:
    """The same from a compiled Keras model whose learning rate is set by hand before each step."""
    images, labels = arrays(20)
    network = SmallNetwork()
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), network.first, network.second]
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    found = []
    for done in range(STEPS):
        rows = slice(done % 3 * BATCH, min(done % 3 * BATCH + BATCH, 20))
        optimizer.learning_rate = rate(done)
        model.train_on_batch(images[rows].astype(np.float32), labels[rows])
        found.append(flat(network))
    return found


@pytest.mark.parametrize(("given", "make"), OPTIMIZERS, ids=NAMES)
def test_every_optimizer_makes_the_steps_of_keras(given: dict[str, Any], make: Callable[[float], Any]) -> None:
    ours = stepwise(build_optimizer(Optimizer(**given), schedule_of()))
    theirs = keras_stepwise(make(0.02), lambda _: 0.02)
    assert np.abs(ours[-1] - ours[0]).max() > 0.01
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(mine, other, atol=5e-6, err_msg=f"step {step}")


@pytest.mark.parametrize(("given", "formula"), SCHEDULES)
def test_every_schedule_makes_the_steps_of_keras(given: dict[str, Any], formula: Callable[[int], float]) -> None:
    rate = schedule_of(**given)
    np.testing.assert_allclose([float(rate(s)) for s in range(STEPS)], [formula(s) for s in range(STEPS)], rtol=1e-5)
    ours = stepwise(build_optimizer(Optimizer(name="adamax"), rate))
    theirs = keras_stepwise(keras.optimizers.Adamax(0.02), formula)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(mine, other, atol=5e-6, err_msg=f"step {step}")


# ---- a learning rate of its own for each variable ----

MULTIPLIERS = (0.05, 0.3, 1.0, 0.5)  # first/kernel, first/bias, second/kernel, second/bias


def one_optimizer_a_variable(make: Callable[[float], Any], rate: Callable[[int], float]) -> list[np.ndarray]:
    """Plain Keras: as many optimizers as variables, each with its share of the rate set by hand before each step."""
    images, labels = arrays(20)
    network = SmallNetwork()
    owned = list(network.variables.values())
    optimizers = [make(0.0) for _ in owned]
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = []
    for done in range(STEPS):
        rows = slice(done % 3 * BATCH, min(done % 3 * BATCH + BATCH, 20))
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels[rows], network.logits(images[rows]))
        gradients = tape.gradient(loss, [v.value for v in owned])
        for optimizer, share, gradient, variable in zip(optimizers, MULTIPLIERS, gradients, owned, strict=True):
            optimizer.learning_rate = share * rate(done)
            optimizer.apply([gradient], [variable])
        found.append(flat(network))
    return found


@pytest.mark.parametrize(("given", "make"), OPTIMIZERS, ids=NAMES)
def test_multiples_of_the_rate_are_as_many_keras_optimizers(
    given: dict[str, Any], make: Callable[[float], Any]
) -> None:
    schedule, formula = SCHEDULES[4]
    ours = stepwise(build_optimizer(Optimizer(**given), schedule_of(**schedule), MULTIPLIERS))
    theirs = one_optimizer_a_variable(make, formula)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(mine, other, atol=5e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_multipliers_it_is_keras_own_optimizer_and_the_checkpoint_has_the_same_names(name: Any) -> None:
    network = SmallNetwork()
    given = Optimizer(name=name)
    plain, shared = build_optimizer(given, schedule_of()), build_optimizer(given, schedule_of(), MULTIPLIERS)
    assert type(plain) is {"adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[name]
    for optimizer in (plain, shared):
        optimizer.build(list(network.variables.values()))
    assert list(variables.optimizer_variables(plain)) == list(variables.optimizer_variables(shared))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_multiplier_of_one_changes_no_bit(name: Any) -> None:
    whole = stepwise(build_optimizer(Optimizer(name=name), schedule_of()))
    ones = stepwise(build_optimizer(Optimizer(name=name), schedule_of(), (1.0, 1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(np.stack(ones), np.stack(whole))


def seven_steps(strategy: tf.distribute.Strategy) -> dict[str, dict[str, list[float]]]:
    """Everything that a checkpoint would hold after them, for two optimizers; of the first replica."""
    found = {}
    for given in ({"name": "sgd", "momentum": 0.9}, {"name": "adamw", "weight_decay": 0.3, "epsilon": 1e-3}):
        with strategy.scope():
            network = SmallNetwork()
            optimizer = build_optimizer(Optimizer(**given), schedule_of(name="time", decay=0.1), MULTIPLIERS)  # type: ignore[arg-type]
        step = TrainingStep(strategy, network, network.variables, optimizer, StepSettings(seed=1))
        replicas = strategy.num_replicas_in_sync
        step.run(iter(strategy.distribute_datasets_from_function(lambda _: stream(20, 8, replicas))), 7, 0, 0)  # noqa: B023
        for variable in network.variables.values():
            first, *others = (v.numpy() for v in strategy.experimental_local_results(variable.value))
            assert all(np.array_equal(first, other) for other in others)
        values = variables.read(network.variables | step.checkpoint_variables())
        found[str(given["name"])] = {name: value.ravel().tolist() for name, value in values.items()}
    return found


TWO_REPLICAS = """
import json
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.training.test_optimizers import seven_steps
print("RESULT" + json.dumps(seven_steps(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))))
"""


@pytest.mark.slow
def test_two_replicas_share_the_rate_as_one_does() -> None:
    """In a fresh process: logical devices come before all else."""
    result = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.split("RESULT")[1])
    for name, expected in seven_steps(tf.distribute.get_strategy()).items():
        assert list(found[name]) == list(expected)
        for variable, value in expected.items():
            np.testing.assert_allclose(found[name][variable], value, atol=1e-6, err_msg=f"{name}, {variable}")
