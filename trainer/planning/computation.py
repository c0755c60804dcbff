"""Decide whether XLA compiles the training step of each phase, and check that the step can be deterministic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.config.schema import RunConfig
from trainer.data.sharding import count_steps_per_epoch
from trainer.errors import ConfigError
from trainer.features.plan import Division
from trainer.models.classifier import Classifier
from trainer.models.gradients import DifferentiatedOperation
from trainer.monitoring.log import log
from trainer.types import Dataset, Device

# Keras layer -> TensorFlow 2.21's message that XLA cannot compute its gradient deterministically on GPUs. Without XLA,
# the gradients of all backbones are deterministic: no backbone uses an operation for which TensorFlow has the message
# "A deterministic GPU implementation of ... is not currently available" (tests/planning/test_computation.py traces
# them).
NO_DETERMINISTIC_XLA_GRADIENT = {
    "MaxPooling2D": "GPU MaxPool gradient ops do not yet have a deterministic XLA implementation"
}

# XLA pays off above this number of images per backbone layer. Measured with MobileNetV2 at 224 px, batch size 256, all
# layers thawed, bfloat16, on an H200: compiling its 154 layers takes 24 s, and each image then takes 58 us less
# (docs/speed.md), so the limit is 24 s / 154 / 58 us = 2,700.
IMAGES_PER_LAYER = 2_700


@dataclass(frozen=True)
class PhaseWorkload:
    """The properties of a phase that determine whether compiling its step with XLA pays off."""

    images: int  # images that one replica, or one virtual replica, trains on in the phase
    layers: int  # number of backbone layers
    differentiated: tuple[DifferentiatedOperation, ...]  # backbone operations whose gradient a step computes


@dataclass(frozen=True)
class Computation:
    """Whether XLA compiles the training step of a phase, with the reason."""

    xla: bool
    reason: str  # a phrase, such as "as configured"

    def describe(self, name: str, config: RunConfig) -> str:
        """Format the log line about phase `name`."""
        determinism = "deterministic" if config.runtime.deterministic else "not deterministic"
        xla_state = f"XLA {'on' if self.xla else 'off'}, {self.reason}"
        return f"computation of phase {name}: {config.runtime.precision}, {determinism}, {xla_state}"


def decide_computation(config: RunConfig, name: str, device: Device, workload: PhaseWorkload) -> Computation:
    """Decide whether XLA compiles the training step of phase `name`.

    With `runtime.xla=auto`, XLA compiles on GPUs if the phase is long enough to outweigh the compilation time, unless
    the run must be deterministic and XLA lacks a deterministic gradient.

    Raises:
        ConfigError: `runtime.xla` is true and the run must be deterministic, but XLA has no deterministic gradient for
            an operation that the phase differentiates.
    """
    runtime = config.runtime
    blockers = [op for op in workload.differentiated if op.class_name in NO_DETERMINISTIC_XLA_GRADIENT]
    obstacle = ""
    if device.kind == "GPU" and runtime.deterministic and blockers:
        obstacle = (
            f"the gradient of {blockers[0].name} ({blockers[0].class_name}) has no deterministic XLA kernel on GPUs"
        )
    if runtime.xla is True and obstacle:
        raise ConfigError(
            f"{obstacle}, and phase {name} needs it",
            key="runtime.xla",
            value="true",
            fix="use auto or false, set runtime.deterministic=false, or thaw fewer layers",
        )
    if runtime.xla != "auto":
        return Computation(runtime.xla, "as configured")
    if device.kind == "CPU":
        return Computation(False, "on a CPU it would be slower")
    if obstacle:
        return Computation(False, obstacle)
    min_images = IMAGES_PER_LAYER * workload.layers
    reason = f"{workload.images:,} images per GPU, and compiling {workload.layers} layers pays from {min_images:,} on"
    return Computation(workload.images >= min_images, reason)


def plan_computations(
    config: RunConfig, device: Device, num_replicas: int, classifier: Classifier, dataset: Dataset,
    divisions: Mapping[str, Division],
) -> dict[str, Computation]:  # fmt: skip
    """Decide for each phase, by name, whether XLA compiles its step; raise the ConfigError of `decide_computation`.

    Args:
        num_replicas: number of replicas on all workers. With virtual replicas, their number is used instead, so that a
            run's results are bit-identical on any number of devices.
        divisions: by phase name, the division of the network into trunk and tail.
    """
    steps_per_epoch = count_steps_per_epoch(dataset.splits["train"], config.training.batch_size)
    num_parts = config.training.virtual_replicas or num_replicas  # into which a global batch is divided
    computations = {}
    for name, phase in config.phases.items():
        num_images = config.count_phase_steps(phase, steps_per_epoch) * config.training.batch_size // num_parts
        workload = PhaseWorkload(num_images, len(classifier.backbone.layers), divisions[name].differentiated)
        computations[name] = decide_computation(config, name, device, workload)
    return computations


def adopt_computations(
    control: ControlChannel, config: RunConfig, device: Device, computations: Mapping[str, Computation],
    run_json: Mapping[str, Any],
) -> dict[str, bool]:  # fmt: skip
    """Return for each phase, by name, whether XLA compiles its step, and log it. All workers must call this.

    All workers use the chief's decisions. A resumed run repeats those in its run.json, so that its results stay
    bit-identical.

    Args:
        computations: the decisions of `plan_computations`, for phases that run.json lacks.
        run_json: content of run.json if the run resumes, else {}.
    """

    def choose() -> tuple[dict[str, bool], list[str]]:
        recorded = run_json.get("xla", {})
        choices = {
            name: Computation(recorded[name], "as this run began") if name in recorded else computation
            for name, computation in computations.items()
        }
        return {name: c.xla for name, c in choices.items()}, [c.describe(name, config) for name, c in choices.items()]

    compiled, lines = control.broadcast("computations", choose)
    if device.kind == "GPU" or config.runtime.xla == "auto":
        for line in lines:
            log.info(line)
    return compiled
