"""The advice table: what `auto` stands for, once the training images have been counted. The reference is docs/phases.md.

Rules of thumb, made from the published recipes; a person who knows the images knows better.
"""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig

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
        choice["phases"] = getattr(advised, row)
        names = ", ".join(f"{name} ({phase.thaw})" for name, phase in choice["phases"].items())
        taken = "" if advised.domain else "; taken as similar to what the backbone has seen, for nothing else was said: "
        taken += "" if advised.domain else "phases.auto.domain=similar or different"
        reasons.append(
            f"phases=auto: {row}, that is {names}, for {counted} (few: under {FEW_IMAGES:,}, or {FEW_A_CLASS} a class)"
            + taken
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


def adopted(config: RunConfig, before: RunConfig) -> RunConfig:
    """The configuration with what is `auto` in it as it is `before`: how a run goes on."""
    values = {"backbone": before.model.backbone, "phases": before.phases, "batch_size": before.training.batch_size}
    return settled(config, values)


def settled(config: RunConfig, choice: dict[str, Any]) -> RunConfig:
    """The configuration with everything that is `auto` in it taken from `choice`, {backbone, phases, batch_size}."""
    if config.auto is None:
        return config
    changes: dict[str, Any] = {"auto": None}
    if config.auto.backbone:
        changes["model"] = config.model.model_copy(update={"backbone": choice["backbone"]})
    if config.auto.phases:
        changes["phases"] = choice["phases"]
    if config.auto.batch_size:
        changes["training"] = config.training.model_copy(update={"batch_size": choice["batch_size"]})
    return config.model_copy(update=changes)
