"""The advice table for `model=auto`, `phases=auto` and their batch size: rules of thumb that published recipes give; it
chooses once the training images have been counted (docs/phases.md).
"""

from typing import Any

from trainer.config.schema import Phase, RunConfig

FEW_IMAGES, FEW_A_CLASS = 5_000, 100  # fewer in all, or fewer a class, are few
MANY_IMAGES, MANY_CLASSES = 50_000, 50


def advise(config: RunConfig, images: int, classes: int) -> tuple[RunConfig, list[str]]:
    """The configuration with everything that is `auto` in it chosen, and the reasons, one line a choice.

    Args:
        images: number of training images.
        classes: number of their classes.
    """
    if config.auto is None:
        return config, []
    counted = f"{images:,} training images of {classes} classes"
    choice: dict[str, Any] = {}
    reasons: list[str] = []
    if config.auto.backbone:
        choice["backbone"], why = _backbone(images, classes)
        reasons.append(f"model.backbone=auto: {choice['backbone']}, for {counted} ({why})")
    if advised := config.auto.phases:
        few = images < FEW_IMAGES or images < FEW_A_CLASS * classes
        row = f"{'few' if few else 'many'}_{advised.domain or 'similar'}"
        choice["phases"] = getattr(advised, row)
        names = ", ".join(f"{name} ({phase.thaw})" for name, phase in choice["phases"].items())
        taken = "; taken as similar to what the backbone has seen: say phases.auto.domain=similar or different"
        reasons.append(
            f"phases=auto: {row}, that is {names}, for {counted} (few: under {FEW_IMAGES:,}, or {FEW_A_CLASS} a class)"
            + ("" if advised.domain else taken)
        )
    if config.auto.batch_size:
        size = choice["batch_size"] = 16 if images < 1_000 else 32 if images < MANY_IMAGES else 64
        rule = f"(16 under 1,000, 64 from {MANY_IMAGES:,} on, else 32)"
        reasons.append(f"training.batch_size=auto: {size}, for {images:,} training images {rule}")
    return settled(config, choice), reasons


def _backbone(images: int, classes: int) -> tuple[str, str]:
    """The backbone, and why: larger networks transfer better (Kornblith et al. 2019) and want more images and time."""
    if images < FEW_IMAGES and classes < MANY_CLASSES:
        return "MobileNetV2", f"the small one: under {FEW_IMAGES:,} images and {MANY_CLASSES} classes"
    if images < MANY_IMAGES or classes < MANY_CLASSES:
        return "EfficientNetB0", f"between the small one and that for {MANY_IMAGES:,} images and {MANY_CLASSES} classes"
    return "EfficientNetB3", f"the large one: from {MANY_IMAGES:,} images and {MANY_CLASSES} classes on"


def adopted(config: RunConfig, before: RunConfig) -> tuple[RunConfig, list[str]]:
    """As `advise`, but with the choices of `before`, the configuration that a resumed run began with."""
    auto = config.auto
    if auto is None:
        return config, []
    values = [("model.backbone", auto.backbone, before.model.backbone),
              ("phases", auto.phases, ", ".join(before.phases)),
              ("training.batch_size", auto.batch_size, before.training.batch_size)]  # fmt: skip
    reasons = [f"{key}=auto: {value}, as this run began" for key, is_auto, value in values if is_auto]
    return settled(config, choice_of(before)), reasons


def choice_of(config: RunConfig) -> dict[str, Any]:
    """The values of a configuration that can be `auto`, JSON-compatible."""
    phases = {name: phase.model_dump(mode="json") for name, phase in config.phases.items()}
    return {"backbone": config.model.backbone, "phases": phases, "batch_size": config.training.batch_size}


def settled(config: RunConfig, choice: dict[str, Any]) -> RunConfig:
    """The configuration with everything that is `auto` in it replaced by the values of `choice` (`choice_of`)."""
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
