"""Estimates of steps, parameters, memory and bytes of a run before it begins."""

import math
import os
import resource
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.config.schema import RunConfig
from trainer.data.images import CachePlan
from trainer.models.classifier import Classifier
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.types import Split


def bytes_of_split(split: Split) -> int:
    """Bytes of the files of a split, or of its part of each shard; 0 if they are not on this disk."""
    try:
        if split.files:
            return sum(os.stat(path).st_size for path in split.files)
        return sum(round(os.stat(s.path).st_size * (s.stop - s.start) / max(s.count, 1)) for s in split.shards)
    except OSError:
        return 0


COMPILED = 180_000_000  # bytes; the quickstart's peak was 984 MB where all else added up to 806 MB (TensorFlow 2.21)


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The plan of one phase; sizes in bytes, activations of one replica's part of a batch."""

    name: str
    steps: int
    epochs: float
    thaw: ThawPlan
    trainable: int  # parameters
    trains: frozenset[int]  # layers of the backbone with something to train
    gradients: int
    optimizer: int
    averages: int
    activations: int
    saves: int  # checkpoints, at most


def plan_phases(config: RunConfig, classifier: Classifier, epoch: int, rows: int) -> list[PhasePlan]:
    """Apply each phase's thaw in turn; the classifier is left in the state of the last phase.

    `epoch` is in steps; a replica computes `rows` examples at once.

    Raises:
        ModelError: a thaw rule matches nothing.
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
        sizes = bytes_of(thaw.trainable.values())
        layers = classifier.backbone.layers
        saves = math.ceil(steps / epoch) * max(math.ceil(min(epoch, steps) / every), 1)
        plans.append(PhasePlan(
            name=name, steps=steps, epochs=steps / epoch, thaw=thaw, saves=saves, gradients=sizes,
            trainable=count(thaw.trainable.values()), averages=sizes if config.training.ema else 0,
            trains=frozenset(i for i, layer in enumerate(layers) if layer.trainable_weights),
            optimizer=bytes_of(optimizer.variables),
            activations=activation_bytes(classifier, thaw.first_thawed, rows),
        ))  # fmt: skip
    return plans


def bytes_of(variables: Any) -> int:
    """Bytes of one copy of some variables."""
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def count(variables: Any) -> int:
    """Number of parameters in some variables."""
    return sum(math.prod(v.shape) for v in variables)


def parameters(classifier: Classifier) -> int:
    """Number of parameters of backbone and head, moving averages included."""
    return count(classifier.variables.values())


def activation_bytes(classifier: Classifier, first_thawed: int | None, rows: int) -> int:
    """Bytes of the layers' outputs for `rows` examples: all above the lowest thawed layer, below it two at a time."""

    def output_bytes(layer: keras.Layer) -> int:
        outputs = layer.output if isinstance(layer.output, list | tuple) else [layer.output]
        return sum(math.prod(o.shape[1:]) * tf.as_dtype(o.dtype).size for o in outputs)

    sizes = [rows * output_bytes(layer) for layer in classifier.backbone.layers]
    border = len(sizes) if first_thawed is None else first_thawed
    return sum(sizes[border:]) + sum(sorted(sizes[:border])[-2:])


def resident() -> int:
    """Peak memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_rows(
    classifier: Classifier, phases: list[PhasePlan], caches: dict[str, CachePlan], replicas: int, before: int
) -> list[tuple[str, int]]:
    """Bytes of memory by use, in the phase that takes most, every replica of this worker counted.

    `before` is the memory of the process with its libraries, before the network.
    """
    most = max(phases, key=lambda p: p.gradients + p.optimizer + p.averages + p.activations)
    return [
        ("TensorFlow and libraries, measured here", before),
        ("variables", bytes_of(classifier.variables.values()) * replicas),
        (f"gradients (phase {most.name})", most.gradients * replicas),
        ("optimizer and averages", (most.optimizer + most.averages) * replicas),
        ("activations of one batch", most.activations * replicas),
        ("compiled steps and buffers, about", COMPILED),
        ("decoded images in memory", sum(c.bytes for c in caches.values() if c.where == "memory")),
    ]
