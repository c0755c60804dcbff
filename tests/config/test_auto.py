"""The advice table of `auto`: choices by counts, reasons, and that a run chooses once."""

import json
from functools import cache
from typing import Any

import pytest

from trainer.cli.compose import compose
from trainer.config.auto import limit_batch_size, resolve_auto
from trainer.config.schema import RequestedConfig, RunConfig, apply_overfit, validate_config, validate_resolved_config
from trainer.errors import ConfigError
from trainer.types import CPU, Device


@cache
def composed(*arguments: str) -> dict[str, Any]:
    return compose(["data=digits", *arguments]) or {}


def requested(*arguments: str) -> RequestedConfig:
    return validate_config(composed("model=auto", "phases=auto", *arguments))


@pytest.mark.parametrize(
    ("images", "classes", "backbone", "why"),
    [
        (100, 2, "MobileNetV2", "small: under 5,000 images and 50 classes"),
        (4_999, 49, "MobileNetV2", "small"),
        (4_999, 50, "EfficientNetB0", "medium: under 50,000 images or 50 classes"),
        (5_000, 2, "EfficientNetB0", "medium"),
        (50_000, 49, "EfficientNetB0", "medium"),
        (49_999, 1_000, "EfficientNetB0", "medium"),
        (50_000, 50, "EfficientNetB3", "large: from 50,000 images and 50 classes on"),
    ],
)
def test_the_backbone_grows_with_images_and_classes(images: int, classes: int, backbone: str, why: str) -> None:
    config, reasons = resolve_auto(requested(), images, classes)
    assert config.model.backbone == backbone
    counted = f"model.backbone=auto: {backbone}, for {images:,} training images of {classes} classes ("
    assert reasons[0].startswith(counted)
    assert why in reasons[0]


@pytest.mark.parametrize(
    ("images", "classes", "domain", "row", "thaws"),
    [
        (2_936, 5, "null", "few_similar", {"head": "none"}),
        (2_936, 5, "similar", "few_similar", {"head": "none"}),
        (2_936, 5, "different", "few_different", {"head": "none", "fine_tune": "percent:35"}),
        (6_000, 61, "different", "few_different", {"head": "none", "fine_tune": "percent:35"}),  # 98 per class
        (5_000, 50, "different", "many_different", {"all": "all"}),
        (5_000, 50, "similar", "many_similar", {"head": "none", "thaw_1": "percent:20", "thaw_2": "percent:40", "thaw_3": "percent:60"}),
    ],
)  # fmt: skip
def test_the_phases_follow_the_four_rows(
    images: int, classes: int, domain: str, row: str, thaws: dict[str, str]
) -> None:
    config, reasons = resolve_auto(requested(f"phases.auto.domain={domain}"), images, classes)
    assert {name: phase.thaw for name, phase in config.phases.items()} == thaws
    names = ", ".join(f"{name} ({thaw})" for name, thaw in thaws.items())
    assert reasons[1].startswith(f"phases=auto: {row}, that is {names}, for {images:,} training images of {classes} ")
    assert reasons[1].endswith("phases.auto.domain is set to similar or different") == (domain == "null")


@pytest.mark.parametrize(("images", "batch"), [(999, 16), (1_000, 32), (49_999, 32), (50_000, 64)])
def test_the_batch_follows_the_images(images: int, batch: int) -> None:
    config, reasons = resolve_auto(requested(), images, 10)
    assert config.training.batch_size == batch
    assert reasons[2].startswith(f"training.batch_size=auto: {batch}, for {images:,} training images")


@pytest.mark.parametrize(
    ("device", "precision", "why"),
    [
        (CPU, "float32", "on a CPU"),
        (Device("GPU", "NVIDIA B200", (10, 0)), "bfloat16", "on a GPU of compute capability 10.0 (from 8.0 on)"),
        (Device("GPU", "NVIDIA H100", (9, 0)), "bfloat16", "9.0"),
        (Device("GPU", "NVIDIA L4", (8, 9)), "bfloat16", "8.9"),
        (Device("GPU", "NVIDIA A100", (8, 0)), "bfloat16", "8.0"),
        (Device("GPU", "Tesla T4", (7, 5)), "float16", "with a loss scale, on a GPU of compute capability 7.5"),
        (Device("GPU", "Tesla V100", (7, 0)), "float16", "7.0"),
        (Device("GPU", "Tesla P100", (6, 0)), "float32", "6.0 (float16 from 7.0 on)"),
        (Device("GPU", "AMD"), "float32", "compute capability unknown"),
    ],
)
def test_the_precision_follows_the_compute_capability(device: Device, precision: str, why: str) -> None:
    config, reasons = resolve_auto(requested("runtime.precision=auto"), 100, 3, device)
    assert config.runtime.precision == precision
    assert reasons[-1].startswith(f"runtime.precision=auto: {precision}, ")
    assert why in reasons[-1]


def test_a_resumed_run_keeps_its_precision_on_another_device() -> None:
    alone = validate_config(composed("runtime=gpu"))
    assert alone.auto_keys == ["runtime.precision"]
    began, _ = resolve_auto(alone, 100, 3, Device("GPU", "L4", (8, 9)))
    stored = validate_resolved_config(json.loads(json.dumps(began.model_dump(mode="json"))))
    assert stored == began
    config, reasons = resolve_auto(alone, 100, 3, CPU, stored_config=stored)
    assert (config.runtime.precision, config.runtime.xla) == ("bfloat16", "auto")
    assert reasons == ["runtime.precision=auto: bfloat16, as this run began"]


def test_phases_are_validated_although_the_precision_is_auto() -> None:
    faulty = ["data=digits", "augmentation=light", "phases=head_only", "phases.head.features=cached", "runtime=gpu"]
    with pytest.raises(
        ConfigError, match=r"1 error:\n  phases\.head\.features=cached: augmentation makes other images"
    ):
        validate_config(compose(faulty) or {})


def test_a_given_value_is_not_chosen() -> None:
    config, reasons = resolve_auto(requested("model.backbone=VGG16", "training.batch_size=24"), 100, 3)
    assert (config.model.backbone, config.training.batch_size, len(reasons)) == ("VGG16", 24, 1)
    whole = validate_config(composed())
    assert resolve_auto(whole, 100, 3) == (whole, [])


def test_a_row_can_be_another_group_or_be_changed() -> None:
    config, _ = resolve_auto(requested("phases@phases.auto.few_similar=end_to_end"), 100, 3)
    assert list(config.phases) == ["all"]
    config, _ = resolve_auto(requested("phases.auto.few_similar.head.epochs=3"), 100, 3)
    assert config.phases["head"].epochs == 3


def test_a_resolved_configuration_is_like_any_other() -> None:
    config, _ = resolve_auto(requested("phases.auto.domain=different"), 2_936, 5)
    by_hand = validate_config(
        compose(["data=digits", "model=auto", "model.backbone=MobileNetV2", "phases=two_phase"]) or {}
    )
    assert validate_config(config.model_dump(mode="json")) == config == by_hand


def test_a_resumed_run_and_the_other_workers_adopt_the_choice() -> None:
    began, _ = resolve_auto(requested(), 100, 3)
    before = began.model_copy(update={"model": began.model.model_copy(update={"backbone": "ResNet50"})})
    sent = RunConfig.model_validate(json.loads(json.dumps(before.model_dump(mode="json"))))
    config, reasons = resolve_auto(requested(), stored_config=sent)
    assert config == before
    assert reasons == [
        "model.backbone=auto: ResNet50, as this run began",
        "phases=auto: head, as this run began",
        "training.batch_size=auto: 16, as this run began",
    ]
    assert resolve_auto(before, stored_config=began) == (before, [])  # nothing is auto: nothing is adopted


def test_overfitting_resolves_the_batch_size_to_its_default() -> None:
    config = apply_overfit(requested("debug=overfit"))
    assert config.example_limit == 32
    config, reasons = resolve_auto(config, 32, 10)
    assert config.training.batch_size == 32
    assert len(reasons) == 2
    assert isinstance(apply_overfit(requested("debug=overfit", "model=vgg16", "phases=head_only")), RunConfig)


@pytest.mark.parametrize(
    ("arguments", "images", "replicas", "batch"),
    [
        (("training.batch_size=5000",), 320, 1, 320),
        (("training.batch_size=320",), 320, 1, 320),
        (("training.batch_size=32",), 320, 1, 32),
        (("training.batch_size=5000",), 321, 2, 322),
        (("training.batch_size=5000", "training.accumulate=4"), 321, 2, 328),
        (("training.batch_size=5000", "augmentation.mixup=0.2"), 321, 1, 322),
        (("training.batch_size=322", "augmentation.mixup=0.2"), 321, 1, 322),
    ],
)
def test_a_batch_is_at_most_an_epoch(arguments: tuple[str, ...], images: int, replicas: int, batch: int) -> None:
    requested = validate_resolved_config(composed(*arguments))
    config, reason = limit_batch_size(requested, images, replicas)
    assert config.training.batch_size == batch
    limited = batch != requested.training.batch_size
    assert reason.endswith(f"is more than the {images} examples: a batch has {batch}") == limited
    assert (config is requested) == (not limited)
