"""Frozen layers computed by LiteRT: equal features to TensorFlow's, and the choice between the two."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.errors import raises
from tests.features.test_cut import BATCH, STEPS, build, freeze_and_cut, make_batches, make_photos
from tests.features.test_plan import make_config
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.config.schema import RunConfig
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData
from trainer.errors import ConfigError
from trainer.features.cut import Tail, Trunk
from trainer.features.litert import LiteRTClassifier, LiteRTTrunk
from trainer.features.plan import (
    LITERT_BACKBONES,
    MIN_LITERT_PIXELS,
    EngineChoice,
    InputKind,
    choose_features,
    divide_phases,
    plan_engines,
)
from trainer.models.classifier import Classifier, build_classifier
from trainer.training import variables
from trainer.training.step import Network, StepSettings, TrainingStep
from trainer.types import Dataset, Device, Split

CPU, GPU = Device(), Device("GPU", "NVIDIA H100", (9, 0), 80 << 30)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build()


@pytest.mark.parametrize(
    ("name", "size", "thaw"),
    [
        ("MobileNetV2", 48, "none"),
        ("MobileNetV2", 48, "from_layer:100"),
        *(
            pytest.param(name, 32, thaw, marks=pytest.mark.slow)
            for name in ("MobileNet", "MobileNetV3Small", "MobileNetV3Large", "EfficientNetB0", "EfficientNetV2B0",
                         "DenseNet121", "ResNet50", "ConvNeXtTiny")
            for thaw in ("none", "percent:18")
        ),
    ],
)  # fmt: skip
def test_features_are_those_of_tensorflow(name: str, size: int, thaw: str) -> None:
    classifier = build(name, size)
    images, _ = make_photos(classifier)
    _, cut = freeze_and_cut(classifier, thaw)
    (expected,) = Trunk(classifier, [cut]).features(images)
    (features,) = LiteRTTrunk(classifier, [cut], threads=2).features(images)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_features_of_an_image_depend_on_nothing_else(classifier: Classifier) -> None:
    """Neither on the other images of a call, the number of threads, the images' dtype, nor the other cuts."""
    images, _ = make_photos(classifier)
    cuts = [cut for thaw in ("none", "from_layer:100") if (cut := freeze_and_cut(classifier, thaw)[1])]
    both = LiteRTTrunk(classifier, cuts, threads=3).features(images)
    for cut, expected in zip(cuts, both, strict=True):
        alone = LiteRTTrunk(classifier, [cut], threads=1)
        np.testing.assert_array_equal(alone.features(images[::-1].astype(np.float32))[0], expected[::-1])
        np.testing.assert_array_equal(alone.features(images[3:4])[0], expected[3:4])
        assert alone.features(images[:0])[0].shape == (0, *cut.shape)


@pytest.mark.parametrize(("thaw", "batch_norm"), [("none", "frozen"), ("last_blocks:2", "train")])
def test_a_step_on_images_is_the_step_on_features(classifier: Classifier, thaw: str, batch_norm: str) -> None:
    """The same bits, since both have the features of LiteRT; the weights are near those of TensorFlow alone."""
    images, labels = make_photos(classifier)
    plan, cut = freeze_and_cut(classifier, thaw, batch_norm)
    begin = variables.copy_values(classifier.variables)
    trunk = LiteRTTrunk(classifier, [cut], threads=2)

    def train(network: Network, inputs: np.ndarray) -> dict[str, np.ndarray]:
        variables.assign_values(classifier.variables, begin, "the beginning")
        settings = StepSettings(seed=3, batch_norm_training=plan.batch_norm_training)
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        step = TrainingStep(tf.distribute.get_strategy(), network, plan.trainable, optimizer, settings)
        step.run(make_batches(inputs, labels), STEPS, 0, 0)
        trained = variables.copy_values(classifier.variables)
        variables.assign_values(classifier.variables, begin, "the beginning")
        return trained

    live = train(LiteRTClassifier(classifier, cut, trunk), images)
    cached = train(Tail(classifier, cut), trunk.features(images)[0])
    whole = train(classifier, images)
    for name, value in live.items():
        np.testing.assert_array_equal(value, cached[name], err_msg=name)
        np.testing.assert_allclose(value, whole[name], rtol=0, atol=1e-3, err_msg=name)
    assert any((live[name] != begin[name]).any() for name in plan.trainable)
    assert len(images) % BATCH  # the last batch of an epoch has padding


def plan_engine(configured: RunConfig, classifier: Classifier, device: Device = CPU, **options: Any) -> EngineChoice:
    """The choice for the head, with options `count` (training images), `size`, `xla` and `kind`."""
    options = {"count": 10_000, "size": 160, "xla": False, "kind": "live"} | options
    splits = {name: Split(name, np.zeros(n, np.int32)) for name, n in (("train", options["count"]), ("validation", 50))}
    divisions, kinds = divide_phases(configured, classifier), dict[str, InputKind](head=options["kind"])
    dataset = Dataset("x", ("a", "b"), splits, "")
    return plan_engines(configured, device, dataset, options["size"], divisions, {"head": options["xla"]}, kinds)[
        "head"
    ]


def configure_engine(value: str) -> dict[str, Any]:
    return {"runtime": {"trunk_engine": value}}


@pytest.mark.parametrize(
    ("changes", "options", "engine", "why"),
    [
        ({}, {}, "litert", "30,000 images to compute, and converting the layers pays from 3,907 on"),
        ({}, {"count": 1303}, "litert", "3,930 images"),  # of 131 batches of 10, in 3 epochs
        ({}, {"count": 1299}, "tensorflow", "3,900 images to compute, and converting the layers pays from 3,907 on"),
        ({}, {"size": 32}, "tensorflow", "converting the layers pays from 97,657 on"),
        ({}, {"kind": "validation"}, "litert", "30,000 images"),
        ({}, {"kind": "cached"}, "litert", "10,050 images"),
        ({}, {"kind": "cached", "count": 3000}, "tensorflow", "3,050 images"),
        (
            {"augmentation": {"zoom": 0.1}, "augmented_views": 2},
            {"kind": "cached", "count": 3000},
            "litert",
            "6,050 images",
        ),
        ({"thaw": "all"}, {}, "tensorflow", "there are none below the layers that train"),
        ({}, {"xla": True}, "tensorflow", "XLA, which compiles the step, cannot call LiteRT"),
        ({}, {"device": GPU}, "tensorflow", "LiteRT computes on CPUs only"),
        ({"runtime": {"precision": "bfloat16"}}, {}, "tensorflow", "LiteRT computes in float32, not in bfloat16"),
        (configure_engine("litert"), {"count": 1}, "litert", "as configured"),
        (configure_engine("tensorflow"), {}, "tensorflow", "as configured"),
    ],
)
def test_auto_uses_litert_where_it_is_faster(
    classifier: Classifier, changes: Any, options: Any, engine: str, why: str
) -> None:
    choice = plan_engine(make_config(**changes), classifier, **options)
    assert choice.engine == engine
    assert why in choice.reason


def test_a_network_that_litert_computes_no_faster_stays_with_tensorflow(classifier: Classifier) -> None:
    configured = make_config()
    resnet = configured.model_copy(update={"model": configured.model.model_copy(update={"backbone": "ResNet50"})})
    assert plan_engine(resnet, classifier) == EngineChoice("tensorflow", "as fast for ResNet50")
    assert not "ResNet50".startswith(LITERT_BACKBONES)
    assert MIN_LITERT_PIXELS == 100_000_000  # the figures above are of this limit


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"precision": "bfloat16"}, {}, "LiteRT computes in float32, not in bfloat16"),
        ({}, {"device": GPU}, "LiteRT computes on CPUs only"),
        ({}, {"xla": True}, "XLA, which compiles the step, cannot call LiteRT"),
    ],
)
def test_litert_is_rejected_where_it_cannot_compute(
    classifier: Classifier, changes: Any, options: Any, problem: str
) -> None:
    configured = make_config(runtime={"trunk_engine": "litert"} | changes)
    with raises(ConfigError, key="runtime.trunk_engine", value="litert", problem=problem, fix="use auto or tensorflow"):
        plan_engine(configured, classifier, **options)


@pytest.mark.parametrize(
    ("run_json", "engine"),
    [
        ({}, "litert"),
        ({"features": {"head": "live"}, "engines": {"head": "litert"}}, "litert"),
        ({"features": {"head": "live"}, "engines": {"head": "tensorflow"}}, "tensorflow"),
        ({"features": {"head": "live"}}, "tensorflow"),  # of a version without LiteRT
    ],
)
def test_a_run_that_resumes_has_the_engines_that_it_began_with(
    classifier: Classifier, run_json: dict[str, Any], engine: str
) -> None:
    configured = make_config(augmentation={"zoom": 0.1})
    splits = {name: Split(name, np.zeros(n, np.int32)) for name, n in (("train", 4_000), ("validation", 50))}
    images = ImageStore(
        OpenedData(Dataset("x", ("a", "b"), splits, ""), {}, None, "none"), configured, 160, lambda _: None
    )
    divisions = divide_phases(configured, classifier)
    control = ControlChannel(discover({}), {})
    plan = choose_features(control, images, divisions, CPU, {"head": False}, run_json)
    assert plan.engines == {"head": engine}
    assert plan.to_json()["engines"] == {"head": engine}


def test_the_weights_are_those_of_the_conversion() -> None:
    """A later change of the variables changes only what is converted after it."""
    other = build_classifier(make_config().model, 3, 5)
    images, _ = make_photos(other)
    _, cut = freeze_and_cut(other, "none")
    kernel = next(iter(cut.variables.values()))
    before = LiteRTTrunk(other, [cut], threads=1)
    kernel.assign(kernel.value * 1.5)
    after = LiteRTTrunk(other, [cut], threads=1)
    (expected,) = Trunk(other, [cut]).features(images)
    np.testing.assert_allclose(after.features(images)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (before.features(images)[0] != after.features(images)[0]).any()
