"""Estimate the time of a run from a few steps measured on this machine."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation, Phase, RunConfig
from trainer.data.augment.apply import augment
from trainer.data.host import count_usable_cpus
from trainer.evaluation.scoring import Predictor
from trainer.features.cut import Cut, Tail
from trainer.features.litert import LiteRTClassifier, LiteRTTrunk
from trainer.features.plan import Division, FeatureChoice, TrunkEngine, select_stored_dtype
from trainer.models.classifier import Classifier
from trainer.models.freezing import set_trainable_layers
from trainer.training.optimizers import build_optimizer, build_schedule
from trainer.training.step import Network, StepSettings, TrainingStep
from trainer.types import Dataset, choose_scored_split

BUDGET_SECONDS = 60.0  # after this time, no further measurement begins
BATCH_SIZE = 8  # images per measured step
MAX_TIMED_CALLS = 3  # maximum number of timed calls of one measurement
MAX_TIMED_SECONDS = 5.0  # after this total time, no further call of a measurement is timed


def format_time(seconds: float) -> str:
    """Format a rough duration: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def has_gpus() -> bool:
    """Return whether this worker has GPUs. Without them, its replicas use the same CPU cores, which saves no time."""
    return bool(tf.config.list_physical_devices("GPU"))


def measure_call(call: Callable[[], object]) -> float:
    """Return the median time of a few calls in seconds. The first call, which compiles, is not timed."""
    call()
    seconds: list[float] = []
    while len(seconds) < MAX_TIMED_CALLS and sum(seconds) < MAX_TIMED_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def _make_batches(shape: tuple[int, ...], dtype: str, augmentation: Augmentation, seed: int) -> Any:
    """Return an iterator that repeats a batch of random values, augmented differently in each step, as in training.

    `shape` is the shape of one image, or of its features at a cut.
    """
    indices = np.arange(BATCH_SIZE, dtype=np.int64)
    images = tf.cast(np.random.default_rng(seed).integers(0, 256, (BATCH_SIZE, *shape)), dtype)
    labels = {"label": np.zeros(BATCH_SIZE, np.int32), "weight": np.ones(BATCH_SIZE, np.float32), "index": indices}
    batch = {"image": images, "position": indices, **labels}

    def augment_batch(batch: dict[str, Any], step: Any) -> dict[str, Any]:
        epochs = tf.fill([BATCH_SIZE], step)
        return batch | {"image": augment(batch["image"], augmentation, seed, epochs, batch["index"])}

    steps = tf.data.Dataset.range(1 << 40)
    return iter(tf.data.Dataset.zip(tf.data.Dataset.from_tensors(batch).repeat(), steps).map(augment_batch).prefetch(1))


def measure_training(
    config: RunConfig, classifier: Classifier, dataset: Dataset, phase: Phase, network: Network, cut: Cut | None,
    xla: bool,
) -> float:  # fmt: skip
    """Measure the seconds per image of training in a phase. This changes the classifier's weights.

    Args:
        network: the classifier, or its tail.
        cut: the cut whose features the network takes; None if it takes images.
        xla: whether XLA compiles the step.
    """
    freezing = set_trainable_layers(classifier, phase.thaw, phase.batch_norm, phase.backbone_rate, phase.layer_decay)
    learning_rate = phase.optimizer.learning_rate
    schedule = build_schedule(phase.schedule, learning_rate, total_steps=100, steps_per_epoch=10, batch_size=BATCH_SIZE)
    optimizer = build_optimizer(phase.optimizer, schedule, freezing.lr_multipliers)
    settings = StepSettings.from_config(config, dataset, freezing.batch_norm_training, xla)
    step = TrainingStep(tf.distribute.get_strategy(), network, freezing.trainable, optimizer,
                        dataclasses.replace(settings, accumulate=1, virtual_replicas=None))  # fmt: skip
    image_size = classifier.image_size
    if cut:
        batches = _make_batches(cut.shape, select_stored_dtype(phase, cut), Augmentation(), config.seed)
    else:
        batches = _make_batches((image_size, image_size, 3), "uint8", config.augmentation, config.seed)
    return measure_call(lambda: step.run(batches, 1, 0, 0)) / BATCH_SIZE


def measure_scoring(classifier: Classifier, seed: int) -> float:
    """Measure the seconds per image of scoring. Computing an image's features takes about as long."""
    image_size = classifier.image_size
    predictor = Predictor(tf.distribute.get_strategy(), classifier)
    batch = next(_make_batches((image_size, image_size, 3), "uint8", Augmentation(), seed))
    return measure_call(lambda: predictor.predict([batch], 1)) / BATCH_SIZE


def measure_trunk(trunk: LiteRTTrunk, image_size: int, seed: int) -> float:
    """Measure the seconds per image in which LiteRT computes features."""
    images = np.random.default_rng(seed).integers(0, 256, (BATCH_SIZE, image_size, image_size, 3), np.uint8)
    return measure_call(lambda: trunk.features(images)) / BATCH_SIZE


def estimate_time(
    config: RunConfig, classifier: Classifier, dataset: Dataset, inputs: Mapping[str, tuple[FeatureChoice, Division]],
    engines: Mapping[str, TrunkEngine], compiled: Mapping[str, bool], steps_per_epoch: int,
) -> dict[str, float]:  # fmt: skip
    """Estimate the seconds of each phase, including its validation, and of the scoring at the end, on one device.

    Reading and decoding images, the teacher, compiling, export and report are not included.

    Args:
        inputs: by phase name, the planned input, and the division of the network into trunk and tail.
        engines: by phase name, the library that computes the trunk.
        compiled: by phase name, whether XLA compiles the step.

    Returns:
        Seconds by phase name, and by "scoring" for the scoring at the end; {} if `BUDGET_SECONDS` have passed before a
        phase was measured.
    """
    deadline = time.monotonic() + BUDGET_SECONDS
    counts = {name: split.count for name, split in dataset.splits.items()}
    if time.monotonic() >= deadline:  # with a budget of 0, nothing is measured
        return {}
    scoring_seconds = measure_scoring(classifier, config.seed)
    estimates = dict[str, float]()
    for name, phase in config.phases.items():
        if time.monotonic() >= deadline:
            return {}
        choice, division = inputs[name]
        is_cached = choice.input_kind == "cached"
        steps = config.count_phase_steps(phase, steps_per_epoch)
        num_images = steps / steps_per_epoch * counts["train"]
        cut = division.cut if is_cached else None
        network: Network = Tail(classifier, cut) if cut else classifier
        feature_seconds = scoring_seconds  # per image
        if division.cut and engines[name] == "litert":
            trunk = LiteRTTrunk(classifier, [division.cut], count_usable_cpus())
            feature_seconds = measure_trunk(trunk, classifier.image_size, config.seed)
            network = network if cut else LiteRTClassifier(classifier, division.cut, trunk)
        seconds = num_images * measure_training(config, classifier, dataset, phase, network, cut, compiled[name])
        if is_cached:  # features are computed once, for training and validation
            seconds += feature_seconds * (counts["train"] * (phase.augmented_views or 1) + counts["validation"])
        else:
            num_passes = 1 if choice.input_kind == "validation" else -(-steps // steps_per_epoch)
            seconds += scoring_seconds * counts["validation"] * num_passes * config.training.validation_share
        if config.training.validation_share < 1:  # the phase weights are scored on the entire split
            seconds += scoring_seconds * counts["validation"]
        estimates[name] = seconds
    return estimates | {"scoring": scoring_seconds * counts[choose_scored_split(dataset.splits)]}
