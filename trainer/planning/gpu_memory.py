"""Describe the memory that each phase needs on a GPU, and find settings that are slow on GPUs."""

from trainer.config.auto import choose_precision
from trainer.config.batch_size import GPU_RESERVE, IMAGE_BYTES_PER_VALUE
from trainer.config.schema import RunConfig
from trainer.planning.estimates import PhasePlan, format_bytes
from trainer.types import Device

# Images per second of one CPU, measured with two CPUs at 160 px (docs/performance.md): with decoding in each epoch, and
# with augmentation (flip, rotation, zoom) of cached images. Larger photos take longer.
DECODED_IMAGES_PER_SECOND_PER_CPU, AUGMENTED_PER_CPU = 945, 2_950
# Images per second on which one GPU is assumed to train. An H200 trains ResNet50 on 2,871 and MobileNetV2 on 9,423
# (docs/speed.md).
READ_IMAGES_PER_SECOND_PER_GPU = 4_000


def describe_gpu_memory(device: Device, phases: list[PhasePlan], variables: int, pixels: int) -> list[tuple[str, str]]:
    """Describe in rows for the plan the memory that each phase needs on one GPU, and the memory of the GPU; [] on CPUs.

    Args:
        variables: bytes of all variables of the classifier.
        pixels: number of values in the images of one GPU's batch.
    """
    if device.kind == "CPU":
        return []
    rows = []
    for phase in phases:
        uses = {
            "weights": variables + phase.half_precision_weights,
            "gradients": phase.gradients,
            "optimizer and averages": phase.optimizer + phase.averages,
            "activations of trained layers": phase.activations - phase.frozen_activations,
            "of frozen layers": phase.frozen_activations,
            "images": pixels * IMAGE_BYTES_PER_VALUE,
            "CUDA and workspaces, assumed": GPU_RESERVE,
        }
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in uses.items() if count)
        rows.append((phase.name, f"{format_bytes(sum(uses.values()))}: {parts}"))
    memory = format_bytes(device.memory) if device.memory else "unknown"
    return [*rows, ("GPU", f"{device.name}, memory {memory}")]


def find_device_warnings(config: RunConfig, device: Device, cpus: int, replicas: int, cached_in: str) -> list[str]:
    """Return warnings about settings that make training slow on the GPUs of this worker; [] on CPUs.

    Args:
        cpus: number of CPUs of this worker.
        replicas: number of GPUs of this worker.
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
    per_cpu, work = (
        (DECODED_IMAGES_PER_SECOND_PER_CPU, "decode") if cached_in == "none" else (AUGMENTED_PER_CPU, "augment")
    )
    if (
        cached_in == "none" or config.augmentation.active
    ) and cpus * per_cpu < replicas * READ_IMAGES_PER_SECOND_PER_GPU:
        needed = -(-replicas * READ_IMAGES_PER_SECOND_PER_GPU // per_cpu)
        fix = f"request {needed} CPUs" + ", or raise runtime.memory_budget_gb" * (cached_in == "none")
        warnings.append(
            f"{cpus} CPUs {work} about {cpus * per_cpu:,} small images per second, and {replicas} GPUs may train on "
            f"{replicas * READ_IMAGES_PER_SECOND_PER_GPU:,}: {fix} (docs/speed.md)"
        )
    return warnings
