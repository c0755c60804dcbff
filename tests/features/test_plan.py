"""The choice between cached features and images for a phase, and its reason."""

from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from trainer.config.schema import RunConfig, validate_config
from trainer.errors import ConfigError, ModelError
from trainer.features.cut import Cut
from trainer.features.plan import (
    FeatureChoice,
    divide_phases,
    plan_features,
    reads_images_only_once,
    select_stored_dtype,
)
from trainer.models.classifier import Classifier, build_classifier
from trainer.types import Dataset, Split

COUNT, SCORED, BATCH = 100, 20, 10
MODEL = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "none", "image_size": 32}


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier(make_config().model, 3, 1)


def make_config(**changes: Any) -> RunConfig:
    phase = {"thaw": "none", "epochs": 3} | {k: v for k, v in changes.items() if k in PHASE}
    more = {k: v for k, v in changes.items() if k not in PHASE}
    training = {"batch_size": BATCH}
    return validate_config(
        {"data": {"source": "digits"}, "model": MODEL, "phases": {"head": phase}, "training": training} | more
    )


PHASE = ("thaw", "epochs", "features", "augmented_views", "features_dtype")
AUGMENTED = {"augmentation": {"zoom": 0.1}}


def plan_input(configured: RunConfig, classifier: Classifier, budget: int = 10**7) -> FeatureChoice:
    counts = {"train": COUNT, "validation": SCORED}
    splits = {name: Split(name, np.zeros(count, np.int32)) for name, count in counts.items()}
    dataset = Dataset("x", ("a", "b"), splits, "")
    return plan_features(configured, divide_phases(configured, classifier), dataset, budget)["head"]


@pytest.mark.parametrize(
    ("changes", "cached", "why"),
    [
        ({}, True, "1 view of 120 images at the backbone's end, pooled to 1280, 0.6 MB, computed once for 3 epochs"),
        ({"features": "live"}, False, "as configured"),
        ({"epochs": 1}, False, "1 view would be computed for 1 epoch"),
        ({"epochs": 1, "features": "cached"}, True, "1 view of 120 images at the backbone's end"),
        ({"epochs": 1.5}, True, "computed once for 2 epochs"),
        ({"thaw": "from_layer:100"}, True, "1 view of 120 images at layer 97 (block_10_project_BN), 2 x 2 x 32, 61.4 kB"),
        ({"thaw": "all"}, False, "no frozen layer with weights is below all layers that thaw=all trains"),
        (AUGMENTED, False, "augmentation makes other images in every epoch (augmented_views)"),
        (AUGMENTED | {"augmented_views": 2}, True, "2 views of 120 images"),
        (AUGMENTED | {"augmented_views": 3}, False, "3 views would be computed for 3 epochs"),
        ({"augmentation": {"mixup": 0.2}, "augmented_views": 2}, False, "augmentation.mixup and cutmix mix other images"),
        (AUGMENTED | {"augmented_views": 2, "distillation": {"teacher": "x"}}, False, "in every step"),
        ({"distillation": {"teacher": "x"}}, True, "1 view of 120 images"),
        ({"debug": {"max_steps": 10}}, False, "1 view would be computed for 1 epoch"),
    ],
)  # fmt: skip
def test_auto_caches_if_that_saves_work(classifier: Classifier, changes: Any, cached: bool, why: str) -> None:
    choice = plan_input(make_config(**changes), classifier)
    assert (choice.input_kind == "cached") == cached
    assert why in choice.reason


@pytest.mark.parametrize(
    ("changes", "reads", "why"),
    [
        (
            AUGMENTED,
            "validation",
            "; validation on features of 20 images at the backbone's end, pooled to 1280, 0.1 MB",
        ),
        (AUGMENTED | {"features": "live"}, "live", "as configured"),
        (AUGMENTED | {"thaw": "all"}, "live", "augmentation makes other images in every epoch (augmented_views)"),
        (AUGMENTED | {"epochs": 1}, "live", "augmentation makes other images in every epoch (augmented_views)"),
        ({"epochs": 1}, "live", "1 view would be computed for 1 epoch"),
    ],
)
def test_a_live_phase_validates_on_features(classifier: Classifier, changes: Any, reads: str, why: str) -> None:
    choice = plan_input(make_config(**changes), classifier)
    assert choice.input_kind == reads
    assert choice.reason.endswith(why)
    assert choice.describe("head").startswith("features of phase head: live, ")


def test_features_that_do_not_fit_are_live_or_an_error(classifier: Classifier) -> None:
    choice = plan_input(make_config(), classifier, 120 * 1280 * 4 - 1)
    assert choice.input_kind == "validation"
    assert "0.6 MB fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb; validation on" in choice.reason
    choice = plan_input(make_config(), classifier, 20 * 1280 * 4 - 1)
    assert choice.input_kind == "live"
    assert choice.reason.endswith("0.6 MB fit neither runtime.memory_budget_gb nor runtime.disk_budget_gb")
    assert plan_input(make_config(), classifier, 120 * 1280 * 4).input_kind == "cached"
    half = make_config(features_dtype="float16", features="cached")
    assert plan_input(half, classifier, 120 * 1280 * 2).input_kind == "cached"
    with raises(ConfigError, "phases.head.features", "cached", fix="features=auto", problem="^1 view .* fit neither"):
        plan_input(half, classifier, 1)


@pytest.mark.parametrize(("computed", "stored"), [("float32", "float16"), ("bfloat16", "bfloat16")])
def test_features_of_lower_precision_are_stored_in_it(computed: str, stored: str) -> None:
    phase = make_config(features_dtype="float16").phases["head"]
    assert select_stored_dtype(phase, Cut("x", 1, None, False, (2,), computed, {})) == stored


def test_a_division_has_the_updated_variables(classifier: Classifier) -> None:
    configured = validate_config({
        "data": {"source": "digits"}, "model": MODEL,
        "phases": {
            "head": {"thaw": "none", "epochs": 1},
            "norms": {"thaw": "last_blocks:1", "batch_norm": "train", "epochs": 1},
            "all": {"thaw": "all", "epochs": 1},
        },
    })  # fmt: skip
    parts = divide_phases(configured, classifier)
    assert parts["head"].updated == {"head/output/kernel", "head/output/bias"}
    assert "backbone/block_16_project_BN/moving_mean" in parts["norms"].updated
    assert parts["norms"].cut is not None
    assert not parts["norms"].updated & parts["norms"].cut.variables.keys()
    assert parts["all"].cut is None
    assert not reads_images_only_once(make_config(), {})
    assert not reads_images_only_once(configured, {"head": "cached", "norms": "cached", "all": "live"})
    assert reads_images_only_once(configured, {"head": "validation", "norms": "cached", "all": "cached"}, first=1)


def test_a_rule_that_matches_nothing_names_its_phase(classifier: Classifier) -> None:
    phases = {"head": {"thaw": "none", "epochs": 1}, "second": {"thaw": "last_blocks:99", "epochs": 1}}
    configured = validate_config({"data": {"source": "digits"}, "model": MODEL, "phases": phases})
    with pytest.raises(ModelError, match=r"^phases\.second(: |\.)thaw=last_blocks:99: "):
        divide_phases(configured, classifier)
