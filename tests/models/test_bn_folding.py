"""BatchNormalization folding: equal outputs and gradients, fewer operations."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import schema as config
from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.models.bn_folding import apply_folded, find_foldable_pairs, fold_weights
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import set_trainable_layers


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier(config.Model(backbone="MobileNetV2", alpha=0.35, weights="glyphs", image_size=48), 4, 1)


@pytest.fixture
def pixels() -> tf.Tensor:
    return tf.constant(np.random.default_rng(3).uniform(-1, 1, (3, 48, 48, 3)), tf.float32)


def build_network_of_every_kind(bias: bool = True) -> keras.Model:
    """A network with each kind of convolution before a BatchNormalization with random weights and averages."""
    inputs = x = keras.Input((9, 9, 4))
    for number, layer in enumerate([
        keras.layers.Conv2D(6, 3, strides=2, padding="same", use_bias=bias),
        keras.layers.DepthwiseConv2D(3, padding="valid", depth_multiplier=2, use_bias=bias),
        keras.layers.SeparableConv2D(5, 3, padding="same", use_bias=bias),
        keras.layers.Conv2D(8, 1, dilation_rate=1, groups=1, use_bias=bias),
    ]):  # fmt: skip
        x = BATCH_NORM_CLASS(scale=number != 1, center=number != 2, epsilon=1e-3)(layer(x))
        x = keras.layers.ReLU()(x)
    network = keras.Model(inputs, x)
    rng = np.random.default_rng(1)
    network.set_weights([rng.uniform(0.2, 1.5, w.shape) for w in network.get_weights()])
    return network


def list_operations(function: Any, *arguments: Any) -> set[str]:
    graph = tf.function(function).get_concrete_function(*arguments).graph
    return {operation.type for operation in graph.get_operations()}


@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_convolution_has_the_same_outputs(bias: bool) -> None:
    network, maps = build_network_of_every_kind(bias), tf.random.stateless_uniform([2, 9, 9, 4], [1, 2])
    assert len(find_foldable_pairs(network)) == 4
    folded = apply_folded(network, maps)
    np.testing.assert_allclose(folded, network(maps, training=False), rtol=1e-5)
    np.testing.assert_array_equal(apply_folded(network, maps, weights=fold_weights(network)), folded)


def test_no_operation_of_normalization_is_left(classifier: Classifier, pixels: tf.Tensor) -> None:
    backbone = classifier.backbone
    assert (
        len(find_foldable_pairs(backbone))
        == sum(isinstance(layer, BATCH_NORM_CLASS) for layer in backbone.layers)
        == 52
    )
    assert "Rsqrt" in list_operations(lambda x: backbone(x, training=False), pixels)
    weights = fold_weights(backbone)
    left = list_operations(lambda x: apply_folded(backbone, x, weights=weights), pixels)
    assert not {"Rsqrt", "Mul", "Sub"} & left
    assert "BiasAdd" in left


def test_the_gradients_are_those_of_the_layers(classifier: Classifier, pixels: tf.Tensor) -> None:
    plan = set_trainable_layers(classifier, "from_layer:100", "frozen")
    trained = [variable.value for name, variable in plan.trainable.items() if name.startswith("backbone/")]

    def gradients(forward: Any) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(forward(pixels)))
        return [gradient.numpy() for gradient in tape.gradient(loss, trained)]

    expected = gradients(lambda x: classifier.backbone(x, training=False))
    for mine, theirs in zip(gradients(lambda x: apply_folded(classifier.backbone, x)), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_trainable_layers_use_batch_statistics_and_update_their_averages() -> None:
    networks = [build_network_of_every_kind(), build_network_of_every_kind()]
    maps = tf.random.stateless_uniform([4, 9, 9, 4], [1, 2])
    for network in networks:
        network.layers[2].trainable = False  # the first BatchNormalization is frozen
    expected, outputs = networks[0](maps, training=True), apply_folded(networks[1], maps, training=True)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(networks[0].get_weights(), networks[1].get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    before = build_network_of_every_kind()
    moved = [not np.allclose(a, b) for a, b in zip(before.get_weights(), networks[1].get_weights(), strict=True)]
    assert sum(moved) == 6  # means and variances of the other three


def test_a_convolution_with_other_consumers_or_an_activation_is_not_folded() -> None:
    inputs = keras.Input((5, 5, 2))
    read_twice = keras.layers.Conv2D(3, 3, padding="same")(inputs)
    joined = keras.layers.Add()([BATCH_NORM_CLASS()(read_twice), read_twice])
    put_out = keras.layers.Conv2D(3, 1)(joined)
    curved = BATCH_NORM_CLASS()(keras.layers.Conv2D(3, 1, activation="relu")(put_out))
    network = keras.Model(inputs, [put_out, BATCH_NORM_CLASS()(put_out), curved])
    rng = np.random.default_rng(1)
    network.set_weights([rng.uniform(0.2, 1.5, w.shape) for w in network.get_weights()])
    assert find_foldable_pairs(network) == []
    maps = tf.random.stateless_uniform([2, 5, 5, 2], [1, 2])
    for mine, theirs in zip(apply_folded(network, maps), network(maps, training=False), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_the_inference_model_has_the_layers_of_keras(classifier: Classifier) -> None:
    (backbone,) = (layer for layer in classifier.build_keras_model().layers if isinstance(layer, keras.Model))
    assert sum(isinstance(layer, BATCH_NORM_CLASS) for layer in backbone.layers) == 52
