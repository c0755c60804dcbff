"""A classifier from the values of a checkpoint: what an evaluation, an export and a student's teacher compute with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from trainer.config import schema as config
from trainer.models.classifier import Classifier, build_classifier
from trainer.models.weights import settle_input
from trainer.training import variables


def rebuild_classifier(
    model: config.Model,
    class_count: int,
    seed: int,
    values: dict[str, np.ndarray],
    source: str,
    scope: AbstractContextManager[object] | None = None,
) -> Classifier:
    """The classifier that was trained, computing what it computed then. Set the Keras precision policy before.

    Args:
        values: of each of its variables, by name; others are ignored.
        source: where they come from, for messages.
        scope: of the strategy that is to hold the variables.

    Raises:
        ModelError: the backbone cannot be had.
        DataError: a value is missing or has another shape.
    """
    bare = model.model_copy(update={"weights": "none"})  # each of its values is in the checkpoint
    with scope or nullcontext():
        classifier = build_classifier(bare, class_count, seed)
    variables.write(classifier.variables, values, source)
    settle_input(classifier.backbone)
    return classifier
