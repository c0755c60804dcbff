"""Estimate the time of a run from a few steps measured on this machine."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation, Phase, RunConfig
from trainer.data.augment.apply import augment
from trainer.evaluation.scoring import Predictor
from trainer.features.cut import Cut, Tail
from trainer.features.plan import Division, FeatureChoice, select_stored_dtype
from trainer.models.classifier import Classifier
from trainer.models.freezing import apply_thaw
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import StepSettings, TrainingStep
from trainer.types import Dataset, choose_scored_split

BUDGET_SECONDS = 60.0  # after this time no further measurement begins
BATCH_SIZE = 8  # images per measured step
CALLS, CALL_SECONDS = 3, 5.0  # maximum number and total seconds of the timed calls, after the first one, which compiles


def format_time(seconds: float) -> str:
    """Format a rough duration: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def has_gpus() -> bool:
    """Return whether this worker has GPUs. If not, its replicas compute on the same cores, so they do not save time."""
    return bool(tf.config.list_physical_devices("GPU"))


def measure_call(call: Callable[[], object]) -> float:
    """Return the median seconds of a few calls. The first call, which compiles, is not timed."""
    call()
    seconds: list[float] = []
    while len(seconds) < CALLS and sum(seconds) < CALL_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def _make_batches(shape: tuple[int, ...], dtype: str, augmentation: Augmentation, seed: int) -> Any:
    """Return an iterator that repeats a batch of random values, augmented differently in each step, as in training.

    `shape` is that of one image, or of its features at a cut.
    """
    index = np.arange(BATCH_SIZE, dtype=np.int64)
    values = tf.cast(np.random.default_rng(seed).integers(0, 256, (BATCH_SIZE, *shape)), dtype)
    labels = {"label": np.zeros(BATCH_SIZE, np.int32), "weight": np.ones(BATCH_SIZE, np.float32), "index": index}
    batch = {"image": values, "position": index, **labels}

    def augment_batch(batch: dict[str, Any], step: Any) -> dict[str, Any]:
        epochs = tf.fill([BATCH_SIZE], step)
        return batch | {"image": augment(batch["image"], augmentation, seed, epochs, batch["index"])}

    steps = tf.data.Dataset.range(1 << 40)
    return iter(tf.data.Dataset.zip(tf.data.Dataset.from_tensors(batch).repeat(), steps).map(augment_batch).prefetch(1))


def measure_training(
    config: RunConfig, classifier: Classifier, dataset: Dataset, phase: Phase, cut: Cut | None, xla: bool
) -> float:
    """Measure the seconds per image of training in a phase. The weights of the classifier are changed.

    Args:
        cut: train on features at this cut; None to train on images.
        xla: whether XLA compiles the step.
    """
    thaw = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    lr = phase.optimizer.learning_rate
    schedule = build_schedule(phase.schedule, lr, total_steps=100, steps_per_epoch=10, batch_size=BATCH_SIZE)
    optimizer = build_optimizer(phase.optimizer, schedule, thaw.lr_multipliers)
    settings = StepSettings.from_config(config, dataset, thaw.batch_norm_training, xla)
    network = Tail(classifier, cut) if cut else classifier
    step = TrainingStep(tf.distribute.get_strategy(), network, thaw.trainable, optimizer,
                        dataclasses.replace(settings, accumulate=1, virtual_replicas=None))  # fmt: skip
    side = classifier.image_size
    if cut:
        batches = _make_batches(cut.shape, select_stored_dtype(phase, cut), Augmentation(), config.seed)
    else:
        batches = _make_batches((side, side, 3), "uint8", config.augmentation, config.seed)
    return measure_call(lambda: step.run(batches, 1, 0, 0)) / BATCH_SIZE


def measure_scoring(classifier: Classifier, seed: int) -> float:
    """Measure the seconds per image of scoring. Computing the features of an image takes about as long."""
    side = classifier.image_size
    predictor = Predictor(tf.distribute.get_strategy(), classifier)
    batch = next(_make_batches((side, side, 3), "uint8", Augmentation(), seed))
    return measure_call(lambda: predictor.predict([batch], 1)) / BATCH_SIZE


def estimate_time(
    config: RunConfig, classifier: Classifier, dataset: Dataset, inputs: Mapping[str, tuple[FeatureChoice, Division]],
    compiled: Mapping[str, bool], steps_per_epoch: int,
) -> dict[str, float]:  # fmt: skip
    """Estimate the seconds of each phase with its validation, and of the scoring at the end, on one device.

    Reading and decoding images, the teacher, compiling, export and report are not included.

    Args:
        inputs: by phase, its planned input and the division of its network.
        compiled: by phase, whether XLA compiles its step.

    Returns:
        Seconds by name of the phase, and of "scoring"; {} if the measurements exceed `BUDGET_SECONDS`.
    """
    deadline, counts = time.monotonic() + BUDGET_SECONDS, {name: split.count for name, split in dataset.splits.items()}
    scoring, estimates = measure_scoring(classifier, config.seed), dict[str, float]()
    for name, phase in config.phases.items():
        if time.monotonic() >= deadline:
            return {}
        choice, division = inputs[name]
        cached = choice.input_kind == "cached"
        steps = config.phase_steps(phase, steps_per_epoch)
        images = steps / steps_per_epoch * counts["train"]
        cut = division.cut if cached else None
        seconds = images * measure_training(config, classifier, dataset, phase, cut, compiled[name])
        if cached:  # features are computed once, for training and validation
            seconds += scoring * (counts["train"] * (phase.augmented_views or 1) + counts["validation"])
        else:
            passes = 1 if choice.input_kind == "validation" else -(-steps // steps_per_epoch)
            seconds += scoring * counts["validation"] * passes * config.training.validation_share
        if config.training.validation_share < 1:  # the phase weights are scored on the entire split
            seconds += scoring * counts["validation"]
        estimates[name] = seconds
    return estimates | {"scoring": scoring * counts[choose_scored_split(dataset.splits)]}
