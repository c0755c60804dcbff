"""Estimates of the steps, parameters and memory of a run before it begins."""

import math
import os
import resource
from dataclasses import dataclass

import keras
import tensorflow as tf

from trainer.config.schema import RunConfig
from trainer.data.images import CachePlan
from trainer.models.classifier import Classifier, count_parameters, variable_bytes
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.types import Split


def bytes_of_split(split: Split) -> int:
    """Estimate the bytes of a split by its files, or by its fraction of each shard; 0 if one of them is not local."""
    try:
        if split.files:
            return sum(os.stat(path).st_size for path in split.files)
        return sum(round(os.stat(s.path).st_size * (s.stop - s.start) / max(s.count, 1)) for s in split.shards)
    except OSError:
        return 0


# Measured with TensorFlow 2.21: the peak of the quickstart, 984 MB, less all other uses, 806 MB.
COMPILED_BYTES = 180_000_000


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The plan of one phase; gradients, optimizer, averages and activations are bytes per replica."""

    name: str
    steps: int
    epochs: float
    thaw: ThawPlan
    trainable: int  # number of trainable parameters
    trains: frozenset[int]  # indices of the backbone's layers with trainable variables
    gradients: int
    optimizer: int
    averages: int
    activations: int
    saves: int  # maximum number of checkpoints


def plan_phases(config: RunConfig, classifier: Classifier, epoch: int, rows: int) -> list[PhasePlan]:
    """Plan every phase, by applying its thaw rule; the classifier remains in the state of the last phase.

    `epoch` is the length of an epoch in steps, `rows` the number of examples that a replica computes at once.

    Raises:
        ModelError: a thaw rule matches no layer.
    """
    plans = []
    every = max(config.runtime.checkpoint_every.steps(epoch, config.training.batch_size), 1)
    for name, phase in config.phases.items():
        thaw = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
        steps = config.phase_steps(phase, epoch)
        rate = build_schedule(phase.schedule, phase.optimizer.learning_rate, total_steps=steps,
                              steps_per_epoch=epoch, batch_size=config.training.batch_size)  # fmt: skip
        optimizer = build_optimizer(phase.optimizer, rate, thaw.lr_multipliers)
        optimizer.build(list(thaw.trainable.values()))
        sizes = variable_bytes(thaw.trainable.values())
        saves = math.ceil(steps / epoch) * max(math.ceil(min(epoch, steps) / every), 1)
        plans.append(PhasePlan(
            name=name, steps=steps, epochs=steps / epoch, thaw=thaw, saves=saves, gradients=sizes,
            trainable=count_parameters(thaw.trainable.values()), averages=sizes if config.training.ema else 0,
            trains=frozenset(i for i, layer in enumerate(classifier.backbone.layers) if layer.trainable_weights),
            optimizer=variable_bytes(optimizer.variables),
            activations=activation_bytes(classifier, thaw.first_thawed, rows),
        ))  # fmt: skip
    return plans


def parameter_count(classifier: Classifier) -> int:
    """Count the parameters of backbone and head, including the moving statistics of BatchNormalization."""
    return count_parameters(classifier.variables.values())


def activation_bytes(classifier: Classifier, first_thawed: int | None, rows: int) -> int:
    """Estimate the bytes of the activations of `rows` examples.

    The outputs of the first thawed layer and all layers above it are stored for the gradient; below it only two at a
    time are in memory, and the largest two are counted.
    """

    def output_bytes(layer: keras.Layer) -> int:
        outputs = layer.output if isinstance(layer.output, list | tuple) else [layer.output]
        return sum(math.prod(o.shape[1:]) * tf.as_dtype(o.dtype).size for o in outputs)

    sizes = [rows * output_bytes(layer) for layer in classifier.backbone.layers]
    cut = len(sizes) if first_thawed is None else first_thawed
    return sum(sizes[cut:]) + sum(sorted(sizes[:cut])[-2:])


def peak_memory_bytes() -> int:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_rows(
    classifier: Classifier, phases: list[PhasePlan], caches: dict[str, CachePlan], replicas: int, before: int
) -> list[tuple[str, int]]:
    """List the uses of memory on this worker, with `replicas` replicas, in bytes, in the phase that needs most.

    `before` is the memory of the process with its libraries, before the network is built.
    """
    largest = max(phases, key=lambda p: p.gradients + p.optimizer + p.averages + p.activations)
    return [
        ("TensorFlow and libraries, measured here", before),
        ("variables", variable_bytes(classifier.variables.values()) * replicas),
        (f"gradients (phase {largest.name})", largest.gradients * replicas),
        ("optimizer and averages", (largest.optimizer + largest.averages) * replicas),
        ("activations of one batch", largest.activations * replicas),
        ("compiled steps and buffers, about", COMPILED_BYTES),
        ("decoded images in memory", sum(c.bytes for c in caches.values() if c.where == "memory")),
    ]
