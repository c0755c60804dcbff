"""Compiled training step against Keras, and its settings."""

from pathlib import Path
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
from trainer.training import variables
from trainer.training.losses import cross_entropy
from trainer.training.step import TrainingStep


def train(
    steps: list[int], *, optimizer: Any = None, count: int = 20, batch: int = 8, l2: float = 0.0, **settings: Any
) -> tuple[dict[str, np.ndarray], np.ndarray, TrainingStep]:
    """Train a fresh network by calls of the given lengths."""
    network = SmallNetwork(l2=l2)
    step = make_step(network, optimizer or keras.optimizers.SGD(0.1, momentum=0.9), **settings)
    batches, done, rows = iter(make_batches(count, batch)), 0, []
    for length in steps:
        rows.append(step.run(batches, length, done, done)[0])
        done += length
    return variables.copy_values(network.variables), np.concatenate(rows), step


def train_with_keras(optimizer: Any, epochs: int) -> list[np.ndarray]:
    """Train with `fit` on the same data in the same order."""
    images, labels = make_arrays(20)
    model = compile_keras_model(SmallNetwork(), optimizer)
    model.fit(images.astype(np.float32), labels, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return [np.array(w) for w in model.get_weights()]


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.Adam(0.01),
        lambda: keras.optimizers.RMSprop(0.003),
        lambda: keras.optimizers.Adamax(0.01),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01),
    ],
)
def test_same_weights_as_keras_fit_with_an_uneven_last_batch(make: Any) -> None:
    ours, _, _ = train([9], optimizer=make())  # 20 examples in batches of 8: three steps per epoch
    for mine, other in zip(ours.values(), train_with_keras(make(), epochs=3), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-6)


def test_many_steps_in_one_call_are_bitwise_single_steps() -> None:
    one_call, rows, _ = train([7])
    single, single_rows, _ = train([1] * 7)
    np.testing.assert_equal(one_call, single)
    np.testing.assert_array_equal(rows, single_rows)
    assert rows[:3, 2].tolist() == [8, 8, 4]  # without padding


def test_stop_ends_the_call_after_the_step_and_the_next_call_continues() -> None:
    network, calls = SmallNetwork(), []
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    step = make_step(network, optimizer, should_stop=lambda: calls.append(1) or len(calls) == 3)
    batches = iter(make_batches(20, 8))
    rows, _, stopped = step.run(batches, 7, 0, 0)
    assert (len(rows), stopped) == (3, True)
    more, _, stopped = step.run(batches, 4, 3, 3)
    assert (len(more), stopped) == (4, False)
    unbroken, all_rows, _ = train([7])
    np.testing.assert_array_equal(np.concatenate([rows, more]), all_rows)
    np.testing.assert_equal(variables.copy_values(network.variables), unbroken)


def test_a_call_that_polls_once_has_the_same_bits() -> None:
    each, each_rows, _ = train([1, 6])
    once, once_rows, _ = train([1, 6], polls_each_step=False)
    np.testing.assert_equal(once, each)
    np.testing.assert_array_equal(once_rows, each_rows)


def test_a_call_that_polls_once_ends_after_the_first_step_and_the_next_call_continues() -> None:
    network, calls = SmallNetwork(), []
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    step = make_step(network, optimizer, should_stop=lambda: calls.append(1) or len(calls) == 2, polls_each_step=False)
    batches = iter(make_batches(20, 8))
    first, _, stopped = step.run(batches, 1, 0, 0)
    assert (len(first), stopped, len(calls)) == (1, False, 1)
    rows, _, stopped = step.run(batches, 7, 1, 1)
    assert (len(rows), stopped, len(calls)) == (1, True, 2)
    step._steps_per_call = 5
    more, _, stopped = step.run(batches, 5, 2, 2)
    assert (len(more), stopped, len(calls)) == (5, False, 3)
    unbroken, all_rows, _ = train([7])
    np.testing.assert_array_equal(np.concatenate([first, rows, more]), all_rows)
    np.testing.assert_equal(variables.copy_values(network.variables), unbroken)


def test_a_call_that_polls_once_is_divided_so_that_a_stop_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    step = make_step(
        SmallNetwork(), keras.optimizers.SGD(0.1), should_stop=lambda: calls.append(1) or False, polls_each_step=False
    )
    monkeypatch.setattr("trainer.training.step.CALL_SECONDS", 0.0)  # one step takes longer
    rows, _, _ = step.run(iter(make_batches(20, 8)), 4, 0, 0)
    assert (len(rows), len(calls)) == (4, 4)


ON_A_DEVICE = """
import json, sys
import numpy as np, tensorflow as tf, keras
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.experimental.enable_op_determinism()
from tests.training.small_network import SmallNetwork, make_step, make_batches
from trainer.data.pipeline import prefetch_to_device
from trainer.training import variables
out = []
for change in (lambda d: d, lambda d: prefetch_to_device(d, "CPU:1")):
    network = SmallNetwork()
    step = make_step(network, keras.optimizers.SGD(0.1, momentum=0.9), polls_each_step=False)
    batches = iter(change(make_batches(20, 8)))
    rows = np.concatenate([step.run(batches, n, 0, 0)[0] for n in (1, 6)])
    values = [v.ravel().tolist() for v in variables.copy_values(network.variables).values()]
    out.append([next(batches)["image"].device[-5:], rows.tolist(), values])
print("RESULT" + json.dumps(out))
"""


@pytest.mark.slow
def test_batches_that_are_copied_ahead_to_another_device_have_the_same_bits() -> None:
    """The CPU twin of the copies to a GPU, with two logical devices."""
    (device, *host), (other, *copied) = result_of(ON_A_DEVICE)
    assert (device, other) == ("CPU:0", "CPU:1")
    assert host == copied


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    whole, rows, _ = train([6], l2=0.01)
    accumulated, accumulated_rows, _ = train([6], l2=0.01, accumulate=4)
    assert_near(accumulated, whole)
    np.testing.assert_allclose(rows, accumulated_rows, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 4}, {"clip_norm": 1.0}, {"loss_scaling": True}])
def test_a_step_whose_images_are_all_skipped_changes_nothing(settings: dict[str, Any]) -> None:
    network = SmallNetwork()
    before = variables.copy_values(network.variables)
    step = make_step(network, keras.optimizers.SGD(0.1), **settings)
    skipped = make_batches(20, 8).map(lambda batch: {**batch, "weight": tf.zeros_like(batch["weight"])})
    rows, _, _ = step.run(iter(skipped), 2, 0, 0)
    np.testing.assert_array_equal(rows, np.zeros((2, 3)))
    np.testing.assert_equal(variables.copy_values(network.variables), before)
    if step.loss_scale:
        assert float(step.loss_scale[0]) == 2.0**15  # no overflow


def test_clipping_is_by_the_norm_of_the_global_gradient() -> None:
    before = variables.copy_values(SmallNetwork().variables)
    after, _, _ = train([1], optimizer=keras.optimizers.SGD(1.0), clip_norm=0.01)
    change = np.sqrt(sum(np.square(after[n] - before[n]).sum() for n in before))
    np.testing.assert_allclose(change, 0.01, rtol=1e-4)


def test_class_weights_multiply_the_loss_only() -> None:
    weights = (0.5, 2.0, 1.0)
    ours, rows, _ = train([1], optimizer=keras.optimizers.SGD(1.0), class_weights=weights)
    _, plain_rows, _ = train([1], optimizer=keras.optimizers.SGD(1.0))
    assert rows[0, 1:].tolist() == plain_rows[0, 1:].tolist()
    assert rows[0, 0] != plain_rows[0, 0]
    network = SmallNetwork()
    images, labels = (part[:8] for part in make_arrays(20))
    with tf.GradientTape() as tape:
        losses = cross_entropy(labels, network.logits(images)) * np.array(weights, np.float32)[labels]
        loss = tf.reduce_sum(losses) / 8
    gradient = tape.gradient(loss, network.second.bias.value)
    expected = variables.copy_values(network.variables)["second/bias"] - gradient.numpy()
    np.testing.assert_allclose(ours["second/bias"], expected, atol=1e-6)


def test_averages_of_the_weights_and_two_swaps() -> None:
    network = SmallNetwork()
    start = variables.copy_values(network.variables)
    step = make_step(network, keras.optimizers.SGD(0.1), ema=0.99)
    batches, expected = iter(make_batches(20, 8)), dict(start)
    for t in range(5):
        step.run(batches, 1, t, t)
        decay = min(0.99, (1 + t) / (10 + t))
        now = variables.copy_values(network.variables)
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
    assert step.averages is not None
    assert_near(variables.copy_values(step.averages.shadows), expected)
    step.averages.swap()
    assert_near(variables.copy_values(network.variables), expected)
    step.averages.swap()
    np.testing.assert_equal(variables.copy_values(network.variables), now)


def test_loss_scaling_changes_nothing_while_all_is_finite() -> None:
    plain, _, _ = train([5])
    scaled, _, step = train([5], loss_scaling=True)
    assert_near(scaled, plain)
    assert step.loss_scale is not None
    assert [float(v) for v in step.loss_scale] == [2.0**15, 5.0]


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    network = SmallNetwork()
    step = make_step(network, keras.optimizers.SGD(0.1), loss_scaling=True)
    assert step.loss_scale is not None
    step.loss_scale[0].assign(3e38)
    network.second.kernel.assign(network.second.kernel * 1000)  # gradients of the first layer beyond float32
    before = variables.copy_values(network.variables)
    step.run(iter(make_batches(20, 8)), 1, 0, 0)
    np.testing.assert_equal(variables.copy_values(network.variables), before)
    assert float(step.loss_scale[0]) == pytest.approx(1.5e38)
    assert float(step.loss_scale[1]) == 0


def test_xla_gives_the_same_weights() -> None:
    plain, rows, _ = train([4], l2=0.01, clip_norm=0.5)
    compiled, compiled_rows, _ = train([4], l2=0.01, clip_norm=0.5, xla=True)
    assert_near(compiled, plain)
    np.testing.assert_allclose(compiled_rows, rows, rtol=1e-5)


STORED = """
import json, os, sys
from pathlib import Path
os.environ["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={sys.argv[1]}"
import keras, tensorflow as tf
from tests.training.small_network import SmallNetwork, make_step, make_batches
for number in range(int(sys.argv[2])):  # functions that only some starts trace
    tf.function(lambda: tf.constant(number)).get_concrete_function()
network = SmallNetwork()
step = make_step(network, keras.optimizers.SGD(0.1), xla=True, phase=1)
step.run(iter(make_batches(20, 8)), 1, 0, 0)
print("RESULT" + json.dumps({file.name: file.stat().st_mtime_ns for file in Path(sys.argv[1]).iterdir()}))
"""


@pytest.mark.slow
def test_a_step_that_another_start_compiled_is_loaded(tmp_path: Path) -> None:
    first = result_of(STORED, tmp_path, 0)
    assert len(first) == 1
    assert result_of(STORED, tmp_path, 7) == first


MIRRORED = """
import json, sys
import numpy as np, tensorflow as tf, keras
replicas = int(sys.argv[1])
if replicas > 1:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
from tests.training.small_network import SmallNetwork, make_batches
from trainer.training import variables
from trainer.evaluation.scoring import Predictor
from trainer.training.step import StepSettings, TrainingStep
strategy = (tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)]) if replicas > 1
            else tf.distribute.get_strategy())
out = {}
for name, make in {"sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9), "adam": lambda: keras.optimizers.Adam(0.01)}.items():
    for extra in ({}, {"clip_norm": 0.05, "accumulate": 2, "ema": 0.9, "class_weights": (1.0, 2.0, 0.5)},
                  {"loss_scaling": True}):
        with strategy.scope():
            network = SmallNetwork(l2=0.01)
            optimizer = make()
        step = TrainingStep(strategy, network, network.variables, optimizer, StepSettings(seed=1, **extra))
        batches = iter(strategy.distribute_datasets_from_function(lambda _: make_batches(20, 8, replicas)))
        rows, _, _ = step.run(batches, 7, 0, 0)
        values = variables.copy_values(network.variables | step.checkpoint_variables())
        validation = strategy.distribute_datasets_from_function(lambda _: make_batches(20, 8, replicas))
        predicted = Predictor(strategy, network).predict(validation, 3)
        p, labels, index = predicted.probabilities, predicted.labels, predicted.indices
        out[f"{name}-{len(extra)}"] = [
            rows.tolist(), [v.ravel().tolist() for v in values.values()], p.tolist(), labels.tolist(), index.tolist()]
print("RESULT" + json.dumps(out))
"""


@pytest.mark.slow
def test_two_and_four_replicas_agree_with_one() -> None:
    results = {replicas: result_of(MIRRORED, replicas) for replicas in (1, 2, 4)}
    for replicas in (2, 4):
        for case, (rows, values, probabilities, labels, index) in results[1].items():
            other = results[replicas][case]
            np.testing.assert_allclose(other[0], rows, rtol=1e-5, err_msg=case)
            for mine, theirs in zip(values, other[1], strict=True):
                np.testing.assert_allclose(theirs, mine, atol=1e-5, err_msg=case)
            np.testing.assert_allclose(other[2], probabilities, atol=1e-5)
            assert other[3:] == [labels, index]
            assert index == list(range(20))
