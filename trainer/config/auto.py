"""The advice table: what `auto` stands for, once the training images have been counted (docs/phases.md).

Rules of thumb, made from the published recipes; a person who knows the images knows better.
"""

from __future__ import annotations

from typing import Any

from trainer.config.schema import Phase, RunConfig

FEW_IMAGES, FEW_A_CLASS = 5_000, 100  # fewer in all, or fewer a class, are few
MANY_IMAGES, MANY_CLASSES = 50_000, 50


def advise(config: RunConfig, images: int, classes: int) -> tuple[RunConfig, list[str]]:
    """The configuration with everything that is `auto` in it chosen, and the reasons, one line a choice.

    Args:
        images: training images.
        classes: of them.
    """
    if config.auto is None:
        return config, []
    counted = f"{images:,} training images of {classes} classes"
    choice: dict[str, Any] = {}
    reasons: list[str] = []
    if config.auto.backbone:
        choice["backbone"], why = _backbone(images, classes)
        reasons.append(f"model.backbone=auto: {choice['backbone']}, for {counted} ({why})")
    if config.auto.phases:
        advised = config.auto.phases
        few = images < FEW_IMAGES or images < FEW_A_CLASS * classes
        row = f"{'few' if few else 'many'}_{advised.domain or 'similar'}"
        chosen: dict[str, Phase] = getattr(advised, row)
        choice["phases"] = chosen
        names = ", ".join(f"{name} ({phase.thaw})" for name, phase in chosen.items())
        taken = "; taken as similar to what the backbone has seen: say phases.auto.domain=similar or different"
        reasons.append(
            f"phases=auto: {row}, that is {names}, for {counted} (few: under {FEW_IMAGES:,}, or {FEW_A_CLASS} a class)"
            + ("" if advised.domain else taken)
        )
    if config.auto.batch_size:
        choice["batch_size"] = 16 if images < 1_000 else 32 if images < MANY_IMAGES else 64
        reasons.append(
            f"training.batch_size=auto: {choice['batch_size']}, for {images:,} training images (16 under 1,000, "
            f"64 from {MANY_IMAGES:,} on, else 32)"
        )
    return settled(config, choice), reasons


def _backbone(images: int, classes: int) -> tuple[str, str]:
    """The backbone, and why: larger networks transfer better (Kornblith et al. 2019) and want more images and time."""
    if images < FEW_IMAGES and classes < MANY_CLASSES:
        return "MobileNetV2", f"the small one: under {FEW_IMAGES:,} images and {MANY_CLASSES} classes"
    if images < MANY_IMAGES or classes < MANY_CLASSES:
        return "EfficientNetB0", f"between the small one and that for {MANY_IMAGES:,} images and {MANY_CLASSES} classes"
    return "EfficientNetB3", f"the large one: from {MANY_IMAGES:,} images and {MANY_CLASSES} classes on"


def adopted(config: RunConfig, before: RunConfig) -> tuple[RunConfig, list[str]]:
    """As `advise`, but everything is as it is `before`: how a run goes on that has begun."""
    auto, choice = config.auto, choice_of(before)
    if auto is None:
        return config, []
    said = {"model.backbone": choice["backbone"] if auto.backbone else None,
            "phases": ", ".join(before.phases) if auto.phases else None,
            "training.batch_size": choice["batch_size"] if auto.batch_size else None}  # fmt: skip
    return settled(config, choice), [f"{key}=auto: {value}, as this run began" for key, value in said.items() if value]


def choice_of(config: RunConfig) -> dict[str, Any]:
    """What `auto` could stand for as it is in a configuration, in plain values."""
    phases = {name: phase.model_dump(mode="json") for name, phase in config.phases.items()}
    return {"backbone": config.model.backbone, "phases": phases, "batch_size": config.training.batch_size}


def settled(config: RunConfig, choice: dict[str, Any]) -> RunConfig:
    """The configuration with everything that is `auto` in it taken from `choice`, as `choice_of` gives it."""
    if config.auto is None:
        return config
    changes: dict[str, Any] = {"auto": None}
    if config.auto.backbone:
        changes["model"] = config.model.model_copy(update={"backbone": choice["backbone"]})
    if config.auto.phases:
        changes["phases"] = {name: Phase.model_validate(phase) for name, phase in choice["phases"].items()}
    if config.auto.batch_size:
        changes["training"] = config.training.model_copy(update={"batch_size": choice["batch_size"]})
    return config.model_copy(update=changes)
