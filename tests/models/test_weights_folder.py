"""Folders of published weights: which file a network reads, and what is rejected."""

from pathlib import Path

import numpy as np
import pytest

from tests.errors import raises
from trainer.config.schema import Model
from trainer.errors import ConfigError, ModelError
from trainer.models.backbones import find_backbone, parse_backbones
from trainer.models.classifier import build_classifier
from trainer.models.weights_folder import locate_weights
from trainer.private_api import find_download


def test_backbones_are_named_with_their_alpha() -> None:
    chosen = [
        (spec.name, alpha) for spec, alpha in parse_backbones("[mobilenet_v2, mobilenet_v2:0.35,Xception]", "weights")
    ]
    assert chosen == [("MobileNetV2", None), ("MobileNetV2", 0.35), ("Xception", None)]
    assert [spec.name for spec, _ in parse_backbones("efficientnet_b0", "weights")] == ["EfficientNetB0"]


@pytest.mark.parametrize(
    ("text", "value", "problem", "fix"),
    [
        ("[]", "[]", "names no backbone", "weights=.mobilenet_v2"),
        ("[mobilenet_v7]", "mobilenet_v7", "is not a known backbone", "MobileNetV"),
        ("[mobilenet_v2:wide]", "mobilenet_v2:wide", "alpha that is not a number", "mobilenet_v2:0.35"),
        ("[xception:0.5]", "xception:0.5", "Xception takes no alpha", "write xception"),
    ],
)
def test_other_names_are_rejected(text: str, value: str, problem: str, fix: str) -> None:
    with raises(ConfigError, "weights", value, fix, problem):
        parse_backbones(text, "weights")


@pytest.mark.parametrize(
    ("name", "sizes"), [("MobileNet", (96, 128, 224)), ("MobileNetV2", (96, 150, 160, 224)), ("Xception", (71, 299))]
)
def test_image_sizes_have_the_same_file_if_they_have_for_keras(name: str, sizes: tuple[int, ...]) -> None:
    spec = find_backbone(name)
    alpha = 0.5 if spec.takes_alpha else None
    files: dict[str, set[str]] = {}
    for size in sizes:
        download = find_download(lambda size=size: spec.build(size, alpha, "imagenet"))
        assert download is not None
        files.setdefault(download[0], set()).add(spec.name_weights_file(size, alpha))
    assert [len(ours) for ours in files.values()] == [1] * len(files)
    assert len(set.union(*files.values())) == len(files)
    assert spec.name_weights_file(224, 1.0) == spec.name_weights_file(224, None)


def test_a_network_reads_its_own_file_of_a_folder(tmp_path: Path) -> None:
    model = Model(backbone="mobilenet_v2", alpha=0.35, image_size=40, weights="none")
    source = build_classifier(model, 2, 1).backbone
    source.save_weights(tmp_path / "MobileNetV2_0.35_224.weights.h5")
    for folder in (str(tmp_path), f"{tmp_path}/"):
        loaded = build_classifier(model.model_copy(update={"weights": folder}), 2, 2).backbone
        for ours, theirs in zip(loaded.weights, source.weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    missing = model.model_copy(update={"weights": str(tmp_path), "alpha": 0.5})
    fix = r"trainer.prepare weights=\[MobileNetV2:0.5\] output=.*imagenet, glyphs, none"
    with raises(ModelError, "model.weights", tmp_path, fix, "without MobileNetV2_0.5_224.weights.h5, .* alpha 0.5"):
        build_classifier(missing, 2, 1)


def test_only_a_folder_in_a_bucket_is_replaced_by_its_file(tmp_path: Path) -> None:
    for weights in ("imagenet", "glyphs", "none", str(tmp_path), "gs://bucket/x.weights.h5"):
        model = Model(backbone="MobileNetV2", weights=weights)
        assert locate_weights(model) is model
    auto = Model(backbone="auto", weights="gs://bucket/weights")
    assert locate_weights(auto) is auto
    with pytest.raises(ValueError, match="of a single one"):
        Model(backbone="auto", weights="gs://bucket/x.weights.h5")
