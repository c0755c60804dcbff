"""The registry of backbones against keras.applications."""

import re
from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml

from tests.errors import raises
from trainer.cli.compose import compose, find_conf_folder
from trainer.config import schema as config
from trainer.errors import ModelError
from trainer.models.backbones import find_backbone, get_backbones
from trainer.models.classifier import build_classifier
from trainer.models.freezing import set_trainable_layers

ALL = [backbone.name for backbone in get_backbones().values()]


def test_the_registry_holds_every_network_of_keras_applications() -> None:
    public = {name for name in dir(keras.applications) if name[0].isupper()}
    assert sorted(ALL) == sorted(public)


@pytest.mark.parametrize("name", ALL)
def test_names_sizes_and_alpha_are_those_of_keras(name: str) -> None:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    assert find_backbone(snake) is find_backbone(name.upper()) is find_backbone(name)
    backbone, make = find_backbone(name), getattr(keras.applications, name)
    with pytest.raises(ValueError, match=rf"at least {backbone.min_size}x{backbone.min_size}"):
        make(weights=None, include_top=False, input_shape=(8, 8, 3))
    size = backbone.default_size
    if backbone.module != "mobilenet_v3":  # accepts any size with the weights of 224
        with pytest.raises(ValueError, match=rf"should be \({size}, {size}, 3\)"):  # raised before the download
            make(weights="imagenet", include_top=True, input_shape=(size - 1, size - 1, 3))
    assert backbone.takes_alpha == ("alpha" in make.__code__.co_varnames[: make.__code__.co_argcount])
    assert make.__module__.endswith("." + backbone.module)


PREPROCESSING = {
    "tf": lambda x: x / 127.5 - 1,
    "caffe": lambda x: x[..., ::-1] - np.array([103.939, 116.779, 123.68]),
    "torch": lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "identity": lambda x: x,
}
MODES = {
    "tf": ["MobileNetV2", "Xception", "InceptionV3", "MobileNet", "ResNet50V2"],
    "caffe": ["ResNet50", "VGG16"],
    "torch": ["DenseNet121"],
    "identity": ["EfficientNetB0", "EfficientNetB7", "EfficientNetV2S", "MobileNetV3Small", "ConvNeXtTiny"],
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for mode, names in MODES.items() for name in names])
def test_preprocessing_in_the_graph_is_keras_own(name: str, mode: str) -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 5, 5, 3)).astype("float32")
    backbone = find_backbone(name)
    ours = tf.function(backbone.preprocess)(tf.constant(pixels)).numpy()
    theirs = getattr(keras.applications, backbone.module).preprocess_input(pixels.copy())
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(ours, PREPROCESSING[mode](pixels), rtol=1e-5, atol=1e-4)


GROUPS = sorted((find_conf_folder() / "model").glob("*.yaml"))
QUICK = ("mobilenet", "mobilenet_v2", "vgg16", "efficientnet_b0")


def test_the_configuration_groups_have_these_backbones() -> None:
    named = {path.stem: yaml.safe_load(path.read_text())["backbone"] for path in GROUPS}
    assert named == {
        "auto": "auto",
        "efficientnet_b0": "EfficientNetB0",
        "efficientnet_b3": "EfficientNetB3",
        "efficientnet_b4": "EfficientNetB4",
        "efficientnet_b7": "EfficientNetB7",
        "glyphs_mobilenet_v2": "MobileNetV2",
        "inception_v3": "InceptionV3",
        "mobilenet": "MobileNet",
        "mobilenet_v2": "MobileNetV2",
        "resnet50": "ResNet50",
        "vgg16": "VGG16",
        "xception": "Xception",
    }
    for path in GROUPS:
        if (size := re.search(r"(\d+) pixels, its own size", path.read_text())) is not None:
            assert int(size[1]) == find_backbone(named[path.stem]).default_size, path.stem


@cache
def load_phases(group: str) -> list[config.Phase]:
    """The phases of a group of the configuration."""
    tree = compose([f"phases={group}", "data=digits"])
    assert tree is not None
    return list(config.validate_config(tree).phases.values())


@pytest.mark.parametrize(
    "group", [p.stem if p.stem in QUICK else pytest.param(p.stem, marks=pytest.mark.slow)
              for p in GROUPS if p.stem not in ("auto", "glyphs_mobilenet_v2")]
)  # fmt: skip
def test_a_group_builds_applies_its_preprocessing_and_thaws_by_blocks(group: str) -> None:
    model = config.Model(**yaml.safe_load((find_conf_folder() / "model" / f"{group}.yaml").read_text()))
    kind = find_backbone(model.backbone)
    small = max(kind.min_size, 32)
    classifier = build_classifier(model.model_copy(update={"weights": "none", "image_size": small}), 3, seed=1)
    images = np.random.default_rng(0).integers(0, 256, (2, small, small, 3)).astype("uint8")
    prepared = getattr(keras.applications, kind.module).preprocess_input(images.astype("float32"))
    expected = np.asarray(classifier.backbone(prepared, training=False))
    np.testing.assert_allclose(  # rounding is relative to the largest values that were added up
        classifier.features(images), expected, rtol=1e-4, atol=1e-5 * max(np.abs(expected).max(), 1)
    )
    for phases in ("two_phase", "progressive", "progressive_blocks", "end_to_end", "head_only"):
        plans = [set_trainable_layers(classifier, p.thaw, p.batch_norm, layer_decay=0.9) for p in load_phases(phases)]
        counts = [len(plan.trainable) for plan in plans]
        assert counts == sorted(set(counts)), phases  # each phase trains more than the one before
        assert all(len(plan.lr_multipliers) in (0, len(plan.trainable)) for plan in plans)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("mobilnet_v2", r"did you mean MobileNetV2\?"), ("???", "MobileNet, .*ConvNeXtXLarge")],
)
def test_an_unknown_name_is_rejected_with_the_closest_or_all(name: str, fix: str) -> None:
    with raises(ModelError, "model.backbone", name, fix):
        find_backbone(name)


def test_an_alpha_or_a_size_that_the_network_does_not_have_is_rejected() -> None:
    with raises(ModelError, "model.alpha", 0.5, r"only MobileNet, MobileNetV2", "VGG16"):
        find_backbone("vgg16").build(48, 0.5, None)
    with raises(ModelError, "model.image_size", 70, "at least 71", r"Xception \(ImageNet weights: 299 px\)"):
        find_backbone("xception").build(70, None, None)


@pytest.mark.parametrize(
    ("name", "block", "first_layer", "index"),
    [
        ("MobileNet", "block_13", "conv_dw_13", 80),
        ("MobileNetV2", "block_13", "block_13_expand", 116),
        ("MobileNetV3Small", "expanded_conv_10", "expanded_conv_10_expand", 139),
        ("VGG16", "block5", "block5_conv1", 15),
    ],
)
def test_blocks_begin_where_their_layers_do(name: str, block: str, first_layer: str, index: int) -> None:
    backbone = find_backbone(name)
    names = [layer.name for layer in backbone.build(32, None, None).layers]
    starts = backbone.find_block_starts(names)
    assert (starts[block], names[index]) == (index, first_layer)
    assert list(starts.values()) == sorted(starts.values())


@pytest.mark.parametrize(
    ("name", "layer", "block"),
    [
        ("ResNet50", "conv5_block3_1_conv", "conv5_block3"),
        ("ResNet50", "conv1_conv", None),
        ("DenseNet121", "conv5_block16_concat", "conv5_block16"),
        ("EfficientNetB0", "block7a_expand_conv", "block7a"),
        ("EfficientNetV2S", "top_conv", None),
        ("Xception", "block14_sepconv1", "block14"),
        ("ConvNeXtTiny", "convnext_tiny_stage_3_block_2_layer_scale", "stage_3_block_2"),
        ("InceptionResNetV2", "block8_10_conv", "block8_10"),
        ("NASNetMobile", "separable_conv_1_bn_normal_left5_12", "cell_12"),
        ("NASNetMobile", "reduction_conv_1_stem_1", "cell_stem_1"),
        ("NASNetMobile", "adjust_conv_projection_reduce_4", "cell_reduce_4"),
    ],
)
def test_block_of_a_layer(name: str, layer: str, block: str | None) -> None:
    assert find_backbone(name).find_block(layer) == block


def test_blocks_of_anonymous_layers_begin_after_the_block_before() -> None:
    inception = find_backbone("InceptionV3")
    names = [layer.name for layer in inception.build(75, None, None).layers]
    starts = inception.find_block_starts(names)
    assert list(starts) == [f"mixed{n}" for n in range(11)]
    ends = ["max_pooling2d_1", *(f"mixed{n}" for n in range(10))]
    assert [names[first - 1] for first in starts.values()] == ends
    assert names[1] == "conv2d"  # not conv2d_17


def test_names_of_anonymous_layers_do_not_depend_on_earlier_networks() -> None:
    xception = find_backbone("Xception")
    first, second = ([layer.name for layer in xception.build(71, None, None).layers[1:]] for _ in range(2))
    assert first == second
    assert "conv2d" in first
    assert len(set(first)) == len(first)
