"""From a scored classifier to what is exported of it, and which examples its files are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.images import ImageStore
from trainer.exporting.bundle import ExportBundle, ParityExamples
from trainer.exporting.formats import export_formats
from trainer.exporting.model_card import write_labels
from trainer.exporting.reference import reference_distribution, write_reference
from trainer.models.classifier import Classifier
from trainer.models.grad_cam import Explainer, explain
from trainer.types import Scored

EXAMPLES = 1000  # of the scored split are sent through every exported file
REPRESENTATIVE = 200  # of the training split tell an int8 file its ranges


def chosen_examples(count: int, most: int) -> np.ndarray:
    """int64: at most so many of `count` places, ascending; the same ones every time, spread over all classes."""
    return np.sort(np.random.default_rng(count).permutation(count)[:most]).astype(np.int64)


def export_classifier(
    home: Path,
    classifier: Classifier,
    images: ImageStore,
    scored: Scored,
    explainer: Explainer,
    check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write labels.txt, reference.json and the formats of the configuration below `home`, each tried on held-out
    examples: at the end of a run, and later for `python -m trainer.export`.

    Args:
        scored: what the classifier answers for all examples of a split that it did not learn from.
        check: as in `export_formats`.

    Returns:
        facts by format, as `export_formats`.
    """
    config, dataset = images.config, images.dataset
    chosen = chosen_examples(len(scored.indices), EXAMPLES)
    examples = images.rows(scored.split, scored.indices[chosen])
    bundle = ExportBundle(
        model=classifier.keras_model(),
        explain=lambda pixels: explain(classifier, pixels),
        class_names=dataset.class_names,
        image_size=classifier.image_size,
        resize=config.model.resize,
        reference=reference_distribution(
            scored.split,
            dataset.class_names,
            scored.probabilities,
            explainer(examples)["embedding"],
            classifier.image_size,
            config.model.resize,
        ),
        examples=lambda: images.rows("train", chosen_examples(dataset.splits["train"].count, REPRESENTATIVE)),
    )
    write_labels(home / "labels.txt", bundle.class_names)
    write_reference(home / "reference.json", bundle.reference)
    held_out = ParityExamples(examples, scored.labels[chosen], scored.probabilities[chosen])
    return export_formats(home, config.export.formats, bundle, held_out, config.export.max_accuracy_drop, check)
