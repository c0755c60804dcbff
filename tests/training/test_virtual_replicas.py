"""With virtual replicas the bits of training do not depend on the number of replicas."""

import json
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.processes import run_python
from tests.training.small_network import SmallNetwork, assert_near, make_batches, make_step
from trainer.training import variables
from trainer.training.step import _add_in_tree


def train(steps: int, *, network: SmallNetwork | None = None, **settings: Any) -> tuple[Any, np.ndarray]:
    network = network or SmallNetwork(l2=0.01)
    step = make_step(network, keras.optimizers.SGD(0.1, momentum=0.9), **settings)
    rows, _, _ = step.run(iter(make_batches(20, 8)), steps, 0, 0)
    return variables.copy_values(network.variables), rows


def test_a_sum_in_a_tree() -> None:
    rows = np.array([1e8, 1, -1e8, 1], np.float32)[:, None]
    expected = (rows[0] + rows[1]) + (rows[2] + rows[3])
    np.testing.assert_array_equal(_add_in_tree(tf.constant(rows)), expected)


@cache
def train_cached(settings: tuple[tuple[str, Any], ...]) -> tuple[Any, np.ndarray]:
    return train(6, **dict(settings))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.05, "ema": 0.9}, {"loss_scaling": True}])
def test_the_gradient_is_that_of_the_whole_batch(parts: int, settings: dict[str, Any]) -> None:
    whole, rows = train_cached(tuple(settings.items()))
    divided, divided_rows = train(6, virtual_replicas=parts, **settings)
    assert_near(divided, whole)
    np.testing.assert_allclose(divided_rows, rows, rtol=1e-5)


# Every pair of two of the columns, optimizer, normalization and input, is among the cases.
PROGRAM = """
import itertools, json, sys
import keras, numpy as np, tensorflow as tf
replicas, parts = int(sys.argv[1]), 8
if replicas > 1:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
tf.config.experimental.enable_op_determinism()
from tests.training.test_affine import make_photos, build_small
from trainer.features.cut import Tail, Trunk, find_cut
from trainer.models.freezing import set_trainable_layers
from trainer.training import variables
from trainer.training.step import StepSettings, TrainingStep
strategy = (tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)]) if replicas > 1
            else tf.distribute.get_strategy())
optimizers = {"sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9), "adam": lambda: keras.optimizers.Adam(0.01),
              "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01)}
norms, inputs = ["frozen", "affine", "train"], ["live", "features", "mixup"]
extras = [{}, {"clip_norm": 0.05, "ema": 0.9, "class_weights": (1.0, 2.0, 0.5)}, {"loss_scaling": True}]
batch, steps = 16, 5
images, labels = make_photos(12)
images, labels = images.reshape(-1, 12, 12, 3)[: batch * steps], labels.reshape(-1)[: batch * steps]
weight = np.ones(batch * steps, np.float32)
weight[-batch - 5 : -batch] = 0.0  # padding, of whole parts too
weight[3] = 0.0  # an image that could not be read

out = {}
for number, (norm, kind) in enumerate(itertools.product(norms, inputs)):
    optimizer, extra = list(optimizers)[(number + number // 3) % 3], extras[number % 3]
    with strategy.scope():
        classifier = build_small()
    thaw = set_trainable_layers(classifier, "last_layers:5" if kind == "features" else "all", norm)
    network, source = classifier, images
    if kind == "features":
        cut = find_cut(classifier)
        network = Tail(classifier, cut)
        trunk = Trunk(classifier, [cut])
        source = np.concatenate([np.asarray(trunk.features(images[i : i + 16])[0]) for i in range(0, len(images), 16)])
    values = {"image": source, "label": labels, "weight": weight, "index": np.arange(len(labels)),
              "position": np.tile(np.arange(batch), steps)}
    if kind == "mixup":
        rng = np.random.default_rng(1)
        values |= {"other_label": labels[::-1].copy(), "mix": rng.uniform(0, 1, len(labels)).astype(np.float32)}
    values = {n: v.reshape(steps * replicas, batch // replicas, *v.shape[1:]) for n, v in values.items()}
    batches = iter(strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.from_tensor_slices(values)))
    settings = StepSettings(seed=1, virtual_replicas=parts, batch_norm_training=thaw.batch_norm_training, **extra)
    with strategy.scope():
        made = optimizers[optimizer]()
    step = TrainingStep(strategy, network, thaw.trainable, made, settings)
    rows, _, _ = step.run(batches, steps, 0, 0)
    ends = variables.copy_values(classifier.variables | step.checkpoint_variables())
    digest = {name: np.asarray(value).tobytes().hex() for name, value in ends.items()}
    out[f"{optimizer} {norm} {kind}"] = [rows.astype(float).tolist(), digest]
print("RESULT" + json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_two_four_and_eight_replicas_end_with_the_same_bits() -> None:
    outputs = [run_python(PROGRAM, replicas, timeout=600).stdout for replicas in (1, 2, 4, 8)]
    one, *others = (json.loads(output.split("RESULT")[1]) for output in outputs)
    assert len(one) == 9
    for other in others:
        for case, (rows, variables_) in one.items():
            assert np.isfinite(rows).all(), case
            assert other[case][0] == rows, case
            differ = [name for name, value in variables_.items() if other[case][1][name] != value]
            assert not differ, (case, differ)
