"""What the parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.cluster.preemption import StopFlag
from trainer.config import Phase, RunConfig
from trainer.contracts import Dataset
from trainer.data.pipeline import evaluation_batches
from trainer.data.pixels import Pixels, data_errors, memory_budget_default, open_pixels
from trainer.models.classifier import Classifier
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.state import RunState
from trainer.training.step import EvaluationPass
from trainer.training.telemetry import Telemetry

GIGABYTE = 1024**3


@dataclass
class Run:
    """One run in one process."""

    config: RunConfig
    folder: Path
    strategy: tf.distribute.Strategy
    dataset: Dataset
    classifier: Classifier
    evaluator: EvaluationPass
    checkpoints: CheckpointFolder
    telemetry: Telemetry
    stop: StopFlag
    state: RunState
    steps_per_epoch: int
    loaded: dict[str, np.ndarray] = field(default_factory=dict)  # a checkpoint not yet taken into an optimizer
    saved_step: int = 0
    opened: dict[str, Pixels] = field(default_factory=dict)

    def pixels(self, split: str) -> Pixels:
        """The decoded images of a split; the first call may fill a cache."""
        if split not in self.opened:
            data, runtime = self.config.data, self.config.runtime
            memory = int(runtime.memory_budget_gb * GIGABYTE) if runtime.memory_budget_gb else memory_budget_default()
            taken = sum(pixels.memory_bytes for pixels in self.opened.values())
            self.opened[split] = open_pixels(
                self.dataset.splits[split],
                size=self.classifier.image_size,
                resize=self.config.model.resize,
                cache=data.cache,
                cache_dir=Path(runtime.cache_dir).expanduser(),
                fingerprint=self.dataset.fingerprint,
                memory_budget=memory - taken,
                disk_budget=int(runtime.disk_budget_gb * GIGABYTE),
                threads=runtime.data_threads,
                on_error=data.on_error,
                note=say,
            )
        return self.opened[split]


def say(text: str) -> None:
    """Print progress before a slow thing begins, so that a start that hangs can be told from one that works."""
    print(text, flush=True)


def steps_of(phase: Phase, config: RunConfig, steps_per_epoch: int) -> int:
    """The most optimizer steps that a phase takes."""
    steps = phase.duration.steps(steps_per_epoch, config.training.batch_size)
    return min(steps, config.debug.max_steps or steps)


def predict(job: Run, split: str, share: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels and indices of a split, every example once; fewer where the run is told to stop."""
    batches = job.strategy.distribute_datasets_from_function(
        lambda _: evaluation_batches(
            job.pixels(split),
            batch_size=job.config.training.batch_size,
            replicas=job.strategy.num_replicas_in_sync,
            share=share,
            threads=job.config.runtime.data_threads,
        )
    )
    with data_errors(job.pixels(split)):
        return job.evaluator.probabilities(batches, stop=lambda: job.stop.reason is not None)


def again(job: Run) -> str:
    """How to go on."""
    return f"Start the same command again with output_dir={job.folder} to go on"
