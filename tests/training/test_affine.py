"""`batch_norm: affine` trains what a plain TensorFlow loop trains with `training=False` and `trainable=True`."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.features.test_cut import set_moving_averages as set_averages
from trainer.config import schema as config
from trainer.features.cut import Tail, Trunk, find_cut
from trainer.models.backbones import BackboneSpec
from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import set_trainable_layers
from trainer.training import variables
from trainer.training.step import Network, StepSettings, TrainingStep

CLASSES, BATCH, STEPS = 3, 8, 20
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adam": lambda: keras.optimizers.Adam(1e-5),
    "sgd": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
}


def build_small() -> Classifier:
    """A classifier of three convolutions, each before a BatchNormalization, and a fourth after an addition."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((12, 12, 3))
    x = BATCH_NORM_CLASS(name="first_bn")(keras.layers.Conv2D(8, 3, strides=2, name="first")(inputs))
    x = added = keras.layers.ReLU(name="first_relu")(x)
    x = BATCH_NORM_CLASS(name="second_bn")(
        keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="second")(x)
    )
    x = keras.layers.ReLU(name="second_relu")(x)
    x = BATCH_NORM_CLASS(name="third_bn", scale=False)(keras.layers.Conv2D(8, 1, use_bias=False, name="third")(x))
    x = BATCH_NORM_CLASS(name="fourth_bn")(keras.layers.Add(name="add")([x, added]))
    network = keras.Model(inputs, keras.layers.ReLU(name="last_relu")(x))
    output = keras.layers.Dense(CLASSES)
    output.build((None, 8))
    spec = BackboneSpec("Small", "mobilenet_v2", 12, 12, r"^(second)")
    return Classifier(spec, network, (), output, pooling="avg", dropout=0.0, l2=0.0, image_size=12)


def build(backbone: str, size: int) -> Classifier:
    model = config.Model(backbone=backbone, weights="none", image_size=size, dropout=0.0)
    return build_classifier(model, CLASSES, 1)


def make_photos(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with a color per class, uint8 [STEPS, BATCH, size, size, 3], and their labels."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, (STEPS, BATCH)).astype(np.int32)
    images = rng.integers(0, 120, (STEPS, BATCH, size, size, 3)) + labels[..., None, None, None] * 60
    return images.astype(np.uint8), labels


def calibrate(classifier: Classifier, images: np.ndarray) -> None:
    """Give normalization the statistics of these images, and gamma and beta values other than 1 and 0."""
    set_averages(classifier, images)
    rng = np.random.default_rng(5)
    for layer in classifier.backbone.layers:
        for variable in layer.trainable_weights if isinstance(layer, BATCH_NORM_CLASS) else ():
            variable.assign(variable + rng.uniform(-0.1, 0.1, variable.shape))


def train_plainly(classifier: Classifier, first: int, optimizer: keras.optimizers.Optimizer) -> None:
    """Train the layers from `first` on, as a loop in TensorFlow without this package does."""
    network, output, preprocess = classifier.backbone, classifier.output, classifier.spec.preprocess
    for index, layer in enumerate(network.layers):
        layer.trainable = index >= first
        if isinstance(layer, BATCH_NORM_CLASS):
            layer.__class__ = BATCH_NORM_CLASS
    trained = network.trainable_weights + output.trainable_weights
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer.build(trained)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            maps = network(preprocess(tf.cast(images, tf.float32)), training=False)
            loss = loss_of(labels, output(tf.reduce_mean(tf.cast(maps, tf.float32), axis=[1, 2])))
        optimizer.apply(tape.gradient(loss, [variable.value for variable in trained]), trained)

    for images, labels in zip(*make_photos(classifier.image_size), strict=True):
        step(images, labels)


def make_batches(images: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, tf.Tensor]]:
    position = np.broadcast_to(np.arange(BATCH), (STEPS, BATCH))
    rows = {"image": images, "label": labels, "weight": np.ones((STEPS, BATCH), np.float32), "index": position,
            "position": position}  # fmt: skip
    return iter(tf.data.Dataset.from_tensor_slices(rows))


def train_here(network: Network, trained: dict[str, keras.Variable], images: np.ndarray, optimizer: Any) -> None:
    step = TrainingStep(tf.distribute.get_strategy(), network, trained, optimizer, StepSettings(seed=3))
    _, labels = make_photos(network.classifier.image_size if isinstance(network, Tail) else images.shape[2])
    step.run(make_batches(images, labels), STEPS, 0, 0)


def check_training(classifier: Classifier, first: int, optimizer: str) -> None:
    """After 20 steps all variables are those of a plain loop to 1e-6, on images and on cached features."""
    images, _ = make_photos(classifier.image_size)
    begin = variables.copy_values(classifier.variables)
    train_plainly(classifier, first, OPTIMIZERS[optimizer]())
    plain = variables.copy_values(classifier.variables)

    variables.assign_values(classifier.variables, begin, "the beginning")
    plan, cut = set_trainable_layers(classifier, f"from_layer:{first}", "affine"), find_cut(classifier)
    assert not plan.batch_norm_training
    assert cut is not None
    trunk = tf.function(Trunk(classifier, [cut]).features)
    features = np.stack([trunk(batch)[0] for batch in images])
    for network, inputs in ((classifier, images), (Tail(classifier, cut), features)):
        variables.assign_values(classifier.variables, begin, "the beginning")
        train_here(network, plan.trainable, inputs, OPTIMIZERS[optimizer]())
        trained = variables.copy_values(classifier.variables)
        for name, value in plain.items():
            np.testing.assert_allclose(trained[name], value, rtol=0, atol=1e-6, err_msg=name)
        moved = {name for name in begin if not np.array_equal(begin[name], trained[name])}
        assert moved <= set(plan.trainable)
        assert not any("moving" in name for name in moved)
        for kind in ("gamma", "beta"):
            assert any(name.endswith(f"/{kind}") for name in moved), kind


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_small_network_trains_as_in_a_plain_loop(optimizer: str) -> None:
    classifier = build_small()
    calibrate(classifier, make_photos(12)[0][0])
    check_training(classifier, 4, optimizer)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("backbone", "size", "first"),
    [("MobileNetV2", 64, 100), ("EfficientNetB0", 64, 189), ("Xception", 71, 100), ("ResNet50", 64, 143)],
)
def test_a_backbone_trains_as_in_a_plain_loop(backbone: str, size: int, first: int) -> None:
    """In float64, where rounding can neither hide nor make a difference of 1e-6.

    The folded and the plain form are equal in exact arithmetic. In float32 a deep network with random weights amplifies
    the rounding of the folded frozen layers to 5e-5, and Adam divides rounding errors by one another; hence also SGD.
    """
    single = build(backbone, size)
    calibrate(single, make_photos(size)[0][:4].reshape(-1, size, size, 3))
    values = variables.copy_values(single.variables)
    keras.config.set_dtype_policy("float64")
    try:
        classifier = build(backbone, size)
        for name, variable in classifier.variables.items():
            variable.assign(values[name])
        check_training(classifier, first, "sgd")
    finally:
        keras.config.set_dtype_policy("float32")


def test_only_a_training_step_computes_trained_normalization_as_layers() -> None:
    """Scoring folds it into the convolution, where the result is the same up to rounding."""
    classifier = build_small()
    images, _ = make_photos(12)
    calibrate(classifier, images[0])
    plan = set_trainable_layers(classifier, "from_layer:4", "affine")
    counts = []
    for training in (True, False):
        logits = tf.function(lambda x, training=training: classifier.logits(x, training=training))
        graph = logits.get_concrete_function(tf.constant(images[0])).graph
        counts.append(sum("batchnorm/mul" in op.name and op.type == "Mul" for op in graph.get_operations()))
    assert counts[0] > counts[1]
    np.testing.assert_allclose(classifier.logits(images[0], training=True), classifier.logits(images[0]), atol=1e-5)
    assert {name.split("/")[1] for name in plan.trainable if name.endswith("beta")} == {
        "second_bn", "third_bn", "fourth_bn"}  # fmt: skip
