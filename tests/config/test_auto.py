"""The advice table: what it chooses from counts, why, and that it chooses once."""

from typing import Any

import pytest

from trainer.cli.compose import compose
from trainer.config.auto import adopted, advise, choice_of, settled
from trainer.config.schema import RunConfig, load

FULL = ("data=digits", "model=auto", "phases=auto")


def asked(*arguments: str) -> RunConfig:
    return load(compose([*FULL, *arguments]) or {})


@pytest.mark.parametrize(
    ("images", "classes", "backbone", "why"),
    [
        (100, 2, "MobileNetV2", "the small one: under 5,000 images and 50 classes"),
        (4_999, 49, "MobileNetV2", "the small one"),
        (4_999, 50, "EfficientNetB0", "between the small one and that for 50,000 images and 50 classes"),
        (5_000, 2, "EfficientNetB0", "between"),
        (50_000, 49, "EfficientNetB0", "between"),
        (49_999, 1_000, "EfficientNetB0", "between"),
        (50_000, 50, "EfficientNetB3", "the large one: from 50,000 images and 50 classes on"),
    ],
)
def test_the_backbone_grows_with_images_and_classes(images: int, classes: int, backbone: str, why: str) -> None:
    config, reasons = advise(asked(), images, classes)
    assert config.model.backbone == backbone
    assert reasons[0].startswith(
        f"model.backbone=auto: {backbone}, for {images:,} training images of {classes} classes ("
    )
    assert why in reasons[0]


@pytest.mark.parametrize(
    ("images", "classes", "said", "row", "thaws"),
    [
        (2_936, 5, "null", "few_similar", {"head": "none"}),
        (2_936, 5, "similar", "few_similar", {"head": "none"}),
        (2_936, 5, "different", "few_different", {"head": "none", "fine_tune": "percent:35"}),
        (6_000, 61, "different", "few_different", {"head": "none", "fine_tune": "percent:35"}),  # 98 a class
        (5_000, 50, "different", "many_different", {"all": "all"}),
        (5_000, 50, "similar", "many_similar", {"head": "none", "thaw_1": "percent:20", "thaw_2": "percent:40", "thaw_3": "percent:60"}),
    ],
)  # fmt: skip
def test_the_phases_follow_the_four_rows(images: int, classes: int, said: str, row: str, thaws: dict[str, str]) -> None:
    config, reasons = advise(asked(f"phases.auto.domain={said}"), images, classes)
    assert {name: phase.thaw for name, phase in config.phases.items()} == thaws
    told = ", ".join(f"{name} ({thaw})" for name, thaw in thaws.items())
    assert reasons[1].startswith(
        f"phases=auto: {row}, that is {told}, for {images:,} training images of {classes} classes"
    )
    assert reasons[1].endswith("phases.auto.domain=similar or different") == (said == "null")


@pytest.mark.parametrize(("images", "batch"), [(999, 16), (1_000, 32), (49_999, 32), (50_000, 64)])
def test_the_batch_follows_the_images(images: int, batch: int) -> None:
    config, reasons = advise(asked(), images, 10)
    assert config.training.batch_size == batch
    assert reasons[2].startswith(f"training.batch_size=auto: {batch}, for {images:,} training images")


def test_what_is_said_is_not_chosen() -> None:
    config, reasons = advise(asked("model.backbone=VGG16", "training.batch_size=24"), 100, 3)
    assert (config.model.backbone, config.training.batch_size, len(reasons)) == ("VGG16", 24, 1)
    whole = load(compose(["data=digits"]) or {})
    assert advise(whole, 100, 3) == (whole, [])


def test_a_row_can_be_another_group_or_be_changed() -> None:
    config, _ = advise(asked("phases@phases.auto.few_similar=end_to_end"), 100, 3)
    assert list(config.phases) == ["all"]
    config, _ = advise(asked("phases.auto.few_similar.head.epochs=3"), 100, 3)
    assert config.phases["head"].epochs == 3


def test_what_was_chosen_is_a_configuration_like_any_other() -> None:
    config, _ = advise(asked("phases.auto.domain=different"), 2_936, 5)
    assert config.auto is None
    written = load(config.model_dump(mode="json"))
    by_hand = load(compose(["data=digits", "model=auto", "model.backbone=MobileNetV2", "phases=two_phase"]) or {})
    assert written == config == by_hand


def test_a_run_that_goes_on_keeps_what_it_began_with() -> None:
    began, _ = advise(asked(), 100, 3)
    before = began.model_copy(update={"model": began.model.model_copy(update={"backbone": "ResNet50"})})
    config, reasons = adopted(asked(), before)
    assert config == before
    assert reasons == [
        "model.backbone=auto: ResNet50, as this run began",
        "phases=auto: head, as this run began",
        "training.batch_size=auto: 16, as this run began",
    ]
    assert adopted(before, began) == (before, [])  # nothing is auto: nothing is taken over


def test_workers_take_the_choice_in_plain_values() -> None:
    import json

    chosen, _ = advise(asked(), 60_000, 100)
    told: dict[str, Any] = json.loads(json.dumps(choice_of(chosen)))
    assert settled(asked(), told) == chosen


def test_overfitting_one_batch_keeps_the_batch_that_was_loaded() -> None:
    from trainer.config.schema import apply_overfit

    config, reasons = advise(apply_overfit(asked("debug=overfit")), 32, 10)
    assert config.training.batch_size == 32
    assert len(reasons) == 2
