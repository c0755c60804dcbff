"""What the parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.cluster.control import Peers
from trainer.cluster.signals import StopFlag
from trainer.config.schema import Augmentation, Phase, RunConfig
from trainer.data.decoding import Resize, plain
from trainer.data.host import memory_budget_default
from trainer.data.images import Cache, Pixels, data_errors, open_pixels
from trainer.data.order import ALONE, Order, Share
from trainer.data.pipeline import Kept, evaluation_batches, evaluation_gate, training_batches, training_gate
from trainer.data.shard_gate import Gate
from trainer.distillation.teacher import Teacher
from trainer.errors import INTERRUPTED, ToldToStop
from trainer.evaluation.scoring import EvaluationPass, by_index
from trainer.features.plan import Division, Reads, images_again
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Look, looker
from trainer.monitoring.health import signs
from trainer.monitoring.log import say
from trainer.runs.checkpoints import CheckpointFolder, packed, unpacked
from trainer.runs.clock import Ledger
from trainer.runs.metrics import Telemetry
from trainer.runs.publisher import Publisher
from trainer.runs.restarts import STOPPED, Attempts
from trainer.storage.shard_cache import ShardCache
from trainer.training.losses import class_weights
from trainer.training.state import RunState
from trainer.training.step import StepSettings
from trainer.types import Dataset

GIGABYTE = 1024**3


@dataclass
class Run:
    """One run as one worker sees it. Only the chief, worker 0, writes into `folder`."""

    config: RunConfig
    folder: Path
    address: str  # of the output_dir, as the user gave it
    publisher: Publisher
    peers: Peers
    strategy: tf.distribute.Strategy
    dataset: Dataset
    classifier: Classifier
    evaluator: EvaluationPass
    checkpoints: CheckpointFolder
    telemetry: Telemetry
    ledger: Ledger
    attempts: Attempts
    stop: StopFlag
    state: RunState
    share: Share = ALONE
    steps_per_epoch: int = 0
    loaded: dict[str, np.ndarray] = field(default_factory=dict)  # a checkpoint not yet taken into an optimizer
    saved_step: int = 0
    opened: dict[str, Pixels] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)  # local copy -> the address it was fetched from
    shards: ShardCache | None = None  # where shards come from while they are read; None: all that is read is here
    teacher: Teacher | None = None  # answers in every step
    answers: np.ndarray | None = None  # a teacher's, for every training example: float32 [count, classes]
    divisions: dict[str, Division] = field(default_factory=dict)  # of the classifier, by phase
    reads: dict[str, Reads] = field(default_factory=dict)  # phase -> cached features, or images

    def pixels(self, split: str) -> Pixels:
        """The decoded images of a split; the first call may fill a cache."""
        if split not in self.opened:
            cache, why = self.config.data.cache, "as asked"
            if split == "train" and cache == "auto" and not self.images_again:
                cache, why = "none", "training reads them once, for features"
            size, resize = self.classifier.image_size, self.config.model.resize
            self.opened[split] = self.pixels_at(split, size, resize, cache, why)
        return self.opened[split]

    @cached_property
    def look(self) -> Look:
        """What the classifier says of images, and where it looked; compiled once for exports and report."""
        return looker(self.classifier)

    @property
    def images_again(self) -> bool:
        """Whether the training images are read more than once from here on; not so where features are cached."""
        return images_again(self.config, self.reads, self.state.phase)

    def pixels_at(self, split: str, size: int, resize: Resize, cache: Cache, why_none: str = "as asked") -> Pixels:
        """The decoded images of a split at any size, kept as `cache` says."""
        data, runtime = self.config.data, self.config.runtime
        return open_pixels(
            self.dataset.splits[split],
            size=size,
            resize=resize,
            cache=cache,
            cache_dir=Path(runtime.cache_dir).expanduser(),
            fingerprint=self.dataset.fingerprint,
            memory_budget=memory_left(self),
            disk_budget=int(runtime.disk_budget_gb * GIGABYTE),
            threads=runtime.data_threads,
            on_error=data.on_error,
            note=say,
            check=lambda: self.stop.check(f"while the {split} images were decoded"),
            shards=self.shards,
            why_none=why_none,
        )

    def name_of(self, split: str, index: int) -> str:
        """The file or record of an example, as the user knows it."""
        name = self.dataset.splits[split].name_of(index)
        for path, address in self.where.items():
            if name.startswith(f"{path}/"):
                return address + name[len(path) :]
        return name

    @property
    def replicas(self) -> int:
        """Of this worker."""
        return self.strategy.num_replicas_in_sync // self.peers.size

    def told_to_stop(self, where: str) -> bool:
        """Whether any worker was told to stop: the same answer on all of them, asked at the same point by all."""
        return self.peers.any(f"stop {where}", self.stop.reason is not None)

    def wishes_to_stop(self) -> bool:
        """Whether this worker was told to stop. The compiled step asks at each step, which so is a sign of life."""
        signs.moved()
        return self.stop.reason is not None

    def note_stop(self, reason: str) -> None:
        """The order to stop arrived. Who is stuck ends here: the step that could save will not come."""
        if stuck := signs.stuck():
            self.peers.end(INTERRUPTED, f"{reason} while {stuck}; what was saved before is intact. {again(self)}")
        self.attempts.end(STOPPED, reason)  # should the time to stop not suffice


def memory_left(job: Run) -> int:
    """Bytes of the memory budget that decoded images have not taken."""
    given = job.config.runtime.memory_budget_gb
    budget = int(given * GIGABYTE) if given else memory_budget_default()
    return budget - sum(pixels.memory_bytes for pixels in job.opened.values())


def steps_of(phase: Phase, config: RunConfig, steps_per_epoch: int) -> int:
    """The most optimizer steps that a phase takes."""
    steps = phase.duration.steps(steps_per_epoch, config.training.batch_size)
    return min(steps, config.debug.max_steps or steps)


def weights_of_classes(job: Run) -> tuple[float, ...] | None:
    """One loss weight a class; see `class_weights`."""
    return class_weights(job.config.training.class_weights, job.dataset.class_names, job.dataset.splits["train"].labels)


def step_settings(job: Run, batch_norm_training: bool) -> StepSettings:
    """What the configuration says of a step."""
    training, runtime, distillation = job.config.training, job.config.runtime, job.config.distillation
    teaching = {"alpha": distillation.alpha, "temperature": distillation.temperature} if distillation else {}
    return StepSettings(
        seed=job.config.seed,
        label_smoothing=training.label_smoothing,
        focal_gamma=training.focal_gamma if training.loss == "focal" else None,
        class_weights=weights_of_classes(job),
        clip_norm=training.clip_norm,
        accumulate=training.accumulate,
        ema=training.ema,
        batch_norm_training=batch_norm_training,
        loss_scaling=runtime.precision == "float16",
        xla=runtime.xla,
        **teaching,
    )


def training_stream(job: Run, kept: Kept, augmentation: Augmentation, views: int | None) -> tuple[Any, Gate]:
    """Training batches from the state's position on, endless; and what waits for the shards they are read from."""
    config, replicas, state = job.config, job.replicas, job.state
    order = Order(
        batch_size=config.training.batch_size,
        seed=config.seed,
        window=config.data.shuffle_window,
        first_epoch=state.epoch,
        first_step=state.epoch_step,
        share=job.share,
    )

    def batches(_: tf.distribute.InputContext) -> tf.data.Dataset:
        images = training_batches(
            kept, order, replicas=replicas, augmentation=augmentation, views=views, threads=config.runtime.data_threads
        )
        if job.answers is None:
            return images
        answers = tf.constant(job.answers)
        return images.map(plain(lambda batch: {**batch, "teacher": tf.gather(answers, batch["index"])}))

    gate = training_gate(kept, order, replicas=replicas, augmentation=augmentation)
    return job.strategy.distribute_datasets_from_function(batches), gate


def score(
    job: Run, evaluator: EvaluationPass, pixels: Kept, batch_size: int, topic: str, part: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels and indices of `pixels`, every example once, on the chief.

    Each worker scores examples of its own. The other workers get their own part back, and so does everyone where the
    run is told to stop meanwhile: ask `told_to_stop` after it.
    """
    replicas, share, threads = job.replicas, job.share, job.config.runtime.data_threads

    def batches() -> tuple[Any, int]:
        one, count = evaluation_batches(
            pixels, batch_size=batch_size, replicas=replicas, part=part, threads=threads, share=share
        )
        return job.strategy.distribute_datasets_from_function(lambda _: one), count

    stream, count = evaluator.opened(pixels, (batch_size, part), batches)
    gate = evaluation_gate(pixels, batch_size=batch_size, replicas=replicas, part=part, share=share)

    def ready() -> bool:
        """Whether to go on, once the shards of the next batch are here."""
        try:
            waited = gate.before(batch_size // share.workers)
        except ToldToStop:
            return False
        if waited > 0:
            job.ledger.mark("evaluation", waited)
        signs.moved()
        return job.stop.reason is None

    with data_errors(pixels):
        own = evaluator.probabilities(stream, count, ready)
    gate.close()
    if job.peers.size == 1:
        return own
    everyone = job.peers.gather(topic, packed(dict(zip("pli", own, strict=True))))
    return by_index([(a["p"], a["l"], a["i"]) for a in map(unpacked, everyone) if len(a["l"])]) if everyone else own


def from_chief(job: Run, topic: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The chief's arrays on every worker, by name."""
    if job.peers.size == 1:
        return arrays
    return unpacked(job.peers.from_chief(topic, packed(arrays) if job.peers.is_chief else b""))


def again(job: Run) -> str:
    """How to go on."""
    return f"Start the same command again with output_dir={job.address} to go on"
