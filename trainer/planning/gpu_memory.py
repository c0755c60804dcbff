"""Describe the memory that each phase needs on a GPU."""

from trainer.config.batch_size import GPU_RESERVE, IMAGE_BYTES_PER_VALUE
from trainer.planning.estimates import PhasePlan, format_bytes
from trainer.types import Device


def describe_gpu_memory(
    device: Device, phases: list[PhasePlan], variable_bytes: int, num_image_values: int
) -> list[tuple[str, str]]:
    """Return rows (label, text) about the memory that each phase needs on one GPU, and the GPU's memory; [] on CPUs.

    Args:
        device: the worker's devices.
        phases: plans of the phases, with their bytes per GPU.
        variable_bytes: bytes of all variables of the classifier.
        num_image_values: number of values in the images of one GPU's batch: examples x side x side x 3.
    """
    if device.kind == "CPU":
        return []
    rows: list[tuple[str, str]] = []
    for phase in phases:
        uses = {
            "weights": variable_bytes + phase.half_precision_bytes,
            "gradients": phase.gradient_bytes,
            "optimizer and averages": phase.optimizer_bytes + phase.ema_bytes,
            "activations of trained layers": phase.activation_bytes - phase.frozen_activation_bytes,
            "of frozen layers": phase.frozen_activation_bytes,
            "images": num_image_values * IMAGE_BYTES_PER_VALUE,
            "CUDA and workspaces, assumed": GPU_RESERVE,
        }
        sizes_text = ", ".join(f"{name} {format_bytes(count)}" for name, count in uses.items() if count)
        rows.append((phase.name, f"{format_bytes(sum(uses.values()))}: {sizes_text}"))
    memory_text = format_bytes(device.memory) if device.memory else "unknown"
    return [*rows, ("GPU", f"{device.name}, memory {memory_text}")]
