"""The cut of a classifier, and its tail, which learns from features what the whole learns from images."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import schema as config
from trainer.features.cut import Cut, Tail, Trunk, find_cut
from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.freezing import FreezingPlan, set_trainable_layers
from trainer.training import variables
from trainer.training.step import Network, StepSettings, TrainingStep

CLASSES, COUNT, BATCH, STEPS = 3, 22, 8, 5


def build(name: str = "MobileNetV2", size: int = 32, **changes: Any) -> Classifier:
    options: dict[str, Any] = {"backbone": name, "weights": "none", "image_size": size, "dropout": 0.3, "l2": 1e-3}
    if name.startswith("MobileNetV2"):
        options |= {"alpha": 0.35, "weights": "glyphs", "image_size": 48}
    return build_classifier(config.Model(**(options | changes)), CLASSES, 1)


@cache
def built(name: str, size: int) -> Classifier:
    """The classifier of `build`, the same object for equal arguments, whose weights no test changes.

    A test of a cut thaws anew what it needs.
    """
    keras.utils.clear_session()  # resets the counter of automatic layer names
    return build(name, size)


def make_photos(classifier: Classifier) -> tuple[np.ndarray, np.ndarray]:
    rng, size = np.random.default_rng(3), classifier.image_size
    labels = rng.integers(0, CLASSES, COUNT).astype(np.int32)
    images = rng.integers(0, 120, (COUNT, size, size, 3)) + labels[:, None, None, None] * 60
    return images.astype(np.uint8), labels


def freeze_and_cut(classifier: Classifier, thaw: str, batch_norm: str = "frozen") -> tuple[FreezingPlan, Cut | None]:
    plan = set_trainable_layers(classifier, thaw, batch_norm)
    return plan, find_cut(classifier)


@pytest.mark.parametrize(
    ("name", "size", "thaw", "number", "layer", "shape"),
    [
        ("MobileNetV2", 48, "none", 153, "out_relu", (1280,)),
        ("MobileNetV2", 48, "from_layer:100", 97, "block_10_project_BN", (3, 3, 32)),
        ("MobileNetV2", 48, "last_blocks:2", 133, "block_14_add", (2, 2, 56)),
        ("MobileNetV2", 48, "pattern:block_1_", 8, "expanded_conv_project_BN", (24, 24, 8)),
        ("VGG16", 32, "from_block:block5", 14, "block4_pool", (2, 2, 512)),
        ("MobileNet", 32, "percent:18", 69, "conv_dw_11_relu", (2, 2, 512)),
        pytest.param(
            "EfficientNetB0", 32, "percent:23", 175, "block6a_project_bn", (1, 1, 192), marks=pytest.mark.slow
        ),
        pytest.param("ResNet50", 32, "percent:22", 132, "conv4_block5_out", (2, 2, 1024), marks=pytest.mark.slow),
        pytest.param("InceptionV3", 75, "percent:9", 279, "mixed9", (1, 1, 2048), marks=pytest.mark.slow),
        pytest.param("Xception", 71, "percent:20", 105, "add_9", (5, 5, 728), marks=pytest.mark.slow),
        pytest.param("DenseNet121", 32, "percent:18", 347, "conv5_block5_concat", (1, 1, 672), marks=pytest.mark.slow),
        pytest.param("ConvNeXtTiny", 32, "last_blocks:2", 117, "add_15", (1, 1, 768), marks=pytest.mark.slow),
        pytest.param("NASNetMobile", 32, "percent:18", 2, "stem_bn1", (15, 15, 32), marks=pytest.mark.slow),
    ],
)
def test_the_deepest_cut(name: str, size: int, thaw: str, number: int, layer: str, shape: tuple[int, ...]) -> None:
    classifier = built(name, size)
    plan, cut = freeze_and_cut(classifier, thaw)
    assert (cut.layer_index, cut.layer, cut.shape) == (number, layer, shape)
    assert cut.pooled == (thaw == "none")
    names = [each.name for each in classifier.backbone.layers]
    assert names[cut.layer_index] == layer or layer not in names  # ConvNeXt adds without a layer
    assert not cut.variables.keys() & plan.trainable.keys()
    images, _ = make_photos(classifier)
    (features,) = Trunk(classifier, [cut]).features(images)
    assert features.shape[1:] == shape
    np.testing.assert_allclose(Tail(classifier, cut).logits(features), classifier.logits(images), atol=1e-5)


@pytest.mark.parametrize(
    ("thaw", "batch_norm", "layer"),
    [
        ("pattern:^block_1[34]_.*(BN|expand)$", "frozen", "block_12_add"),
        ("pattern:^block_1[34]_.*(BN|expand)$", "train", "block_12_add"),
        ("pattern:^block_9_project_BN$", "train", "block_8_add"),
    ],
)
def test_batch_norm_that_trains_is_above_the_cut(thaw: str, batch_norm: str, layer: str) -> None:
    _, cut = freeze_and_cut(built("MobileNetV2", 48), thaw, batch_norm)
    assert cut.layer == layer


@pytest.mark.parametrize(("name", "size"), [("MobileNetV2", 48), ("EfficientNetB0", 32)])
def test_without_frozen_layers_there_is_no_cut(name: str, size: int) -> None:
    assert freeze_and_cut(built(name, size), "all")[1] is None


def test_the_fingerprint_is_that_of_the_weights_below_the_cut() -> None:
    classifier = build()
    _, cut = freeze_and_cut(classifier, "from_layer:100")
    before = cut.compute_fingerprint()
    classifier.output.bias.assign_add([1.0, 0.0, 0.0])
    above, below = (classifier.variables[f"backbone/{n}/kernel"] for n in ("block_11_depthwise", "Conv1"))
    above.assign(above.value + 1)
    assert cut.compute_fingerprint() == before
    below.assign(below.value * 1.01)
    assert cut.compute_fingerprint() != before


def set_moving_averages(classifier: Classifier, images: np.ndarray) -> None:
    """Set the averages of BatchNormalization; without them the output of random layers vanishes."""
    set_trainable_layers(classifier, "all", "train")
    norms = [layer for layer in classifier.backbone.layers if isinstance(layer, BATCH_NORM_CLASS)]
    for layer in norms:
        layer.momentum, layer.usual = 0.0, layer.momentum
    classifier.features(images, batch_norm_training=True)
    for layer in norms:
        layer.momentum = layer.usual


def make_batches(images: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, tf.Tensor]]:
    """Epochs in index order; the last batch of each is padded with weight 0."""
    data = tf.data.Dataset.from_tensor_slices(
        {"image": images, "label": labels, "weight": np.ones(len(labels), np.float32), "index": np.arange(len(labels))}
    )
    padding = data.take(-len(labels) % BATCH).map(lambda row: {**row, "weight": 0.0})
    with_position = data.concatenate(padding).repeat().batch(BATCH, drop_remainder=True)
    return iter(with_position.map(lambda rows: {**rows, "position": tf.range(BATCH, dtype=tf.int64)}))


def compute_features(classifier: Classifier, cut: Cut, images: np.ndarray) -> np.ndarray:
    """Features computed in batches of a live step: random deep networks amplify rounding differences."""
    compute = tf.function(Trunk(classifier, [cut]).features)
    padded = np.pad(images, [(0, -COUNT % BATCH), (0, 0), (0, 0), (0, 0)])
    return np.concatenate([compute(part)[0] for part in np.split(padded, len(padded) // BATCH)])[:COUNT]


def train(plan: FreezingPlan, network: Network, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Losses of a few steps; the weights stay in the classifier."""
    settings = StepSettings(seed=3, batch_norm_training=plan.batch_norm_training, label_smoothing=0.1)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    step = TrainingStep(tf.distribute.get_strategy(), network, plan.trainable, optimizer, settings)
    rows, _, _ = step.run(make_batches(images, labels), STEPS, 0, 0)
    return rows


@pytest.mark.parametrize(
    ("name", "size", "thaw", "batch_norm"),
    [
        ("MobileNetV2", 48, "none", "frozen"),
        ("MobileNetV2", 48, "percent:20", "frozen"),
        ("MobileNetV2", 48, "last_blocks:2", "train"),
        pytest.param("MobileNetV2", 48, "from_layer:100", "frozen", marks=pytest.mark.slow),
        pytest.param("MobileNetV2", 48, "last_layers:30", "train", marks=pytest.mark.slow),
        pytest.param("MobileNetV2", 48, "from_block:block_14", "train", marks=pytest.mark.slow),
        pytest.param("MobileNetV2", 48, "pattern:block_(9|15)_project$", "frozen", marks=pytest.mark.slow),
        pytest.param("EfficientNetB0", 32, "last_blocks:2", "train", marks=pytest.mark.slow),
        pytest.param("ResNet50", 32, "percent:12", "frozen", marks=pytest.mark.slow),
        pytest.param("InceptionV3", 75, "percent:9", "frozen", marks=pytest.mark.slow),
        pytest.param("Xception", 71, "last_blocks:1", "train", marks=pytest.mark.slow),
        pytest.param("VGG16", 32, "from_block:block5", "frozen", marks=pytest.mark.slow),
        pytest.param("DenseNet121", 32, "percent:5", "train", marks=pytest.mark.slow),
        pytest.param("MobileNetV3Small", 32, "percent:18", "frozen", marks=pytest.mark.slow),
        pytest.param("ConvNeXtTiny", 32, "last_blocks:2", "frozen", marks=pytest.mark.slow),
        pytest.param("EfficientNetV2B0", 32, "none", "frozen", marks=pytest.mark.slow),
    ],
)
def test_a_tail_learns_from_features_what_the_whole_learns_from_images(
    name: str, size: int, thaw: str, batch_norm: str
) -> None:
    classifier = build(name, size, hidden=5)
    images, labels = make_photos(classifier)
    set_moving_averages(classifier, images)
    begin = variables.copy_values(classifier.variables)
    plan, cut = freeze_and_cut(classifier, thaw, batch_norm)
    live = train(plan, classifier, images, labels)
    expected = variables.copy_values(classifier.variables)
    variables.assign_values(classifier.variables, begin, "the beginning")
    cached = train(plan, Tail(classifier, cut), compute_features(classifier, cut, images), labels)
    trained = variables.copy_values(classifier.variables)
    np.testing.assert_allclose(cached, live, rtol=1e-4, atol=1e-4)
    moved = 0
    for key in expected:
        np.testing.assert_allclose(trained[key], expected[key], rtol=0, atol=1e-5, err_msg=key)
        moved += bool((expected[key] != begin[key]).any())
        if key in cut.variables:
            np.testing.assert_array_equal(trained[key], begin[key])
    assert moved >= len(plan.trainable) // 2


def test_one_trunk_serves_several_cuts() -> None:
    classifier = built("MobileNetV2", 48)
    images, _ = make_photos(classifier)
    cuts = [cut for thaw in ("none", "from_layer:100") if (cut := freeze_and_cut(classifier, thaw)[1])]
    together = Trunk(classifier, cuts).features(images)
    for cut, features in zip(cuts, together, strict=True):
        np.testing.assert_array_equal(features, Trunk(classifier, [cut]).features(images)[0])
