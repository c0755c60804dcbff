"""Describe the memory that each phase needs on a GPU, and find settings that are slow on GPUs."""

from trainer.config.auto import choose_precision
from trainer.config.batch_size import GPU_RESERVE, IMAGE_BYTES_PER_VALUE
from trainer.config.schema import RunConfig
from trainer.planning.estimates import PhasePlan, format_bytes
from trainer.types import Device

# Images that one CPU decodes, and cached images that it augments (flip, rotation, zoom), per second. Measured with two
# CPUs at 160 px (docs/performance.md); larger photos take longer.
DECODED_IMAGES_PER_SECOND_PER_CPU, AUGMENTED_IMAGES_PER_SECOND_PER_CPU = 945, 2_950
# Assumed training speed of one GPU in images per second. An H200 trains ResNet50 at 2,871 and MobileNetV2 at 9,423
# (docs/speed.md).
TRAINED_IMAGES_PER_SECOND_PER_GPU = 4_000


def describe_gpu_memory(
    device: Device, phases: list[PhasePlan], variable_bytes: int, num_values: int
) -> list[tuple[str, str]]:
    """Return rows (label, text) about the memory that each phase needs on one GPU, and the GPU's memory; [] on CPUs.

    Args:
        variable_bytes: bytes of all variables of the classifier.
        num_values: number of values in the images of one GPU's batch: examples x side x side x 3.
    """
    if device.kind == "CPU":
        return []
    rows = []
    for phase in phases:
        uses = {
            "weights": variable_bytes + phase.half_precision_bytes,
            "gradients": phase.gradient_bytes,
            "optimizer and averages": phase.optimizer_bytes + phase.ema_bytes,
            "activations of trained layers": phase.activation_bytes - phase.frozen_activation_bytes,
            "of frozen layers": phase.frozen_activation_bytes,
            "images": num_values * IMAGE_BYTES_PER_VALUE,
            "CUDA and workspaces, assumed": GPU_RESERVE,
        }
        sizes_text = ", ".join(f"{name} {format_bytes(count)}" for name, count in uses.items() if count)
        rows.append((phase.name, f"{format_bytes(sum(uses.values()))}: {sizes_text}"))
    memory_text = format_bytes(device.memory) if device.memory else "unknown"
    return [*rows, ("GPU", f"{device.name}, memory {memory_text}")]


def find_device_warnings(config: RunConfig, device: Device, cpus: int, replicas: int, cached_in: str) -> list[str]:
    """Return warnings about settings that make training slow on this worker's GPUs; [] on CPUs.

    Args:
        cpus: number of CPUs on this worker.
        replicas: number of GPUs on this worker.
        cached_in: where the decoded training images are cached: "memory", "disk" or "none".
    """
    if device.kind == "CPU":
        return []
    warnings, precision = [], config.runtime.precision
    fastest, _ = choose_precision(device)
    if precision != fastest and (precision == "float32" or fastest == "float16"):
        warnings.append(
            f"runtime.precision={precision} is slow on {device.name}: its tensor cores compute faster in {fastest}; "
            "set runtime.precision=auto"
        )
    per_cpu, task = (
        (DECODED_IMAGES_PER_SECOND_PER_CPU, "decode")
        if cached_in == "none"
        else (AUGMENTED_IMAGES_PER_SECOND_PER_CPU, "augment")
    )
    if (
        cached_in == "none" or config.augmentation.active
    ) and cpus * per_cpu < replicas * TRAINED_IMAGES_PER_SECOND_PER_GPU:
        min_cpus = -(-replicas * TRAINED_IMAGES_PER_SECOND_PER_GPU // per_cpu)
        fix = f"request {min_cpus} CPUs" + ", or raise runtime.memory_budget_gb" * (cached_in == "none")
        warnings.append(
            f"{cpus} CPUs {task} about {cpus * per_cpu:,} small images per second, and {replicas} GPUs may train on "
            f"{replicas * TRAINED_IMAGES_PER_SECOND_PER_GPU:,}: {fix} (docs/speed.md)"
        )
    return warnings
