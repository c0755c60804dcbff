"""A small export with everything that one of a run has, and what its model says without any server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from trainer.subjects import subject_of

from tests.serving.pictures import photo
from trainer import config
from trainer.exporting.saved_model import export_saved_model
from trainer.imaging import decode_image
from trainer.models.classifier import Classifier, build_classifier

NAMES = ("daisy", "löwenzahn", "rose", "tulip")
SIZE, SEEN = 48, 120


@dataclass(frozen=True)
class Exported:
    """A folder as `output_dir` of a run leaves it, as far as serving looks at it."""

    folder: Path
    classifier: Classifier

    @property
    def dimensions(self) -> int:
        """Of an embedding in the log."""
        return 64

    def answers(self, files: list[bytes]) -> np.ndarray:
        """Float32 [n, classes]: decoded and classified as evaluation does."""
        return np.asarray(self.classifier.probabilities(decoded(files)))


def decoded(files: list[bytes]) -> tf.Tensor:
    return tf.stack([decode_image(tf.constant(data), SIZE, "stretch") for data in files])


def export(folder: Path) -> Exported:
    """MobileNetV2 of the package, with a head of random weights that are large enough to tell pictures apart."""
    model = config.Model(backbone="MobileNetV2", alpha=0.35, weights="glyphs", image_size=SIZE)
    classifier = build_classifier(model, len(NAMES), 1)
    classifier.output.kernel.assign(3 * classifier.output.kernel)
    images = decoded([photo(1000 + number) for number in range(SEEN)])
    seen = ("test", np.asarray(classifier.probabilities(images)), images.numpy())
    subject = subject_of(classifier, NAMES, "stretch", seen, lambda: images.numpy())
    export_saved_model(subject, folder / "export" / "saved_model" / "1")
    return Exported(folder, classifier)
