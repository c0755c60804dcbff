"""What a comparison computes, from its arguments."""

from typing import Any

import pytest

from tests.config.test_schema import ROWS, tree
from tests.errors import raises
from trainer.backbones.candidates import (
    ComparisonConfig,
    configure_comparison,
    find_image_size,
    parse_candidates,
    parse_folds,
)
from trainer.config.phases import AutoPhases
from trainer.config.schema import validate_config
from trainer.errors import ConfigError


def choose(among: str, given: set[str] | None = None, **changes: Any) -> ComparisonConfig:
    return configure_comparison(validate_config(tree(**changes)), parse_candidates(among), given or set())


def test_networks_have_their_own_size_and_the_weights_of_all_or_their_own() -> None:
    settings = {"model__image_size": 48, "model__weights": "glyphs"}  # those of the composed network
    models = choose("[mobilenet_v2:0.35@none, Xception, mobilenet_v2]", **settings).models
    assert {name: (m.weights, m.alpha, find_image_size(m)) for name, m in models.items()} == {
        "MobileNetV2 0.35": ("none", 0.35, 224),
        "Xception": ("imagenet", None, 299),
        "MobileNetV2": ("imagenet", None, 224),
    }
    given = {"model.image_size", "model.weights"}
    models = choose("mobilenet_v2", given, model__image_size=96, model__weights="/weights").models
    assert [(m.weights, m.image_size) for m in models.values()] == [("/weights", 96)]


def test_a_network_with_several_weights_is_named_by_them() -> None:
    assert list(choose("mobilenet,mobilenet@none").models) == ["MobileNet", "MobileNet@none"]
    files = "mobilenet@a/x.weights.h5,mobilenet@b/x.weights.h5,mobilenet@b/"
    assert list(choose(files).models) == ["MobileNet@x.weights.h5", "MobileNet@b/x.weights.h5", "MobileNet@b"]


@pytest.mark.parametrize(
    ("text", "value", "fix"),
    [
        ("[]", "[]", "among="),
        ("mobilnet", "mobilnet", "did you mean MobileNet"),
        ("vgg16:0.5", "vgg16:0.5", "write vgg16"),
        ("vgg16@", "vgg16@", "vgg16@none"),
        ("vgg16,VGG-16", "VGG-16", "each network once"),
        ("mobilenet_v2,mobilenet_v2:1.0", "mobilenet_v2:1.0", "each network once"),
        ("<script>", "<script>", "use one of|did you mean"),
    ],
)
def test_a_list_that_cannot_be_read_is_rejected(text: str, value: str, fix: str) -> None:
    with raises(ConfigError, key="among", value=value, fix=fix):
        parse_candidates(text)


@pytest.mark.parametrize("text", ["0", "-1", "five", "2.5", "", "101", "٣"])
def test_a_number_of_folds_that_is_none_is_rejected(text: str) -> None:
    with raises(ConfigError, key="folds", value=text):
        parse_folds(text)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("model", "among"),
        ("model.alpha", "among"),
        ("augmentation", "features"),
        ("augmentation.zoom", "features"),
        ("output_dir", "features"),
        ("debug.overfit", "features"),
        ("phases.head.early_stopping.patience", "head is trained for its whole length"),
        ("phases.fine_tune.epochs", "only head is trained"),
    ],
)
def test_arguments_that_a_comparison_does_not_read_are_rejected(key: str, reason: str) -> None:
    with raises(ConfigError, key=key, problem=f"has no effect in a comparison: .*{reason}", fix="remove it"):
        choose("vgg16", {key}, phases__fine_tune={"thaw": "all", "epochs": 1})


def test_the_first_phase_of_the_head_alone_is_trained_without_early_stopping() -> None:
    phases = {
        "first": {"thaw": "all", "epochs": 1},
        "second": {"thaw": "none", "epochs": 7, "early_stopping": {"patience": 2}},
    }
    chosen = configure_comparison(validate_config({**tree(), "phases": phases}), parse_candidates("vgg16"), set())
    assert chosen.head_phase == "second"
    assert not isinstance(chosen.common.phases, AutoPhases)
    (phase,) = chosen.common.phases.values()
    assert (phase.epochs, phase.early_stopping.patience, phase.features) == (7, 0, "cached")
    with raises(ConfigError, key="phases", fix="head_only"):
        configure_comparison(
            validate_config({**tree(), "phases": {"all": phases["first"]}}), parse_candidates("vgg16"), set()
        )
    with raises(ConfigError, key="phases", value="auto", fix="head_only"):
        configure_comparison(validate_config({**tree(), "phases": {"auto": ROWS}}), parse_candidates("vgg16"), set())


def test_a_size_that_a_network_cannot_have_is_rejected_before_anything_is_computed() -> None:
    with raises(ConfigError, key="model.image_size", value=60, problem="Xception", fix="at least 71"):
        choose("vgg16,xception", {"model.image_size"}, model__image_size=60)
