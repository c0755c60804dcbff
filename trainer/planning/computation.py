"""Decide whether the training step of each phase is compiled by XLA, and check that it can be deterministic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.config.schema import RunConfig
from trainer.data.sharding import steps_per_epoch
from trainer.errors import ConfigError
from trainer.features.plan import Division
from trainer.models.classifier import Classifier
from trainer.models.gradients import Differentiated
from trainer.monitoring.log import log
from trainer.types import Dataset, Device

# Layers of Keras whose gradient XLA cannot compute deterministically on GPUs, with TensorFlow's message, in TensorFlow
# 2.21. Without XLA, all gradients of the backbones are deterministic: of the operations for which TensorFlow's library
# has the message "A deterministic GPU implementation of ... is not currently available", no backbone uses one
# (tests/planning/test_computation.py traces them).
NO_DETERMINISTIC_XLA_GRADIENT = {
    "MaxPooling2D": "GPU MaxPool gradient ops do not yet have a deterministic XLA implementation"
}

# MobileNetV2 at 224 px, batch 256, all layers thawed, bfloat16, on an H200: compiling its 154 layers takes 24 s, and an
# image then takes 58 us less (docs/speed.md), so it pays from 24 s / 154 / 58 us = 2,700 images per layer on.
IMAGES_PER_LAYER = 2_700


@dataclass(frozen=True)
class PhaseFacts:
    """What the decision for one phase depends on, in addition to the device and the settings."""

    images: int  # that one device trains on in the phase
    layers: int  # of the backbone
    differentiated: tuple[Differentiated, ...]


@dataclass(frozen=True)
class Computation:
    """How the training steps of a phase are computed, with the reason."""

    xla: bool
    reason: str

    def describe(self, name: str, config: RunConfig) -> str:
        """Format the log line about phase `name`."""
        order = "deterministic" if config.runtime.deterministic else "not deterministic"
        xla = f"XLA {'on' if self.xla else 'off'}, {self.reason}"
        return f"computation of phase {name}: {config.runtime.precision}, {order}, {xla}"


def decide_computation(config: RunConfig, name: str, device: Device, facts: PhaseFacts) -> Computation:
    """Decide whether XLA compiles the training step of phase `name`.

    Raises:
        ConfigError: `runtime.xla=true` is set, and an operation that the phase differentiates has no deterministic
            gradient under XLA.
    """
    runtime = config.runtime
    missing = [op for op in facts.differentiated if op.kind in NO_DETERMINISTIC_XLA_GRADIENT]
    forbidden = ""
    if device.kind == "GPU" and runtime.deterministic and missing:
        forbidden = f"the gradient of {missing[0].name} ({missing[0].kind}) has no deterministic XLA kernel on GPUs"
    if runtime.xla is True and forbidden:
        raise ConfigError(
            f"{forbidden}, and phase {name} needs it",
            key="runtime.xla",
            value="true",
            fix="use auto or false, set runtime.deterministic=false, or thaw fewer layers",
        )
    if runtime.xla != "auto":
        return Computation(runtime.xla, "as configured")
    if device.kind == "CPU":
        return Computation(False, "on a CPU it would be slower")
    if forbidden:
        return Computation(False, forbidden)
    needed = IMAGES_PER_LAYER * facts.layers
    counts = f"{facts.images:,} images per GPU, and compiling {facts.layers} layers pays from {needed:,} on"
    return Computation(facts.images >= needed, counts)


def plan_computations(
    config: RunConfig, device: Device, replicas: int, classifier: Classifier, dataset: Dataset,
    divisions: Mapping[str, Division],
) -> dict[str, Computation]:  # fmt: skip
    """Decide how each phase is computed; `replicas` is the number on all workers."""
    per_epoch = steps_per_epoch(dataset.splits["train"], config.training.batch_size)
    computations, parts = {}, config.training.virtual_replicas or replicas
    for name, phase in config.phases.items():
        images = config.phase_steps(phase, per_epoch) * config.training.batch_size // parts
        facts = PhaseFacts(images, len(classifier.backbone.layers), divisions[name].differentiated)
        computations[name] = decide_computation(config, name, device, facts)
    return computations


def adopt_computations(
    control: ControlChannel, config: RunConfig, device: Device, computations: Mapping[str, Computation],
    run_json: Mapping[str, Any],
) -> dict[str, bool]:  # fmt: skip
    """Return for each phase whether XLA compiles its step: as `run_json` of a resumed run has it, else as planned.

    All workers must call this. They get the decision of the chief.
    """

    def choose() -> tuple[dict[str, bool], list[str]]:
        recorded = run_json.get("xla", {})
        chosen = {
            name: Computation(recorded[name], "as this run began") if name in recorded else computation
            for name, computation in computations.items()
        }
        return {name: c.xla for name, c in chosen.items()}, [c.describe(name, config) for name, c in chosen.items()]

    compiled, lines = control.broadcast("computations", choose)
    if device.kind == "GPU" or config.runtime.xla == "auto":
        for line in lines:
            log.info(line)
    return compiled
