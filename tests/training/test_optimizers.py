"""Schedules, optimizers and learning-rate multipliers against formulas and Keras, step by step."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.processes import result_of
from tests.training.small_network import (
    SmallNetwork,
    assert_near,
    compile_keras_model,
    make_arrays,
    make_batches,
    make_step,
)
from trainer.config.phases import Optimizer, Schedule
from trainer.training import variables
from trainer.training.optimizers import CLASSES, build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep

STEPS, BATCH = 12, 8
OPTIMIZERS: list[tuple[dict[str, Any], Callable[[float], Any]]] = [
    ({"name": "sgd", "momentum": 0.9}, lambda rate: keras.optimizers.SGD(rate, momentum=0.9)),
    ({"name": "sgd", "momentum": 0.9, "nesterov": True}, lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)),
    ({"name": "adam"}, lambda rate: keras.optimizers.Adam(rate)),
    ({"name": "adamw"}, lambda rate: keras.optimizers.AdamW(rate)),
    ({"name": "adamw", "weight_decay": 0.3}, lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.3)),
    ({"name": "rmsprop"}, lambda rate: keras.optimizers.RMSprop(rate)),
    ({"name": "rmsprop", "rho": 0.8, "momentum": 0.5}, lambda rate: keras.optimizers.RMSprop(rate, rho=0.8, momentum=0.5)),
    ({"name": "adamax", "beta_2": 0.99}, lambda rate: keras.optimizers.Adamax(rate, beta_2=0.99)),
    ({"name": "adagrad"}, lambda rate: keras.optimizers.Adagrad(rate)),
    ({"name": "adagrad", "weight_decay": 0.3}, lambda rate: keras.optimizers.Adagrad(rate, weight_decay=0.3)),
    ({"name": "adadelta", "rho": 0.8, "epsilon": 1e-3, "weight_decay": 0.3},
     lambda rate: keras.optimizers.Adadelta(rate, rho=0.8, epsilon=1e-3, weight_decay=0.3)),
    ({"name": "nadam"}, lambda rate: keras.optimizers.Nadam(rate)),
    ({"name": "nadam", "beta_1": 0.8, "weight_decay": 0.3}, lambda rate: keras.optimizers.Nadam(rate, beta_1=0.8, weight_decay=0.3)),
    ({"name": "lion"}, lambda rate: keras.optimizers.Lion(rate)),
    ({"name": "lion", "beta_2": 0.9, "weight_decay": 0.3}, lambda rate: keras.optimizers.Lion(rate, beta_2=0.9, weight_decay=0.3)),
]  # fmt: skip
NAMES = ["-".join(map(str, given.values())) for given, _ in OPTIMIZERS]

# The last of each class, with most options, is quick, where `test_every_optimizer_has_the_steps_of_keras` has them all.
LAST_OF_CLASS = {given["name"]: index for index, (given, _) in enumerate(OPTIMIZERS)}
ONE_OF_CLASS_QUICK = [
    pytest.param(*case, id=name, marks=() if index in LAST_OF_CLASS.values() else pytest.mark.slow)
    for index, (case, name) in enumerate(zip(OPTIMIZERS, NAMES, strict=True))
]

# 12 steps from 0.02, three per epoch, eight examples per step.
SCHEDULES: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    ({"name": "constant"}, lambda _: 0.02),
    ({"name": "exponential", "decay": 0.9, "every": "5 steps"}, lambda s: 0.02 * 0.9 ** (s / 5)),
    ({"name": "time", "decay": 0.5}, lambda s: 0.02 / (1 + 0.5 * s)),
    ({"name": "cosine", "final": 0.1}, lambda s: 0.02 * (0.1 + 0.9 * (1 + math.cos(math.pi * s / 12)) / 2)),
    ({"name": "cosine", "warmup": "1 epochs"},
     lambda s: 0.02 * ((s + 1) / 4 if s < 3 else (1 + math.cos(math.pi * (s - 3) / 9)) / 2)),
    ({"name": "constant", "warmup": "4 steps"}, lambda s: 0.02 * min((s + 1) / 5, 1)),
    ({"name": "step", "decay": 0.1, "at": ["1 epochs", "64 examples"]},
     lambda s: 0.02 * (1 if s < 3 else 0.1 if s < 8 else 0.01)),
]  # fmt: skip


def make_schedule(**settings: Any) -> Any:
    return build_schedule(Schedule(**settings), 0.02, total_steps=STEPS, steps_per_epoch=3, batch_size=BATCH)


def train_stepwise(optimizer: Any) -> list[np.ndarray]:
    """All weights after each of `STEPS` training steps, 20 examples in batches of 8."""
    network = SmallNetwork()
    step = make_step(network, optimizer)
    batches, weights = iter(make_batches(20, BATCH)), []
    for done in range(STEPS):
        step.run(batches, 1, done, done)
        weights.append(flatten_weights(network))
    return weights


def flatten_weights(network: SmallNetwork) -> np.ndarray:
    return np.concatenate([value.ravel() for value in variables.copy_values(network.variables).values()])


def train_keras_stepwise(optimizer: Any, rate: Callable[[int], float]) -> list[np.ndarray]:
    """The same with a compiled Keras model whose learning rate is set before each step."""
    images, labels = make_arrays(20)
    network = SmallNetwork()
    model = compile_keras_model(network, optimizer, run_eagerly=True)
    weights = []
    for done in range(STEPS):
        rows = slice(done % 3 * BATCH, min(done % 3 * BATCH + BATCH, 20))
        optimizer.learning_rate = rate(done)
        model.train_on_batch(images[rows].astype(np.float32), labels[rows])
        weights.append(flatten_weights(network))
    return weights


@pytest.mark.parametrize(("settings", "make"), OPTIMIZERS, ids=NAMES)
def test_every_optimizer_has_the_steps_of_keras(settings: dict[str, Any], make: Callable[[float], Any]) -> None:
    ours = train_stepwise(build_optimizer(Optimizer(**settings), make_schedule()))
    assert np.abs(ours[-1] - ours[0]).max() > 0.01
    np.testing.assert_allclose(ours, train_keras_stepwise(make(0.02), lambda _: 0.02), atol=5e-6)


@pytest.mark.parametrize(("settings", "formula"), SCHEDULES)
def test_every_schedule_has_the_steps_of_keras(settings: dict[str, Any], formula: Callable[[int], float]) -> None:
    rate, steps = make_schedule(**settings), range(STEPS + 1)
    np.testing.assert_allclose([float(rate(s)) for s in steps], [formula(s) for s in steps], rtol=1e-5, atol=1e-8)
    ours = train_stepwise(build_optimizer(Optimizer(name="adamax"), rate))
    np.testing.assert_allclose(ours, train_keras_stepwise(keras.optimizers.Adamax(0.02), formula), atol=5e-6)


# ---- learning-rate multipliers ----

MULTIPLIERS = (0.05, 0.3, 1.0, 0.5)  # first/kernel, first/bias, second/kernel, second/bias


def train_with_one_optimizer_per_variable(
    make: Callable[[float], Any], rate: Callable[[int], float]
) -> list[np.ndarray]:
    """The same with one Keras optimizer per variable, its learning rate times the multiplier."""
    images, labels = make_arrays(20)
    network = SmallNetwork()
    owned = list(network.variables.values())
    optimizers = [make(0.0) for _ in owned]
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = []
    for done in range(STEPS):
        rows = slice(done % 3 * BATCH, min(done % 3 * BATCH + BATCH, 20))
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels[rows], network.logits(images[rows]))
        gradients = tape.gradient(loss, [v.value for v in owned])
        for optimizer, multiplier, gradient, variable in zip(optimizers, MULTIPLIERS, gradients, owned, strict=True):
            optimizer.learning_rate = multiplier * rate(done)
            optimizer.apply([gradient], [variable])
        weights.append(flatten_weights(network))
    return weights


@pytest.mark.parametrize(("settings", "make"), ONE_OF_CLASS_QUICK)
def test_multipliers_are_equal_to_one_optimizer_per_variable(
    settings: dict[str, Any], make: Callable[[float], Any]
) -> None:
    schedule, formula = SCHEDULES[4]
    ours = train_stepwise(build_optimizer(Optimizer(**settings), make_schedule(**schedule), MULTIPLIERS))
    np.testing.assert_allclose(ours, train_with_one_optimizer_per_variable(make, formula), atol=5e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_multipliers_do_not_change_the_names_of_variables_and_multipliers_of_one_no_bit(name: Any) -> None:
    network, settings = SmallNetwork(), Optimizer(name=name)
    plain, multiplied = (
        build_optimizer(settings, make_schedule()),
        build_optimizer(settings, make_schedule(), MULTIPLIERS),
    )
    assert type(plain) is {"adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[name]
    for optimizer in (plain, multiplied):
        optimizer.build(list(network.variables.values()))
    assert list(variables.collect_optimizer_variables(plain)) == list(variables.collect_optimizer_variables(multiplied))
    whole = train_stepwise(build_optimizer(Optimizer(name=name), make_schedule()))
    ones = train_stepwise(build_optimizer(Optimizer(name=name), make_schedule(), (1.0, 1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(np.stack(ones), np.stack(whole))


ONE_PER_CLASS = [{"name": "sgd", "momentum": 0.9}, *({"name": name} for name in CLASSES if name != "sgd")]


@pytest.mark.parametrize("settings", ONE_PER_CLASS, ids=[str(settings["name"]) for settings in ONE_PER_CLASS])
def test_an_optimizer_continues_from_its_checkpoint_with_the_same_bits(settings: dict[str, Any]) -> None:
    """With multipliers, micro-batches and averages. Another start of a run has built other networks before."""

    def step_of(network: SmallNetwork) -> TrainingStep:
        optimizer = build_optimizer(Optimizer(**settings), make_schedule(name="time", decay=0.1), MULTIPLIERS)
        return make_step(network, optimizer, accumulate=2, ema=0.9)

    network = SmallNetwork()
    step, batches = step_of(network), iter(make_batches(16, BATCH))
    step.run(batches, 4, 0, 0)
    stored = variables.copy_values(network.variables | step.checkpoint_variables())
    step.run(batches, 3, 4, 4)
    resumed = SmallNetwork(seed=2)
    keras.Variable(0.0)  # counts in the automatic names of Keras
    later = step_of(resumed)
    variables.assign_values(resumed.variables | later.checkpoint_variables(), stored, "the checkpoint")
    later.run(iter(make_batches(16, BATCH)), 3, 4, 4)  # an epoch has two steps
    expected = variables.copy_values(network.variables | step.checkpoint_variables())
    values = variables.copy_values(resumed.variables | later.checkpoint_variables())
    assert list(values) == list(expected)
    assert not [name for name, value in values.items() if not np.array_equal(value, expected[name])]


def run_seven_steps(strategy: tf.distribute.Strategy) -> dict[str, dict[str, list[float]]]:
    """The variables of a checkpoint after seven steps, per optimizer; of the first replica."""
    results = {}
    decayed = {"weight_decay": 0.3, "epsilon": 1e-3}
    chosen: list[dict[str, Any]] = [{"name": "sgd", "momentum": 0.9}, {"name": "lion", "weight_decay": 0.3}]
    for settings in [*chosen, *({"name": n, **decayed} for n in ("adamw", "adagrad", "adadelta", "nadam"))]:
        with strategy.scope():
            network = SmallNetwork()
            optimizer = build_optimizer(Optimizer(**settings), make_schedule(name="time", decay=0.1), MULTIPLIERS)
        step = TrainingStep(strategy, network, network.variables, optimizer, StepSettings(seed=1))
        replicas = strategy.num_replicas_in_sync
        step.run(iter(strategy.distribute_datasets_from_function(lambda _: make_batches(20, 8, replicas))), 7, 0, 0)  # noqa: B023
        for variable in network.variables.values():
            first, *others = (v.numpy() for v in strategy.experimental_local_results(variable.value))
            assert all(np.array_equal(first, other) for other in others)
        values = variables.copy_values(network.variables | step.checkpoint_variables())
        results[str(settings["name"])] = {name: value.ravel().tolist() for name, value in values.items()}
    return results


TWO_REPLICAS = """
import json
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.training.test_optimizers import run_seven_steps
print("RESULT" + json.dumps(run_seven_steps(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))))
"""


@pytest.mark.slow
def test_two_replicas_with_multipliers_train_as_one() -> None:
    results = result_of(TWO_REPLICAS)
    for name, expected in run_seven_steps(tf.distribute.get_strategy()).items():
        assert_near(results[name], expected)


def test_the_positions_of_a_step_schedule_need_no_order() -> None:
    positions = ["1 epochs", "64 examples"]
    one, other = (make_schedule(name="step", decay=0.1, at=at) for at in (positions, positions[::-1]))
    assert [float(one(s)) for s in range(STEPS + 1)] == [float(other(s)) for s in range(STEPS + 1)]
