"""A small export with everything that one of a run has, and what its model says without any server."""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tests.exporting.subjects import SIZE, bundle_for, small_model
from trainer.data.decoding import decode_image
from trainer.exporting.saved_model import export_saved_model


@dataclass(frozen=True)
class Exported:
    """A folder as `output_dir` of a run leaves it, as far as serving looks at it."""

    folder: Path
    model: keras.Model

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return (self.folder / "export/saved_model/1/assets/labels.txt").read_text(encoding="utf-8").splitlines()

    def answers(self, files: list[bytes]) -> np.ndarray:
        """Float32 [n, classes]: decoded and classified as evaluation does."""
        pixels = [decode_image(tf.constant(data), SIZE, "stretch") for data in files]
        return np.asarray(self.model(tf.cast(tf.stack(pixels), tf.float32), training=False))


def export(folder: Path) -> Exported:
    """The network that the tests of exports have; its "heatmap" is how red an image is."""
    model = small_model()
    export_saved_model(bundle_for(model), folder / "export" / "saved_model" / "1")
    return Exported(folder, model)
