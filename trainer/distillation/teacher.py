"""Teachers: trained networks that answer beside the labels (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.errors import DataError
from trainer.models.classifier import Classifier

_TINY = 1.2e-38  # probabilities are floored here before the logarithm


@dataclass(frozen=True)
class Teacher:
    """A network that only answers; S is the side of the images it was trained on, pixels."""

    image_size: int
    answer: Callable[[Any], Any]  # float32 [b, S, S, 3] in 0..255 -> float32 [b, classes]

    def logits(self, images: Any, *, training: bool = False) -> tf.Tensor:  # noqa: ARG002 - it never trains
        """uint8 or float32 [b, s, s, 3] in 0..255 -> float32 [b, classes], up to a constant of each row; no gradient.

        Images of another side are resized to S (bilinear). Normalisation and dropout are those of inference.
        """
        pixels = tf.cast(images, tf.float32)
        if pixels.shape[1] != self.image_size:
            pixels = tf.image.resize(pixels, [self.image_size, self.image_size])
        return tf.stop_gradient(self.answer(pixels))


def classifier_as_teacher(classifier: Classifier) -> Teacher:
    """A teacher out of a classifier that holds its weights."""
    return Teacher(classifier.image_size, lambda images: classifier.logits(images, training=False))


def saved_model_as_teacher(folder: Path, address: str) -> Teacher:
    """A teacher out of an exported SavedModel (`trainer/exporting/saved_model.py`).

    Call it under the strategy's scope.

    Args:
        address: what the user called it.

    Raises:
        DataError: it has no signature `images` that answers `probabilities` for images of one size.
    """
    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures.get("images")
    given = signature.structured_input_signature[1].get("images") if signature else None
    if given is None or "probabilities" not in signature.structured_outputs or not given.shape[1]:
        raise DataError(
            f"distillation.teacher={address} has no signature `images` that answers `probabilities`; give "
            "export/saved_model/1 of a run, or its output_dir"
        )

    def answer(images: Any) -> Any:
        assert loaded is not None  # its variables live as long as it does
        return tf.math.log(tf.maximum(signature(images=images)["probabilities"], _TINY))

    return Teacher(int(given.shape[1]), answer)
