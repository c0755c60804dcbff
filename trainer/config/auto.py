"""Resolve `auto` values by the numbers of training images and classes, and by the device (docs/phases.md)."""

import math

from trainer.config.batch_size import choose_batch_size
from trainer.config.phases import AutoPhases, Phase
from trainer.config.schema import Choices, Precision, RequestedConfig, RunConfig, with_choices
from trainer.types import CPU, Device

FEW_IMAGES, FEW_PER_CLASS = 5_000, 100  # a dataset below one of these, in total or per class, has few images
MANY_IMAGES, MANY_CLASSES = 50_000, 50  # thresholds of a larger backbone


def resolve_auto(
    config: RequestedConfig,
    images: int = 0,
    classes: int = 0,
    device: Device = CPU,
    begun: RunConfig | None = None,
    replicas: int = 1,
) -> tuple[RunConfig, list[str]]:
    """Choose a value for every key that is `auto`.

    A resumed run passes `begun`, the configuration that it began with, and keeps its choices. Otherwise the choices
    depend on the numbers of training images and classes, on the device, and on the number of all replicas. Returns the
    configuration, and a line per choice with its reason.
    """
    if isinstance(config, RunConfig):
        return config, []
    if begun:
        choices = Choices(begun.model.backbone, begun.training.batch_size, begun.phases, begun.runtime.precision)
        texts = {"model.backbone": choices.backbone, "phases": ", ".join(choices.phases)}
        texts |= {"training.batch_size": str(choices.batch_size), "runtime.precision": choices.precision}
        texts = {key: f"{value}, as this run began" for key, value in texts.items()}
    else:
        counted = f"for {images:,} training images of {classes} classes"
        backbone, size = _choose_backbone(images, classes)
        phases, row, hint = _choose_phases(config, images, classes)
        precision, kernels = choose_precision(device)
        resolved = with_choices(config, Choices(backbone, 1, phases, precision))
        batch_size, rule = choose_batch_size(resolved, images, device, replicas)
        divisor = compute_batch_divisor(resolved, replicas)
        if device.kind == "GPU":
            batch_size = max(batch_size // divisor, 1) * divisor
        choices = Choices(backbone, batch_size, phases, precision)
        texts = {
            "model.backbone": f"{backbone}, {counted} ({size})",
            "phases": f"{row}, {counted} (few: under {FEW_IMAGES:,}, or {FEW_PER_CLASS} per class){hint}",
            "training.batch_size": f"{batch_size}, for {images:,} training images{rule}",
            "runtime.precision": f"{precision}, {kernels}",
        }
    reasons = [f"{key}=auto: {text}" for key, text in texts.items() if key in config.autos]
    return with_choices(config, choices), reasons


def choose_precision(device: Device) -> tuple[Precision, str]:
    """Choose the fastest precision for training on a device; return it with the reason.

    Tensor cores compute in float16 from compute capability 7.0 on, and in bfloat16, which needs no loss scale, from 8.0
    on (NVIDIA, CUDA C++ Programming Guide, table of features by compute capability). On CPUs a step in half precision
    is not faster (docs/speed.md).
    """
    if device.kind == "CPU":
        return "float32", "on a CPU"
    capability = device.compute_capability or (0, 0)
    known = (
        "compute capability {}.{}".format(*capability) if device.compute_capability else "compute capability unknown"
    )
    if capability >= (8, 0):
        return "bfloat16", f"on a GPU of {known} (from 8.0 on)"
    if capability >= (7, 0):
        return "float16", f"with a loss scale, on a GPU of {known} (bfloat16 from 8.0 on)"
    return "float32", f"on a GPU of {known} (float16 from 7.0 on)"


def compute_batch_divisor(config: RunConfig, replicas: int) -> int:
    """Compute the divisor of a valid batch size, from replicas, micro-batches and pairs of mixed examples."""
    pairs = 2 if config.augmentation.mixes else 1
    if config.training.virtual_replicas:
        return config.training.virtual_replicas * pairs
    return math.lcm(replicas * config.training.accumulate, replicas * pairs)


def limit_batch_size(config: RunConfig, images: int, replicas: int) -> tuple[RunConfig, str]:
    """Limit the batch size to an epoch of `images` examples; return the configuration, and the reason if it changed.

    The limit is rounded up to a multiple of `compute_batch_divisor`. The gradients are those of the larger batch, the
    rest of which would be padding.
    """
    training, divisor = config.training, compute_batch_divisor(config, replicas)
    limit = -(-images // divisor) * divisor
    if training.batch_size <= limit:
        return config, ""
    reason = f"training.batch_size={training.batch_size} is more than the {images:,} examples: a batch has {limit}"
    return config.model_copy(update={"training": training.model_copy(update={"batch_size": limit})}), reason


def _choose_backbone(images: int, classes: int) -> tuple[str, str]:
    """Choose the backbone: larger networks transfer better (Kornblith et al. 2019), but need more images and time."""
    if images < FEW_IMAGES and classes < MANY_CLASSES:
        return "MobileNetV2", f"small: under {FEW_IMAGES:,} images and {MANY_CLASSES} classes"
    if images < MANY_IMAGES or classes < MANY_CLASSES:
        return "EfficientNetB0", f"medium: under {MANY_IMAGES:,} images or {MANY_CLASSES} classes"
    return "EfficientNetB3", f"large: from {MANY_IMAGES:,} images and {MANY_CLASSES} classes on"


def _choose_phases(config: RequestedConfig, images: int, classes: int) -> tuple[dict[str, Phase], str, str]:
    """Choose the phases; return them, a description of their row in the table, and a hint if `domain` is not set."""
    if not isinstance(config.phases, AutoPhases):
        return config.phases, "", ""
    table, few = config.phases.auto, images < max(FEW_IMAGES, FEW_PER_CLASS * classes)
    row = f"{'few' if few else 'many'}_{table.domain or 'similar'}"
    phases: dict[str, Phase] = getattr(table, row)
    names = ", ".join(f"{name} ({phase.thaw})" for name, phase in phases.items())
    hint = "; similar to the images of the backbone unless phases.auto.domain is set to similar or different"
    return phases, f"{row}, that is {names}", "" if table.domain else hint
