"""Steps, parameters, memory and bytes of a run that has not begun."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from trainer.cluster.discovery import Cluster
from trainer.config.schema import RunConfig
from trainer.data.host import memory_budget_default
from trainer.data.order import Share, steps_per_epoch
from trainer.features.plan import choose, divisions, images_again, phase_epochs
from trainer.models.classifier import Classifier
from trainer.models.freezing import ThawPlan, apply_thaw
from trainer.run import GIGABYTE, steps_of
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.types import Dataset, Split


def bytes_of_split(split: Split) -> int:
    """Bytes of its files, or of its part of each shard; 0 for what is not on this disk."""
    try:
        if split.files:
            return sum(os.stat(path).st_size for path in split.files)
        return sum(round(os.stat(s.path).st_size * (s.stop - s.start) / max(s.count, 1)) for s in split.shards)
    except OSError:
        return 0


COMPILED = 180_000_000  # bytes; the quickstart's peak was 984 MB where all else added up to 806 MB (TensorFlow 2.21)


@dataclass(frozen=True)
class Kept:
    """Where the decoded images of a split would live: `memory`, `disk` or `none`, as `open_pixels` decides; or `once`,
    that is nowhere, since they are read but once.
    """

    where: str
    bytes: int


def kept_pixels(config: RunConfig, dataset: Dataset, size: int) -> dict[str, Kept]:
    """The rule and the budgets of `open_pixels`, in the order in which a run opens the splits."""
    runtime, cache = config.runtime, config.data.cache
    kept: dict[str, Kept] = {}
    memory = int(runtime.memory_budget_gb * GIGABYTE) if runtime.memory_budget_gb else memory_budget_default()
    for name in ("train", "validation", "test"):
        if name not in dataset.splits:
            continue
        needed = (dataset.splits[name].count + 1) * size * size * 3
        if cache == "memory" or (cache == "auto" and needed <= memory):
            kept[name], memory = Kept("memory", needed), memory - needed
        elif cache == "disk" or (cache == "auto" and needed <= int(runtime.disk_budget_gb * GIGABYTE)):
            kept[name] = Kept("disk", needed)
        else:
            kept[name] = Kept("none", needed)
    return kept


def choose_features(
    config: RunConfig, dataset: Dataset, classifier: Classifier, kept: dict[str, Kept]
) -> tuple[list[tuple[str, str]], dict[str, Kept]]:
    """A line a phase on what it trains on, as a run chooses when it begins; and what images then are kept.

    Raises:
        ConfigError: as the run would.
    """
    runtime, count = config.runtime, dataset.splits["train"].count
    memory = int(runtime.memory_budget_gb * GIGABYTE) if runtime.memory_budget_gb else memory_budget_default()
    scored = dataset.splits["validation"].count if "validation" in dataset.splits else 0
    choices = choose(
        config,
        divisions(config, classifier),
        phase_epochs(config, count),
        count + scored,
        scored,
        max(memory, int(runtime.disk_budget_gb * GIGABYTE)),
    )
    rows = [(name, f"{'cached' if choice.cached else 'live'}, {choice.why}") for name, choice in choices.items()]
    if config.data.cache == "auto" and not images_again(config, {n: c.reads for n, c in choices.items()}):
        rows.append(("", "the training images are read once, and not kept"))
        kept = kept | {"train": Kept("once", kept["train"].bytes)}
    return rows, kept


def share_of_worker(config: RunConfig, split: Split, cluster: Cluster, kept: str) -> tuple[Share, int]:
    """How the workers would share the training split (as `start.share_data`), and the steps of an epoch."""
    by = config.data.shard_by
    if cluster.size == 1 or len(split.shards) < cluster.size:
        by = "record"
    elif by == "auto":
        by = "file" if kept == "none" else "record"
    share = Share(cluster.index, cluster.size, by)
    return share, steps_per_epoch(split, config.training.batch_size, share)


@dataclass(frozen=True)
class PhasePlan:
    """One phase; sizes in bytes, activations of one replica's piece of a batch."""

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
    """Apply each phase's thaw in turn; the classifier is left as the last phase has it.

    Args:
        epoch: steps of an epoch.
        rows: examples that a replica computes at once.

    Raises:
        ModelError: a rule of freezing matches nothing.
    """
    plans = []
    every = max(config.runtime.checkpoint_every.steps(epoch, config.training.batch_size), 1)
    for name, phase in config.phases.items():
        thaw = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
        steps = steps_of(phase, config, epoch)
        rate = build_schedule(phase.schedule, phase.optimizer.learning_rate, total_steps=steps,
                              steps_per_epoch=epoch, batch_size=config.training.batch_size)  # fmt: skip
        optimizer = build_optimizer(phase.optimizer, rate, thaw.lr_multipliers)
        optimizer.build(list(thaw.trainable.values()))
        sizes = bytes_of(thaw.trainable.values())
        layers = classifier.backbone.layers
        plans.append(
            PhasePlan(
                name=name,
                steps=steps,
                epochs=steps / epoch,
                thaw=thaw,
                trainable=sum(math.prod(v.shape) for v in thaw.trainable.values()),
                trains=frozenset(i for i, layer in enumerate(layers) if layer.trainable_weights),
                gradients=sizes,
                optimizer=bytes_of(optimizer.variables),
                averages=sizes if config.training.ema else 0,
                activations=activation_bytes(classifier, thaw.first_thawed, rows),
                saves=math.ceil(steps / epoch) * max(math.ceil(min(epoch, steps) / every), 1),
            )
        )
    return plans


def bytes_of(variables: Any) -> int:
    """Of memory, one copy of each."""
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def parameters(classifier: Classifier) -> int:
    """Of backbone and head, moving averages included."""
    return sum(math.prod(v.shape) for v in classifier.variables.values())


def activation_bytes(classifier: Classifier, first_thawed: int | None, rows: int) -> int:
    """What the layers put out for `rows` examples: all that gradients flow through is kept, below it two at a time."""
    sizes = [rows * _output_bytes(layer) for layer in classifier.backbone.layers]
    border = len(sizes) if first_thawed is None else first_thawed
    return sum(sizes[border:]) + sum(sorted(sizes[:border])[-2:])


def _output_bytes(layer: keras.Layer) -> int:
    outputs = layer.output if isinstance(layer.output, list | tuple) else [layer.output]
    return sum(math.prod(o.shape[1:]) * tf.as_dtype(o.dtype).size for o in outputs)


def resident() -> int:
    """The most bytes of memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_rows(
    classifier: Classifier, phases: list[PhasePlan], kept: dict[str, Kept], replicas: int, before: int
) -> list[tuple[str, int]]:
    """What takes memory, and how much, in the phase that takes most; every replica of this worker counted.

    Args:
        before: bytes of the process with its libraries, before the network.
    """
    most = max(phases, key=lambda p: p.gradients + p.optimizer + p.averages + p.activations)
    return [
        ("TensorFlow and libraries, measured here", before),
        ("variables", bytes_of(classifier.variables.values()) * replicas),
        (f"gradients (phase {most.name})", most.gradients * replicas),
        ("optimizer and averages", (most.optimizer + most.averages) * replicas),
        ("activations of one batch", most.activations * replicas),
        ("compiled steps and buffers, about", COMPILED),
        ("decoded images kept in memory", sum(k.bytes for k in kept.values() if k.where == "memory")),
    ]


def checkpoint_bytes(classifier: Classifier, phases: list[PhasePlan]) -> int:
    """Of the largest one."""
    return bytes_of(classifier.variables.values()) + max(p.optimizer + p.averages for p in phases)
