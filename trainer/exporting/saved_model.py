"""The SavedModel: TensorFlow Serving's format, with the decoding of images inside."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from trainer.exporting.card import write_labels
from trainer.imaging import Resize, decode_image

DECODED_AT_ONCE = 32  # images of one request


class _Served(tf.Module):
    """What is saved: two signatures over one model, and the class names beside it."""

    def __init__(self, model: keras.Model, labels: Path, image_size: int, resize: Resize) -> None:
        super().__init__(name="classifier")
        self.model = model
        self.labels = tf.saved_model.Asset(str(labels))
        self.image_size, self.resize = image_size, resize
        side = [None, image_size, image_size, 3]
        self.images = tf.function(self._images, input_signature=[tf.TensorSpec(side, tf.float32, "images")])
        self.image_bytes = tf.function(
            self._image_bytes, input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")]
        )

    def _images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": self.model(images, training=False)}

    def _image_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        pixels = tf.map_fn(
            lambda data: decode_image(data, self.image_size, self.resize),
            image_bytes,
            fn_output_signature=tf.TensorSpec([self.image_size, self.image_size, 3], tf.uint8),
            parallel_iterations=DECODED_AT_ONCE,
        )
        return self._images(tf.cast(pixels, tf.float32))


def export_saved_model(
    model: keras.Model, folder: Path, class_names: Sequence[str], image_size: int, resize: Resize
) -> None:
    """Write `folder` whole or not at all; what was there is replaced.

    Signatures, each answering `probabilities` float32 [n, classes]:
    `image_bytes` (also `serving_default`): string [n], encoded images, decoded and resized as evaluation does;
    `images`: float32 [n, S, S, 3], RGB in 0..255. The class names are the asset `labels.txt`, one a line.

    Args:
        model: float32 [n, S, S, 3] in 0..255 -> float32 probabilities [n, classes].
        folder: its last part is the version: ".../saved_model/1".
        class_names: in the order of the probabilities.
        image_size: S, pixels.
        resize: stretch | crop, as in training.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name that a model server does not take for a version, should it look before the rename.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        labels = Path(beside) / "labels.txt"
        write_labels(labels, class_names)
        served = _Served(model, labels, image_size, resize)
        signatures = {
            "serving_default": served.image_bytes,
            "image_bytes": served.image_bytes,
            "images": served.images,
        }
        tf.saved_model.save(served, f"{beside}/model", signatures=signatures)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(f"{beside}/model", folder)
