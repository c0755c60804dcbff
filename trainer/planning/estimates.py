"""Estimate the steps, parameters and memory of a run before it begins."""

import math
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import keras

from trainer.cluster.devices import query_gpu_memory
from trainer.config.auto import compute_batch_size_multiple
from trainer.config.batch_size import BYTES_PER_VALUE
from trainer.config.phases import Optimizer
from trainer.config.schema import Precision, RunConfig
from trainer.data.host import get_memory_limit_bytes
from trainer.data.images import CachePlan
from trainer.errors import ConfigError
from trainer.evaluation.scoring import get_images_per_call
from trainer.models.bn_folding import find_foldable_pairs
from trainer.models.classifier import Classifier, count_parameters, count_variable_bytes
from trainer.models.freezing import FreezingPlan, set_trainable_layers
from trainer.storage.disk import format_bytes
from trainer.types import Split


def estimate_split_bytes(split: Split) -> int:
    """Estimate a split's size in bytes from its files, or from its fraction of each shard; 0 if one is not local."""
    try:
        if split.files:
            return sum(os.stat(path).st_size for path in split.files)
        return sum(round(os.stat(s.path).st_size * (s.stop - s.start) / max(s.count, 1)) for s in split.shards)
    except OSError:
        return 0


# Bytes of compiled steps and buffers. Measured with TensorFlow 2.21: the quickstart's peak memory, 984 MB, minus all
# other uses, 806 MB.
COMPILED_BYTES = 180_000_000


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The plan of one phase. Memory is in bytes per replica."""

    name: str
    steps: int  # maximum; early stopping can end the phase earlier
    epochs: float  # `steps` in epochs
    freezing: FreezingPlan
    trainable_parameters: int
    trained_layers: frozenset[int]  # indices in backbone.layers of the layers with trainable variables
    gradient_bytes: int
    optimizer_bytes: int  # of the optimizer's variables
    ema_bytes: int  # of the moving averages of the weights
    activation_bytes: int  # in training or in scoring, whichever needs more
    frozen_activation_bytes: int  # of `activation_bytes`, those in frozen layers; all of them if scoring needs more
    half_precision_bytes: int  # of the half-precision copies of all weights; 0 in float32
    max_checkpoints: int  # maximum number of checkpoints that the phase saves


def plan_phases(config: RunConfig, classifier: Classifier, steps_per_epoch: int, num_examples: int) -> list[PhasePlan]:
    """Plan each phase: its steps, trainable layers and memory.

    This freezes and unfreezes layers of `classifier` for each phase in turn; they remain as the last phase sets them.

    Args:
        steps_per_epoch: number of steps per epoch.
        num_examples: number of examples that a replica processes in one forward pass of training.

    Raises:
        ModelError: a thaw rule cannot be applied.
    """
    plans = []
    precision = config.runtime.precision
    virtual_replicas = config.training.virtual_replicas
    num_parameters = count_variable_bytes(classifier.variables.values()) // 4  # variables are float32
    steps_per_save = max(config.runtime.checkpoint_every.steps(steps_per_epoch, config.training.batch_size), 1)
    for name, phase in config.phases.items():
        freezing = set_trainable_layers(
            classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay
        )
        steps = config.count_phase_steps(phase, steps_per_epoch)
        trainable_bytes = count_variable_bytes(freezing.trainable.values())
        trained_bytes, frozen_bytes = estimate_activations(
            classifier, freezing.first_trainable, num_examples, precision, freezing.batch_norm_training
        )
        # Scoring processes the examples of all micro-batches at once.
        scored_examples = get_images_per_call() if virtual_replicas else num_examples * config.training.accumulate
        scoring_bytes = sum(
            estimate_activations(classifier, first_trainable=None, num_examples=scored_examples, precision=precision)
        )
        max_checkpoints = math.ceil(steps / steps_per_epoch) * max(
            math.ceil(min(steps_per_epoch, steps) / steps_per_save), 1
        )
        plans.append(PhasePlan(
            name=name, steps=steps, epochs=steps / steps_per_epoch, freezing=freezing, max_checkpoints=max_checkpoints,
            gradient_bytes=trainable_bytes, ema_bytes=trainable_bytes if config.training.ema else 0,
            trainable_parameters=count_parameters(freezing.trainable.values()),
            trained_layers=frozenset(i for i, x in enumerate(classifier.backbone.layers) if x.trainable_weights),
            optimizer_bytes=count_optimizer_slots(phase.optimizer) * trainable_bytes,
            activation_bytes=max(trained_bytes + frozen_bytes, scoring_bytes),
            frozen_activation_bytes=frozen_bytes if trained_bytes + frozen_bytes >= scoring_bytes else scoring_bytes,
            half_precision_bytes=0 if precision == "float32" else num_parameters * BYTES_PER_VALUE[precision],
        ))  # fmt: skip
    return plans


def count_model_parameters(classifier: Classifier) -> int:
    """Count the parameters of backbone and head, including BatchNormalization's moving averages."""
    return count_parameters(classifier.variables.values())


def count_optimizer_slots(optimizer: Optimizer) -> int:
    """Return the number of values that a Keras optimizer stores per trainable parameter, such as 2 for Adam."""
    return {"sgd": 0, "rmsprop": 1}.get(optimizer.name, 2) + bool(optimizer.momentum)


def estimate_activations(
    classifier: Classifier, first_trainable: int | None, num_examples: int, precision: Precision = "float32",
    batch_norm_training: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Estimate the memory of the activations of a batch.

    The outputs of the first thawed layer and of all layers above it are stored for the gradient. Below that layer, only
    two outputs at a time are in memory, so the two largest ones are counted. A BatchNormalization layer that is folded
    into a convolution has no output. If its gamma and beta are trained, it stores its output, and with batch statistics
    also its centered and its scaled input. Measured memory is 0.75 to 1.1 times the estimate.

    Args:
        first_trainable: index in backbone.layers of the first trainable layer; None if all are frozen, or for
            inference.
        num_examples: number of examples in the batch.
        precision: precision of the activations.
        batch_norm_training: whether trainable BatchNormalization layers use batch statistics.

    Returns:
        The bytes of the layers from `first_trainable` up, and the bytes of the layers below it.
    """
    pairs = find_foldable_pairs(classifier.backbone)
    is_training = first_trainable is not None
    folded = {norm.name for _, norm in pairs if not (is_training and norm.trainable)}

    def output_bytes(layer: keras.Layer) -> int:
        outputs = layer.output if isinstance(layer.output, list | tuple) else [layer.output]
        num_copies = 1
        if isinstance(layer, keras.layers.BatchNormalization):
            num_copies = 3 if batch_norm_training and layer.trainable else layer.name not in folded
        return num_copies * sum(math.prod(o.shape[1:]) for o in outputs) * BYTES_PER_VALUE[precision]

    sizes = [num_examples * output_bytes(layer) for layer in classifier.backbone.layers]
    cut = len(sizes) if first_trainable is None else first_trainable
    return sum(sizes[cut:]), sum(sorted(sizes[:cut])[-2:])


def measure_resident_bytes() -> int:
    """Return the resident set size of this process in bytes, or its peak if there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024  # bytes in macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


MemoryUses = list[tuple[str, int]]  # uses of memory: (label, bytes)
# Labels of uses. Three of these uses grow with the batch size: ACTIVATIONS, BATCHES and TEACHER[1].
DECODED = "decoded images in memory"
HALF_PRECISION = "weights in half precision"
ACTIVATIONS, BATCHES = "activations of one batch", "batches read ahead"
TEACHER = "the teacher's variables", "its activations"
BATCHES_BYTES_PER_VALUE = 13  # five batches of uint8, of which four are read ahead, and two of float32
ESTIMATE_TOLERANCE = 1.25  # a run is rejected if its estimate exceeds the memory by more than this factor


def estimate_memory(
    classifier: Classifier, phases: list[PhasePlan], caches: dict[str, CachePlan], *, num_examples: int,
    num_replicas: int, baseline_bytes: int,
) -> MemoryUses:  # fmt: skip
    """Estimate this worker's uses of memory in the phase that needs most.

    Args:
        caches: plan of the decoded images' cache, by split name.
        num_examples: number of examples of a global batch that each replica gets.
        num_replicas: number of replicas on this worker.
        baseline_bytes: resident bytes of the process before the network is built.
    """

    def count_phase_bytes(phase: PhasePlan) -> int:
        return phase.gradient_bytes + phase.optimizer_bytes + phase.ema_bytes + phase.activation_bytes

    largest_phase = max(phases, key=count_phase_bytes)
    half_precision_bytes = largest_phase.half_precision_bytes * num_replicas
    return [
        ("TensorFlow and libraries, measured here", baseline_bytes),
        ("variables", count_variable_bytes(classifier.variables.values()) * num_replicas),
        (f"gradients (phase {largest_phase.name})", largest_phase.gradient_bytes * num_replicas),
        ("optimizer and averages", (largest_phase.optimizer_bytes + largest_phase.ema_bytes) * num_replicas),
        *([(HALF_PRECISION, half_precision_bytes)] if half_precision_bytes else []),
        (ACTIVATIONS, largest_phase.activation_bytes * num_replicas),
        (BATCHES, num_examples * num_replicas * classifier.image_size**2 * 3 * BATCHES_BYTES_PER_VALUE),
        ("compiled steps and buffers, about", COMPILED_BYTES),
        (DECODED, sum(c.bytes for c in caches.values() if c.where == "memory")),
    ]


def estimate_teacher_memory(
    variable_bytes: int, classifier: Classifier | None, *, every_step: bool, num_examples: int, num_replicas: int,
    num_label_values: int, precision: Precision,
) -> MemoryUses:  # fmt: skip
    """Estimate a teacher's uses of memory on this worker while the student trains.

    A teacher that predicts in every step needs its variables and activations. Otherwise only its soft labels, float32,
    are in memory, because its network is released before training begins.

    Args:
        variable_bytes: bytes of the teacher's variables.
        classifier: the teacher; None for a SavedModel, whose activations are unknown and counted as 0.
        every_step: whether the teacher predicts in every step.
        num_examples: number of examples that a replica processes in one forward pass.
        num_replicas: number of replicas on this worker.
        num_label_values: number of soft-label values: training examples times classes.
        precision: precision of the teacher's activations.
    """
    if not every_step:
        return [("its logits", 4 * num_label_values)]
    activations = 0
    if classifier:
        activations = sum(
            estimate_activations(classifier, first_trainable=None, num_examples=num_examples, precision=precision)
        )
    return [(TEACHER[0], variable_bytes * num_replicas), (TEACHER[1], activations * num_replicas)]


def select_gpu_uses(uses: MemoryUses) -> MemoryUses:
    """Select the uses that are in GPU memory if the worker has GPUs."""
    gpu_labels = ("variables", ACTIVATIONS, HALF_PRECISION, *TEACHER)
    return [use for use in uses if use[0] in gpu_labels or use[0].startswith(("grad", "opt"))]


def check_device_memory(
    config: RunConfig, uses: MemoryUses, limit: int, num_replicas: int, device: str = "this machine"
) -> str:
    """Return a warning if the estimated uses exceed a device's memory, or "" if they fit.

    Args:
        limit: memory of the device in bytes.
        num_replicas: number of replicas on all workers.
        device: name of the device in the message.

    Raises:
        ConfigError: the uses exceed `ESTIMATE_TOLERANCE` times the limit. Its `fix` suggests the largest batch size
            that fits, or another cache for decoded images.
    """
    total_bytes = sum(count for _, count in uses)
    batch_size = config.training.batch_size
    if total_bytes <= limit:
        return ""
    batch_bytes = sum(count for name, count in uses if name in (ACTIVATIONS, BATCHES, TEACHER[1]))
    divisor = compute_batch_size_multiple(config, num_replicas)
    maximum = int(batch_size * (limit - total_bytes + batch_bytes) / max(batch_bytes, 1)) // divisor * divisor
    decoded = sum(count for name, count in uses if name == DECODED)
    problem = f"needs about {format_bytes(total_bytes)} of memory, and {device} has {format_bytes(limit)}"
    fix = f"use {maximum} or less" if maximum >= divisor else "use a smaller model.image_size or another model.backbone"
    if maximum < divisor or config.training.accumulate > 1:
        fix += ", or raise training.accumulate"
    error = ConfigError(problem, key="training.batch_size", value=batch_size, fix=fix)
    cache = config.data.cache
    if decoded and total_bytes - decoded <= limit and (cache == "memory" or maximum < divisor):
        alternatives = "auto or disk" if cache == "memory" else "disk"
        fix = f"use {alternatives}: decoded images in memory are {format_bytes(decoded)} of it"
        error = ConfigError(problem, key="data.cache", value=cache, fix=fix)
    if total_bytes > ESTIMATE_TOLERANCE * limit:
        raise error
    return str(error)


def check_worker_memory(config: RunConfig, uses: MemoryUses, num_replicas: int) -> list[str]:
    """Apply `check_device_memory` to this worker's main memory and to its GPUs; return the warnings.

    Args:
        num_replicas: number of replicas on all workers.

    Raises:
        ConfigError: the run does not fit into the main memory or into the GPUs.
    """
    gpu_memory = query_gpu_memory()
    gpu_uses = select_gpu_uses(uses) if gpu_memory else []
    checks = [([use for use in uses if use not in gpu_uses], get_memory_limit_bytes(), "this machine")]
    if gpu_memory:
        checks.append((gpu_uses, gpu_memory, "the memory of its GPUs"))
    warnings = (check_device_memory(config, subset, limit, num_replicas, name) for subset, limit, name in checks)
    return [warning for warning in warnings if warning]
