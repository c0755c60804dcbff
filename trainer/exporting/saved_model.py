"""The SavedModel: TensorFlow Serving's format, with the decoding of images inside."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from trainer.data.decoding import decode_image
from trainer.exporting.bundle import ExportBundle
from trainer.exporting.model_card import write_labels
from trainer.exporting.reference import write_reference

WARMUP = "assets.extra/tf_serving_warmup_requests"
TOGETHER = 4  # images of the second request: what is compiled for one image may not serve several
DECODED_AT_ONCE = 32  # images of one request


def write_warmup(saved_model: Path, image_size: int) -> None:
    """Write the warm-up requests into the folder of a SavedModel: one image and several, as bytes and to explain, and
    one as pixels, of `image_size` pixels a side.
    """
    ramp = np.linspace(0, 255, image_size, dtype=np.float32)
    picture = np.broadcast_to(ramp[None, :, None], (image_size, image_size, 3))
    encoded = tf.io.encode_jpeg(picture.astype(np.uint8)).numpy()
    (saved_model / WARMUP).parent.mkdir()
    with tf.io.TFRecordWriter(str(saved_model / WARMUP)) as records:
        for count in (1, TOGETHER):
            for signature in ("serving_default", "image_bytes", "explain"):
                records.write(_request(signature, "image_bytes", np.array([encoded] * count, object)))
        records.write(_request("images", "images", picture[None]))


def _request(signature: str, name: str, value: np.ndarray) -> bytes:
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = "kubetune"
    request.model_spec.signature_name = signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return log.SerializeToString(deterministic=True)


class _Served(tf.Module):
    """The saved object: three signatures over one model, and its labels and reference as assets."""

    def __init__(self, subject: ExportBundle, labels: Path, reference: Path) -> None:
        super().__init__(name="classifier")
        self.model, self.explained = subject.model, subject.explain
        self.labels, self.reference = (tf.saved_model.Asset(str(path)) for path in (labels, reference))
        self.image_size, self.resize = subject.image_size, subject.resize
        encoded = [tf.TensorSpec([None], tf.string, "image_bytes")]
        shape = [None, self.image_size, self.image_size, 3]
        self.images = tf.function(self._images, input_signature=[tf.TensorSpec(shape, tf.float32, "images")])
        self.image_bytes = tf.function(self._image_bytes, input_signature=encoded)
        self.explain = tf.function(self._explain, input_signature=encoded)

    def _images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"probabilities": self.model(images, training=False)}

    def _image_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._images(self._pixels(image_bytes))

    def _explain(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.explained(self._pixels(image_bytes))

    def _pixels(self, image_bytes: tf.Tensor) -> tf.Tensor:
        pixels = tf.map_fn(
            lambda data: decode_image(data, self.image_size, self.resize),
            image_bytes,
            fn_output_signature=tf.TensorSpec([self.image_size, self.image_size, 3], tf.uint8),
            parallel_iterations=DECODED_AT_ONCE,
        )
        return tf.cast(pixels, tf.float32)


def export_saved_model(subject: ExportBundle, folder: Path) -> None:
    """Write `folder` whole or not at all; what was there is replaced.

    Signatures:
    `image_bytes` (also `serving_default`): string [n], encoded images, decoded and resized as evaluation does, to
    `probabilities` float32 [n, classes];
    `images`: float32 [n, S, S, 3], RGB in 0..255, to the same;
    `explain`: string [n] to `probabilities`, `embedding` float32 [n, C] and `heatmap` float32 [n, h, w] in 0..1, how
    much each part of the image speaks for its most probable class.

    Assets: `labels.txt`, one class a line, and `reference.json`. `assets.extra` holds the requests that TensorFlow
    Serving sends the model before it opens its ports, so that no client waits for the first answer.

    Args:
        folder: its last part is the version: ".../saved_model/1".
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name that a model server does not take for a version, should it list the folder before the rename.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        labels, reference, saved = (Path(beside) / name for name in ("labels.txt", "reference.json", "model"))
        write_labels(labels, subject.class_names)
        write_reference(reference, subject.reference)
        served = _Served(subject, labels, reference)
        signatures = {name: getattr(served, name) for name in ("image_bytes", "images", "explain")}
        tf.saved_model.save(served, str(saved), signatures={"serving_default": served.image_bytes, **signatures})
        write_warmup(saved, subject.image_size)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(saved, folder)
