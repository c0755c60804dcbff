"""From a scored classifier to what is exported of it, and which examples its files are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import RunConfig
from trainer.exporting.bundle import HeldOut, Subject
from trainer.exporting.formats import export_formats
from trainer.exporting.model_card import write_labels
from trainer.exporting.reference import reference_distribution, write_reference
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Look, explain
from trainer.types import Dataset

EXAMPLES = 1000  # of the scored split are sent through every exported file
REPRESENTATIVE = 200  # of the training split tell an int8 file its ranges

Pictures = Callable[[str, np.ndarray], np.ndarray]  # a split and example indices -> uint8 [k, S, S, 3]


@dataclass(frozen=True)
class Scored:
    """What a classifier says of all examples of a split that it did not learn from."""

    split: str
    indices: np.ndarray  # int64 [n]: of the examples, ascending
    labels: np.ndarray  # int32 [n]
    probabilities: np.ndarray  # float32 [n, classes]


def chosen_examples(count: int, most: int) -> np.ndarray:
    """int64: at most so many of `count` places, ascending; the same ones every time, spread over all classes."""
    return np.sort(np.random.default_rng(count).permutation(count)[:most]).astype(np.int64)


def write_exports(
    home: Path,
    config: RunConfig,
    classifier: Classifier,
    dataset: Dataset,
    scored: Scored,
    pictures: Pictures,
    look: Look,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the formats of the configuration below `home`, each tried on held-out
    examples; facts by format, as `export_formats`, whose `check` it is.
    """
    chosen = chosen_examples(len(scored.indices), EXAMPLES)
    images = pictures(scored.split, scored.indices[chosen])
    subject = Subject(
        model=classifier.keras_model(),
        explain=lambda pixels: explain(classifier, pixels),
        class_names=dataset.class_names,
        image_size=classifier.image_size,
        resize=config.model.resize,
        reference=reference_distribution(
            scored.split,
            dataset.class_names,
            scored.probabilities,
            look(images)["embedding"],
            classifier.image_size,
            config.model.resize,
        ),
        examples=lambda: pictures("train", chosen_examples(dataset.splits["train"].count, REPRESENTATIVE)),
    )
    write_labels(home / "labels.txt", subject.class_names)
    write_reference(home / "reference.json", subject.reference)
    held_out = HeldOut(images, scored.labels[chosen], scored.probabilities[chosen])
    return export_formats(home, config.export.formats, subject, held_out, config.export.max_accuracy_drop, check)
