"""Resolve `auto` values from the numbers of training images and classes, and from the device (docs/phases.md)."""

import math

from trainer.config.batch_size import choose_batch_size
from trainer.config.phases import AutoPhases, Phase
from trainer.config.schema import AutoValues, Precision, RequestedConfig, RunConfig, replace_auto
from trainer.types import CPU, Device

# A dataset has few images if it has fewer than FEW_IMAGES, or on average fewer than FEW_PER_CLASS per class.
FEW_IMAGES = 5_000
FEW_PER_CLASS = 100
# The largest backbone is chosen if a dataset has at least MANY_IMAGES images and MANY_CLASSES classes.
MANY_IMAGES = 50_000
MANY_CLASSES = 50


def resolve_auto(
    config: RequestedConfig,
    num_images: int = 0,
    num_classes: int = 0,
    device: Device = CPU,
    stored_config: RunConfig | None = None,
    num_replicas: int = 1,
) -> tuple[RunConfig, list[str]]:
    """Choose a value for every key that is `auto`.

    Args:
        config: the requested configuration. A `RunConfig` is returned unchanged, without reasons.
        num_images: number of training images.
        num_classes: number of classes.
        device: device on which the run trains.
        stored_config: configuration of a resumed run's earlier starts. Its values are used, and the other arguments are
            ignored.
        num_replicas: number of replicas on all workers.

    Returns:
        The resolved configuration, and a line "KEY=auto: VALUE, REASON" for each key that was `auto`.
    """
    if isinstance(config, RunConfig):
        return config, []
    if stored_config:
        choices = AutoValues(
            stored_config.model.backbone,
            stored_config.training.batch_size,
            stored_config.phases,
            stored_config.runtime.precision,
        )
        explanations = {"model.backbone": choices.backbone, "phases": ", ".join(choices.phases)}
        explanations |= {"training.batch_size": str(choices.batch_size), "runtime.precision": choices.precision}
        explanations = {key: f"{value}, as this run began" for key, value in explanations.items()}
    else:
        dataset = f"for {num_images:,} training images of {num_classes} classes"
        backbone, backbone_reason = _choose_backbone(num_images, num_classes)
        phases, phases_reason, hint = _choose_phases(config, num_images, num_classes)
        precision, precision_reason = choose_precision(device)
        provisional_config = replace_auto(config, AutoValues(backbone, 1, phases, precision))
        batch_size, batch_size_reason = choose_batch_size(provisional_config, num_images, device, num_replicas)
        multiple = compute_batch_size_multiple(provisional_config, num_replicas)
        if device.kind == "GPU":  # on CPUs, a batch size that is not a multiple is an error of `check_batch_size`
            batch_size = max(batch_size // multiple, 1) * multiple
        choices = AutoValues(backbone, batch_size, phases, precision)
        explanations = {
            "model.backbone": f"{backbone}, {dataset} ({backbone_reason})",
            "phases": f"{phases_reason}, {dataset} (few: under {FEW_IMAGES:,}, or {FEW_PER_CLASS} per class){hint}",
            "training.batch_size": f"{batch_size}, for {num_images:,} training images{batch_size_reason}",
            "runtime.precision": f"{precision}, {precision_reason}",
        }
    reasons = [f"{key}=auto: {explanation}" for key, explanation in explanations.items() if key in config.auto_keys]
    return replace_auto(config, choices), reasons


def choose_precision(device: Device) -> tuple[Precision, str]:
    """Choose the fastest precision for training on a device. Returns the precision, and its reason for the log.

    Tensor Cores require compute capability 7.0 for float16, and 8.0 for bfloat16, which needs no loss scaling (NVIDIA,
    CUDA C++ Programming Guide, table of features by compute capability). On CPUs a step in half precision is not faster
    (docs/speed.md).
    """
    if device.kind == "CPU":
        return "float32", "on a CPU"
    capability = device.compute_capability or (0, 0)
    capability_text = (
        "compute capability {}.{}".format(*capability) if device.compute_capability else "compute capability unknown"
    )
    if capability >= (8, 0):
        return "bfloat16", f"on a GPU of {capability_text} (from 8.0 on)"
    if capability >= (7, 0):
        return "float16", f"with a loss scale, on a GPU of {capability_text} (bfloat16 from 8.0 on)"
    return "float32", f"on a GPU of {capability_text} (float16 from 7.0 on)"


def compute_batch_size_multiple(config: RunConfig, num_replicas: int) -> int:
    """Return the number of which a valid global batch size is a multiple.

    The batch must divide evenly over the `num_replicas` replicas on all workers, and their micro-batches. With mixup or
    cutmix, each replica needs an even number of examples. `training.virtual_replicas`, if set, replaces `num_replicas`.
    """
    group_size = 2 if config.augmentation.mixes else 1
    if config.training.virtual_replicas:
        return config.training.virtual_replicas * group_size
    return math.lcm(num_replicas * config.training.accumulate, num_replicas * group_size)


def limit_batch_size(config: RunConfig, num_images: int, num_replicas: int) -> tuple[RunConfig, str]:
    """Reduce a batch size that exceeds `num_images`, the number of training examples, to that number.

    The number is first rounded up to a multiple of `compute_batch_size_multiple`. The gradients do not change, because
    the rest of the larger batch would be padding.

    Returns:
        The configuration, and a message for the log, or "" if the batch size has not changed.
    """
    training = config.training
    multiple = compute_batch_size_multiple(config, num_replicas)
    max_batch_size = -(-num_images // multiple) * multiple
    if training.batch_size <= max_batch_size:
        return config, ""
    problem = f"training.batch_size={training.batch_size} is more than the {num_images:,} examples"
    reason = f"{problem}: a batch has {max_batch_size}"
    return config.model_copy(update={"training": training.model_copy(update={"batch_size": max_batch_size})}), reason


def _choose_backbone(num_images: int, num_classes: int) -> tuple[str, str]:
    """Choose the backbone. Returns its name, and the reason for the log.

    Networks with a higher ImageNet accuracy transfer better (Kornblith et al. 2019), but need more images and time.
    """
    if num_images < FEW_IMAGES and num_classes < MANY_CLASSES:
        return "MobileNetV2", f"small: under {FEW_IMAGES:,} images and {MANY_CLASSES} classes"
    if num_images < MANY_IMAGES or num_classes < MANY_CLASSES:
        return "EfficientNetB0", f"medium: under {MANY_IMAGES:,} images or {MANY_CLASSES} classes"
    return "EfficientNetB3", f"large: from {MANY_IMAGES:,} images and {MANY_CLASSES} classes on"


def _choose_phases(config: RequestedConfig, num_images: int, num_classes: int) -> tuple[dict[str, Phase], str, str]:
    """Choose the phases from the rows of the table `phases.auto`.

    Returns the phases, a description of the row, and a hint, which is "" if `phases.auto.domain` is set. If `phases`
    is not auto, the configured phases are returned with two empty strings.
    """
    if not isinstance(config.phases, AutoPhases):
        return config.phases, "", ""
    phase_table = config.phases.auto
    has_few_images = num_images < max(FEW_IMAGES, FEW_PER_CLASS * num_classes)
    row_name = f"{'few' if has_few_images else 'many'}_{phase_table.domain or 'similar'}"
    phases: dict[str, Phase] = getattr(phase_table, row_name)
    names = ", ".join(f"{name} ({phase.thaw})" for name, phase in phases.items())
    hint = "; similar to the images of the backbone unless phases.auto.domain is set to similar or different"
    return phases, f"{row_name}, that is {names}", "" if phase_table.domain else hint
