"""Warnings about settings that are valid but probably not intended: printed by a plan, and logged by a run."""

import numpy as np

from trainer.config.schema import RequestedConfig, RunConfig
from trainer.data.images import plan_image_caches
from trainer.data.sharding import steps_per_epoch
from trainer.models.classifier import Classifier
from trainer.planning.estimates import memory_rows, memory_warnings, plan_phases
from trainer.types import Dataset

DOMINANT_FRACTION = 0.6  # fraction of the training examples above which one class is worth a warning


def run_warnings(
    config: RunConfig, classifier: Classifier, dataset: Dataset, *, workers: int, replicas: int, before: int
) -> list[str]:
    """Return the warnings of a run, as its plan has them; raise ConfigError if it does not fit into the memory.

    There are `replicas` on each of the `workers`; `before` is the memory of the process before the network was built.
    """
    rows = max(config.training.batch_size // (workers * replicas), 1)
    epoch = steps_per_epoch(dataset.splits["train"], config.training.batch_size)
    caches = plan_image_caches(config, dataset, classifier.image_size, train_images_read_once=False)
    phases = plan_phases(config, classifier, epoch, max(rows // config.training.accumulate, 1))
    uses = memory_rows(classifier, phases, caches, rows=rows, replicas=replicas, before=before)
    memory = memory_warnings(config, uses, workers * replicas)
    return [*memory, *data_warnings(config, dataset, epoch), *settings_warnings(config)]


def settings_warnings(config: RequestedConfig) -> list[str]:
    """Return the warnings that follow from the configuration alone."""
    warnings = []
    settings = config.phases if isinstance(config, RunConfig) else {}
    frozen = [name for name, phase in settings.items() if phase.batch_norm == "frozen"]
    if config.model.weights == "none" and not config.warm_start and frozen:
        warnings.append(
            f"model.weights=none with batch_norm=frozen in {', '.join(frozen)}: normalization stays as initialized, "
            f"scores stay near chance; set phases.{frozen[0]}.batch_norm=train and .thaw=all"
        )
    if limits := [f"debug.{key}={value}" for key, value in config.debug if value]:
        warnings.append(f"{', '.join(limits)}: this is a trial run")
    return warnings


def data_warnings(config: RunConfig, dataset: Dataset, epoch: int, labels_known: bool = True) -> list[str]:
    """Return the warnings about the data with these settings; `epoch` is the length of an epoch in steps."""
    warnings, train = [], dataset.splits["train"]
    counts = np.bincount(train.labels, minlength=len(dataset.class_names))
    largest = int(counts.argmax())
    if labels_known and counts[largest] > DOMINANT_FRACTION * counts.sum() and len(counts) > 1:
        fraction, name = f"{counts[largest] / counts.sum():.0%}", dataset.class_names[largest]
        warnings.append(f"{fraction} of the training examples are {name}: a constant prediction is right {fraction} of "
                        "the time; try training.class_weights=balanced")  # fmt: skip
    every = config.runtime.checkpoint_every.steps(epoch, config.training.batch_size)
    if short := ", ".join(name for name, phase in config.phases.items() if every > config.phase_steps(phase, epoch)):
        warnings.append(f"runtime.checkpoint_every={every:,} steps is longer than {short}: a stop costs up to all of "
                        "it")  # fmt: skip
    if "test" not in dataset.splits and not config.debug.overfit:
        of_test = config.data.test_fraction
        fix = f"data.test_fraction={of_test:g} leaves none, add images" if of_test else "set data.test_fraction"
        warnings.append(f"there is no test split: the score is of the split that chose the checkpoint; {fix}")
    validation = dataset.splits["validation"].count if "validation" in dataset.splits else 0
    if 0 < validation < 100 and not any("validation has only" in note for note in dataset.notes):
        warnings.append(f"validation has only {validation:,} examples: each is {100 / validation:.1f} points of "
                        "accuracy")  # fmt: skip
    return warnings
