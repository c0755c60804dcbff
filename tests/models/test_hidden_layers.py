"""Hidden layers of the head: names, values, and BatchNormalization in training steps of any division of the batch."""

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.config.test_schema import tree
from tests.errors import raises
from tests.models.test_classifier import build, get_built, make_images
from tests.processes import result_of
from tests.training.small_network import assert_near
from trainer.cluster.devices import check_batch_size
from trainer.config.schema import validate_config, validate_resolved_config
from trainer.config.unread import find_unread_keys
from trainer.errors import ConfigError
from trainer.exporting.bundle import as_plain_float32
from trainer.features.cut import Tail, Trunk, find_cut
from trainer.features.plan import divide_phases
from trainer.models.freezing import set_trainable_layers
from trainer.training import variables
from trainer.training.step import StepSettings, TrainingStep

NORMALIZED = {"hidden": [6, 5], "hidden_batch_norm": True}


def test_a_list_of_one_layer_is_the_layer_and_others_have_names_and_seeds_of_their_own() -> None:
    one, listed, two = get_built(hidden=7), build(hidden=[7]), build(hidden=[7, 7, 4])
    values = variables.copy_values(one.variables)
    assert_near(variables.copy_values(listed.variables), values, atol=0)
    names = [f"head/{x}/{y}" for x in ("hidden", "hidden_2", "hidden_3", "output") for y in ("kernel", "bias")]
    assert list(two.head_variables) == names
    shapes = [tuple(v.shape) for name, v in two.head_variables.items() if name.endswith("kernel")]
    assert shapes == [(1280, 7), (7, 7), (7, 4), (4, 3)]
    np.testing.assert_array_equal(two.hidden[0].dense.kernel, one.hidden[0].dense.kernel)
    kernels = [two.hidden[1].dense.kernel.numpy(), build(seed=2, hidden=[7, 7]).hidden[0].dense.kernel.numpy()[:7]]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_the_values_of_hidden_layers_with_batch_norm() -> None:
    classifier = build(**NORMALIZED)
    rng = np.random.default_rng(1)
    for norm in classifier.head_normalizations:
        for variable in norm.weights:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    features = rng.normal(0, 1, (4, 1280)).astype(np.float32)

    def expected(statistics: Any) -> np.ndarray:
        x = features
        for hidden in classifier.hidden:
            assert hidden.norm is not None
            x = x @ hidden.dense.kernel.numpy() + hidden.dense.bias.numpy()
            mean, variance = statistics(x, hidden.norm)
            scaled = (x - mean) / np.sqrt(variance + hidden.norm.epsilon)
            x = np.maximum(scaled * hidden.norm.gamma.numpy() + hidden.norm.beta.numpy(), 0)
        return x @ classifier.output.kernel.numpy() + classifier.output.bias.numpy()

    moving = expected(lambda _, norm: (norm.moving_mean.numpy(), norm.moving_variance.numpy()))
    np.testing.assert_allclose(classifier.head_logits(features), moving, atol=1e-4)
    # The last example is padding.
    own = expected(lambda x, _: (x[:3].mean(0), x[:3].var(0)))
    logits = classifier.head_logits(features, training=True, weight=tf.constant([1.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(logits[:3], own[:3], atol=1e-4)


def test_the_moving_averages_of_the_head_are_neither_trained_nor_forgotten() -> None:
    classifier = get_built(hidden=(6, 5), hidden_batch_norm=True)
    plan = set_trainable_layers(classifier, "none", "frozen")
    weights = dict.fromkeys(("hidden", "hidden_2", "output"), ("kernel", "bias"))
    weights |= dict.fromkeys(("hidden_norm", "hidden_2_norm"), ("gamma", "beta"))
    assert sorted(plan.trainable) == sorted(f"head/{layer}/{n}" for layer, names in weights.items() for n in names)
    assert len(plan.groups["head, trains"]) == 10
    assert len(plan.groups["batch norm, moving averages"]) == 4
    assert not plan.batch_norm_training  # of the backbone
    config = validate_resolved_config(
        tree(model__hidden=[6, 5], model__hidden_batch_norm=True, phases__head__thaw="none")
    )
    division = next(iter(divide_phases(config, classifier).values()))
    assert "head/hidden_2_norm/moving_variance" in division.updated
    assert division.cut is not None
    assert division.cut.pooled


@cache
def examples() -> tuple[np.ndarray, np.ndarray]:
    """64 images and their labels, by which they differ in brightness."""
    labels = np.random.default_rng(3).integers(0, 3, 64).astype(np.int32)
    return (make_images(64, 48) // 2 + labels[:, None, None, None] * 40).astype(np.uint8), labels


@cache
def features() -> np.ndarray:
    """The features of these images, which do not depend on the head."""
    classifier = get_built(weights="glyphs", image_size=48)
    set_trainable_layers(classifier, "none", "frozen")
    cut = find_cut(classifier)
    assert cut is not None
    trunk = Trunk(classifier, [cut])
    return np.concatenate([np.asarray(trunk.features(batch)[0]) for batch in np.split(examples()[0], 4)])


def train(strategy: tf.distribute.Strategy, *, on_features: bool, **settings: Any) -> dict[str, list[float]]:
    """The variables of the head after four steps of 16 examples, three of which are padding in the second."""
    replicas, (images, labels) = strategy.num_replicas_in_sync, examples()
    batch, steps = 16, len(labels) // 16
    weight = np.ones(batch * steps, np.float32)
    weight[[17, 20, 31]] = 0.0
    weights = "none" if on_features else "glyphs"  # a tail has only the head
    with strategy.scope():
        classifier = build(**NORMALIZED, dropout=0.2, weights=weights, image_size=48)
        optimizer = keras.optimizers.SGD(0.05)
    thaw = set_trainable_layers(classifier, "none", "frozen")
    network: Any = classifier
    source: np.ndarray = images
    if on_features:
        cut = find_cut(classifier)
        assert cut is not None
        network, source = Tail(classifier, cut), features()
    values = {"image": source, "label": labels, "weight": weight, "index": np.arange(len(labels)),
              "position": np.tile(np.arange(batch), steps)}  # fmt: skip
    values = {n: v.reshape(steps * replicas, batch // replicas, *v.shape[1:]) for n, v in values.items()}
    batches = iter(strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.from_tensor_slices(values)))
    step = TrainingStep(strategy, network, thaw.trainable, optimizer, StepSettings(seed=1, **settings))
    step.run(batches, steps, 0, 0)
    return {n: v.ravel().tolist() for n, v in variables.copy_values(classifier.head_variables).items()}


def test_training_on_features_is_training_on_images_and_moves_the_averages() -> None:
    live, cached = (train(tf.distribute.get_strategy(), on_features=of) for of in (False, True))
    assert_near(cached, live, atol=1e-5)
    assert np.abs(np.array(live["head/hidden_norm/moving_mean"])).max() > 1e-3


def test_a_virtual_replica_normalizes_by_its_own_statistics_as_a_micro_batch_does() -> None:
    """Their moving averages are those of the whole batch, which is not what the micro-batches compute one by one."""
    strategy = tf.distribute.get_strategy()
    parts, micro = (
        train(strategy, on_features=True, **settings) for settings in ({"virtual_replicas": 4}, {"accumulate": 4})
    )
    weights = [name for name in parts if "moving" not in name]
    assert_near({n: parts[n] for n in weights}, {n: micro[n] for n in weights}, atol=1e-5)
    whole = train(strategy, on_features=True, virtual_replicas=1)
    assert np.abs(np.array(whole["head/output/kernel"]) - np.array(parts["head/output/kernel"])).max() > 1e-4


TWO_REPLICAS = """
import json
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.models.test_hidden_layers import train
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
print("RESULT" + json.dumps([train(strategy, on_features=True), train(strategy, on_features=True, virtual_replicas=4)]))
"""


@pytest.mark.slow
def test_two_replicas_normalize_as_one_and_with_virtual_replicas_with_the_same_bits() -> None:
    mirrored, virtual = result_of(TWO_REPLICAS)
    strategy = tf.distribute.get_strategy()
    assert_near(mirrored, train(strategy, on_features=True), atol=1e-5)
    assert virtual == train(strategy, on_features=True, virtual_replicas=4)


def test_a_keras_model_has_only_layers_of_keras() -> None:
    classifier, images = get_built(hidden=(6, 5), hidden_batch_norm=True), make_images(2).astype(np.float32)
    model = classifier.build_keras_model()
    with as_plain_float32(model):
        assert {type(layer).__module__.partition(".")[0] for layer in model.layers} == {"keras"}
        np.testing.assert_allclose(model(images), classifier.probabilities(images), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden": []}, "model.hidden"),
        ({"hidden": [0]}, "model.hidden"),
        ({"hidden": [1] * 9}, "model.hidden"),
        ({"hidden": "wide"}, "model.hidden"),
        ({"hidden": True}, "model.hidden"),
    ],
)
def test_hidden_layers_that_cannot_be_built_are_rejected(changes: dict[str, Any], key: str) -> None:
    with raises(ConfigError) as caught:
        validate_config(tree(**{f"model__{name}": value for name, value in changes.items()}))
    (error,) = caught.value.errors
    assert error.key == key


def test_batch_norm_without_hidden_layers_is_not_read_and_a_batch_of_one_cannot_be_normalized() -> None:
    assert "model.hidden_batch_norm" in find_unread_keys(validate_config(tree(model__hidden_batch_norm=True)))
    both = {"model__hidden": [4], "model__hidden_batch_norm": True}
    assert "model.hidden_batch_norm" not in find_unread_keys(validate_config(tree(**both)))
    for training in ({"batch_size": 1}, {"batch_size": 8, "virtual_replicas": 8}, {"batch_size": 8, "accumulate": 8}):
        with raises(ConfigError, key="model.hidden_batch_norm", value="true"):
            check_batch_size(validate_resolved_config(tree(**both, training=training)), 1)
    check_batch_size(validate_resolved_config(tree(**both, training={"batch_size": 8, "accumulate": 4})), 1)
