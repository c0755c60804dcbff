"""The memory of a GPU by phase, and settings that are slow on it, from made facts."""

from dataclasses import replace
from typing import Any

import keras
import pytest

from tests.config.test_schema import tree
from trainer.config.batch_size import FOOTPRINTS, Footprint
from trainer.config.schema import Model, RunConfig, validate_resolved_config
from trainer.models.backbones import get_backbones
from trainer.models.classifier import Classifier, build_classifier, count_parameters
from trainer.models.freezing import set_trainable_layers
from trainer.planning.estimates import PhasePlan, estimate_activations, plan_phases
from trainer.planning.gpu_memory import describe_gpu_memory
from trainer.planning.warnings import find_device_warnings
from trainer.types import CPU, Device

H200 = Device("GPU", "NVIDIA H200", (9, 0), 150_754_820_096)
V100, P100 = (
    replace(H200, name="V100", compute_capability=(7, 0)),
    replace(H200, name="P100", compute_capability=(6, 0)),
)


def warn(
    device: Device = H200, cpus: int = 16, replicas: int = 1, cached_in: str = "memory", **settings: Any
) -> list[str]:
    settings = {"runtime__precision": "bfloat16", **settings}
    return find_device_warnings(validate_resolved_config(tree(**settings)), device, cpus, replicas, cached_in)


@pytest.mark.parametrize(
    ("device", "precision", "fastest"),
    [
        (H200, "float32", "bfloat16"), (H200, "bfloat16", None), (H200, "float16", None),
        (V100, "float32", "float16"), (V100, "bfloat16", "float16"), (V100, "float16", None),
        (P100, "float32", None), (CPU, "float32", None), (CPU, "bfloat16", None),
    ],
)  # fmt: skip
def test_a_precision_without_the_tensor_cores_is_a_warning(device: Device, precision: str, fastest: str | None) -> None:
    warnings = warn(device, runtime__precision=precision)
    expected = [
        f"runtime.precision={precision} is slow on {device.name}: its tensor cores compute faster in {fastest}; "
        "set runtime.precision=auto"
    ]
    assert warnings == (expected if fastest else [])


@pytest.mark.parametrize(
    ("facts", "work"),
    [
        ({"cpus": 4, "cached_in": "none"}, "4 CPUs can decode about 3,780"),
        ({"cpus": 5, "cached_in": "none"}, None),
        ({"cpus": 8, "cached_in": "none", "replicas": 2}, "8 CPUs can decode about 7,560"),
        ({"cpus": 1, "augmentation__rotation": 10}, "1 CPU can augment about 2,950"),
        ({"cpus": 2, "augmentation__rotation": 10}, None),
        ({"cpus": 1}, None),  # read from memory as they are
        ({"cpus": 1, "cached_in": "none", "device": CPU}, None),
    ],
)
def test_too_few_cpus_for_the_decoder_are_a_warning(facts: dict[str, Any], work: str | None) -> None:
    warnings = warn(**facts)
    assert len(warnings) == bool(work)
    if work:
        assert warnings[0].startswith(f"{work} small images per second, and ")
        assert ("runtime.memory_budget_gb" in warnings[0]) is (facts.get("cached_in") == "none")


def make_config(precision: str) -> RunConfig:
    phases = {"head": {"thaw": "none", "epochs": 1}, "all": {"thaw": "all", "epochs": 1}}
    return validate_resolved_config(tree(phases=phases, runtime__precision=precision))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier(Model(backbone="MobileNetV2", weights="none", image_size=96), 5, 1)


def plan(classifier: Classifier, precision: str, examples: int = 8) -> dict[str, PhasePlan]:
    return {phase.name: phase for phase in plan_phases(make_config(precision), classifier, 10, examples)}


def test_activations_follow_batch_precision_and_the_thawed_part(classifier: Classifier) -> None:
    half, twice, single = (plan(classifier, p, n) for p, n in [("bfloat16", 8), ("bfloat16", 16), ("float32", 8)])
    for name in ("head", "all"):
        assert twice[name].activation_bytes == single[name].activation_bytes == 2 * half[name].activation_bytes
    assert half["head"].activation_bytes == half["head"].frozen_activation_bytes
    assert half["all"].frozen_activation_bytes < half["all"].activation_bytes / 50  # the image itself
    assert half["head"].activation_bytes < half["all"].activation_bytes / 4
    assert single["all"].half_precision_bytes == 0
    assert half["all"].half_precision_bytes == 2 * count_parameters(classifier.variables.values())


def test_the_rows_have_all_uses_and_the_memory_of_the_gpu(classifier: Classifier) -> None:
    phases = list(plan(classifier, "bfloat16").values())
    head, whole, gpu = describe_gpu_memory(H200, phases, 9_000_000, 8 * 96 * 96 * 3)
    assert gpu == ("GPU", "NVIDIA H200, memory 150.75 GB")
    assert "activations of trained layers" in whole[1]
    assert "activations of trained layers" not in head[1]
    assert "of frozen layers" in head[1]
    for name, row in (head, whole):
        assert name in ("head", "all")
        assert "CUDA and workspaces, assumed 1.50 GB" in row
        total, *parts = (float(text.split()[0].replace(",", "")) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}[text.split()[1]]
                         for text in [row.split(":")[0], *(" ".join(p.split()[-2:]) for p in row.split(":")[1].replace(", assumed", " assumed").split(", "))])  # fmt: skip
        assert total == pytest.approx(sum(parts), rel=0.01)
    assert describe_gpu_memory(CPU, phases, 1, 1) == []


def measure(name: str) -> Footprint:
    """Count the values of a network at the size of its footprint."""
    side = FOOTPRINTS[name].side
    classifier = build_classifier(Model(backbone=name, weights="none", image_size=side), 2, 1)
    counts = []
    for norm in ("frozen", "train"):
        thaw = set_trainable_layers(classifier, "all", norm)
        counts.append(
            sum(estimate_activations(classifier, thaw.first_trainable, 1, "float32", thaw.batch_norm_training))
        )
    counts.append(sum(estimate_activations(classifier, None, 1)))
    trained, trained_norm, frozen = (round(count / 4 / side**2) for count in counts)
    return Footprint(
        side, trained, trained_norm, frozen, round(count_parameters(classifier.variables.values()) / 1e6, 1)
    )


@pytest.mark.parametrize("name", ["MobileNetV2", "VGG16"])
def test_a_footprint_is_that_of_the_network(name: str) -> None:
    assert measure(name) == FOOTPRINTS[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [spec.name for spec in get_backbones().values()])
def test_every_footprint_is_that_of_the_network(name: str) -> None:
    assert measure(name) == FOOTPRINTS[name]
    keras.backend.clear_session()
