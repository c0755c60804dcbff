"""From a classifier to what is exported of it, and which examples its files are tried on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.exporting.reference import reference_distribution
from trainer.exporting.subject import Subject
from trainer.imaging import Resize
from trainer.models.classifier import Classifier
from trainer.models.explanations import explain

EXAMPLES = 1000  # of the scored split are sent through every exported file
REPRESENTATIVE = 200  # of the training split tell an int8 file its ranges
BATCH = 32


def chosen_examples(count: int, most: int) -> np.ndarray:
    """int64: at most so many of `count` places, ascending; the same ones every time, spread over all classes."""
    return np.sort(np.random.default_rng(count).permutation(count)[:most]).astype(np.int64)


def subject_of(
    classifier: Classifier,
    class_names: tuple[str, ...],
    resize: Resize,
    seen: tuple[str, np.ndarray, np.ndarray],
    examples: Callable[[], np.ndarray],
) -> Subject:
    """What is exported of a classifier.

    Args:
        seen: a split that it did not learn from: its name, its probabilities float32 [n, classes], and images of it,
            uint8 [m, S, S, 3].
        examples: fetches training images, uint8 [k, S, S, 3].
    """
    split, probabilities, images = seen
    embed = tf.function(lambda batch: classifier.pooled(classifier.features(batch)), reduce_retracing=True)
    parts = [embed(tf.constant(images[at : at + BATCH])).numpy() for at in range(0, len(images), BATCH)]
    size = classifier.image_size
    return Subject(
        model=classifier.keras_model(),
        explain=lambda pixels: explain(classifier, pixels),
        class_names=class_names,
        image_size=size,
        resize=resize,
        reference=reference_distribution(split, class_names, probabilities, np.concatenate(parts), size, resize),
        examples=examples,
    )
