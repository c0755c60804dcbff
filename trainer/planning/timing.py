"""Measure a few steps of a run on this machine, and estimate its time from them."""

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
from trainer.types import Dataset, scored_split

BUDGET_SECONDS = 60.0  # for all measurements; none begins later
ROWS = 8  # images per measured step
CALLS, CALL_SECONDS = 3, 5.0  # measured calls after the one that compiles; none begins later


def format_time(seconds: float) -> str:
    """Format a rough duration: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def on_gpus() -> bool:
    """Return whether replicas compute in parallel, each on a GPU; those on CPUs have the same cores."""
    return bool(tf.config.list_physical_devices("GPU"))


def seconds_per_call(call: Callable[[], object]) -> float:
    """Return the median seconds of a few calls after the first."""
    call()
    seconds: list[float] = []
    while len(seconds) < CALLS and sum(seconds) < CALL_SECONDS:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def _batches(shape: tuple[int, ...], dtype: str, augmentation: Augmentation, seed: int) -> Any:
    """Return an iterator over a batch of random values, augmented anew in each step as images are in training."""
    index = np.arange(ROWS, dtype=np.int64)
    values = tf.cast(np.random.default_rng(seed).integers(0, 256, (ROWS, *shape)), dtype)
    columns = {"label": np.zeros(ROWS, np.int32), "weight": np.ones(ROWS, np.float32), "index": index}
    batch = {"image": values, "position": index, **columns}

    def change(batch: dict[str, Any], step: Any) -> dict[str, Any]:
        return batch | {"image": augment(batch["image"], augmentation, seed, tf.fill([ROWS], step), batch["index"])}

    steps = tf.data.Dataset.range(1 << 40)
    return iter(tf.data.Dataset.zip(tf.data.Dataset.from_tensors(batch).repeat(), steps).map(change).prefetch(1))


def training_seconds(
    config: RunConfig, classifier: Classifier, dataset: Dataset, phase: Phase, cut: Cut | None
) -> float:
    """Measure the seconds per image of training in a phase: on features at `cut`, or on images if that is None.

    The weights of the classifier change.
    """
    thaw = apply_thaw(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    lr = phase.optimizer.learning_rate
    schedule = build_schedule(phase.schedule, lr, total_steps=100, steps_per_epoch=10, batch_size=ROWS)
    optimizer = build_optimizer(phase.optimizer, schedule, thaw.lr_multipliers)
    settings = StepSettings.from_config(config, dataset, thaw.batch_norm_training)
    network = Tail(classifier, cut) if cut else classifier
    step = TrainingStep(tf.distribute.get_strategy(), network, thaw.trainable, optimizer,
                        dataclasses.replace(settings, accumulate=1))  # fmt: skip
    side = classifier.image_size
    if cut:
        batches = _batches(cut.shape, select_stored_dtype(phase, cut), Augmentation(), config.seed)
    else:
        batches = _batches((side, side, 3), "uint8", config.augmentation, config.seed)
    return seconds_per_call(lambda: step.run(batches, 1, 0, 0)) / ROWS


def scoring_seconds(classifier: Classifier, seed: int) -> float:
    """Measure the seconds per image of scoring, which are also those of computing features."""
    side = classifier.image_size
    predictor = Predictor(tf.distribute.get_strategy(), classifier)
    batch = next(_batches((side, side, 3), "uint8", Augmentation(), seed))
    return seconds_per_call(lambda: predictor.probabilities([batch], 1)) / ROWS


def estimate_time(
    config: RunConfig, classifier: Classifier, dataset: Dataset, inputs: Mapping[str, tuple[FeatureChoice, Division]],
    steps_per_epoch: int,
) -> dict[str, float]:  # fmt: skip
    """Estimate the seconds of each phase with its validation, and of scoring at the end, for one device.

    `inputs` has the planned input and the division of each phase. Returns {} if the time for measurements was not
    enough. Reading and decoding images, the teacher, compiling, export and report are not included.
    """
    end, counts = time.monotonic() + BUDGET_SECONDS, {name: split.count for name, split in dataset.splits.items()}
    if time.monotonic() >= end:
        return {}
    scoring, parts = scoring_seconds(classifier, config.seed), dict[str, float]()
    for name, phase in config.phases.items():
        if time.monotonic() >= end:
            return {}
        choice, division = inputs[name]
        cached = choice.input_kind == "cached"
        steps = config.phase_steps(phase, steps_per_epoch)
        images = steps / steps_per_epoch * counts["train"]
        seconds = images * training_seconds(config, classifier, dataset, phase, division.cut if cached else None)
        if cached:  # computed once, for training and validation
            seconds += scoring * (counts["train"] * (phase.augmented_views or 1) + counts["validation"])
        else:
            passes = 1 if choice.input_kind == "validation" else -(-steps // steps_per_epoch)
            seconds += scoring * counts["validation"] * passes * config.training.validation_share
        parts[name] = seconds
    return parts | {"scoring": scoring * counts[scored_split(dataset.splits)]}
