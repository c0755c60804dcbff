"""Export a SavedModel for TensorFlow Serving and `trainer.serve`. Its graph decodes and resizes encoded images."""

import os
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from trainer.data.decoding import decode_image
from trainer.exporting.bundle import ExportBundle
from trainer.exporting.model_card import format_labels
from trainer.exporting.reference import write_reference
from trainer.models.grad_cam import trace
from trainer.storage.local import temporary_folder, write_atomically

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"  # the path that TensorFlow Serving expects
# Images in the larger of two warm-up requests: after a warm-up with one image, the first larger batch would be slow.
WARMUP_BATCH_SIZE = 4
MAX_PARALLEL_DECODING = 32  # images of one request that are decoded at the same time


def write_warmup(saved_model: Path, image_size: int) -> None:
    """Write the warm-up requests of a SavedModel, which TensorFlow Serving executes before the model is available.

    Signatures for encoded images get two requests, with 1 and `WARMUP_BATCH_SIZE` images; `images` gets one, with 1.

    Args:
        saved_model: folder of the SavedModel.
        image_size: side of the model's input in pixels.
    """
    gradient = np.linspace(0, 255, image_size, dtype=np.float32)
    image = np.broadcast_to(gradient[None, :, None], (image_size, image_size, 3))
    encoded = tf.io.encode_jpeg(image.astype(np.uint8)).numpy()
    (saved_model / WARMUP_FILE).parent.mkdir()
    with tf.io.TFRecordWriter(str(saved_model / WARMUP_FILE)) as writer:
        for count in (1, WARMUP_BATCH_SIZE):
            for signature in ("serving_default", "image_bytes", "explain"):
                writer.write(_encode_request(signature, "image_bytes", np.array([encoded] * count, object)))
        writer.write(_encode_request("images", "images", image[None]))


def _encode_request(signature: str, name: str, value: np.ndarray) -> bytes:
    """Return a serialized PredictionLog with one request that has the input `name`."""
    prediction_log = prediction_log_pb2.PredictionLog()
    request = prediction_log.predict_log.request
    request.model_spec.name = "kubetune"
    request.model_spec.signature_name = signature
    request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return prediction_log.SerializeToString(deterministic=True)


class _ServedModule(tf.Module):
    """The object that is saved: the functions of the signatures, the variables that they read, and two assets.

    A Keras model is not an attribute, because saving or loading its thousands of objects would take seconds. The
    signatures for encoded images call `decode`, which is traced once.
    """

    def __init__(self, bundle: ExportBundle, labels: Path, reference: Path) -> None:
        super().__init__(name="classifier")
        side, resize, orientation = bundle.image_size, bundle.resize, bundle.orientation
        self.labels, self.reference = (tf.saved_model.Asset(str(path)) for path in (labels, reference))
        self.model_variables = list(bundle.variables)
        encoded_spec = tf.TensorSpec([None], tf.string, "image_bytes")

        @trace(input_signature=[encoded_spec])
        def decode(image_bytes: tf.Tensor) -> tf.Tensor:
            return tf.map_fn(
                lambda data: decode_image(data, side, resize, orientation),
                image_bytes,
                fn_output_signature=tf.TensorSpec([side, side, 3], tf.uint8),
                parallel_iterations=MAX_PARALLEL_DECODING,
            )

        @trace(input_signature=[encoded_spec])
        def image_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return bundle.predict(tf.cast(decode(image_bytes), tf.float32))

        @trace(input_signature=[encoded_spec])
        def explain(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return bundle.explain(decode(image_bytes))

        self.images, self.image_bytes, self.explain = bundle.predict, image_bytes, explain
        # Traced before `tf.saved_model.save`, in whose context TensorFlow would trace `bundle.predict` again.
        for function in (image_bytes, explain):
            function.get_concrete_function()


def export_saved_model(bundle: ExportBundle, folder: Path) -> None:
    """Write a SavedModel to `folder` (".../saved_model/VERSION").

    The files are written to a temporary folder. Then an existing `folder` is deleted, and the new one is renamed to it.

    Signatures:
    - `image_bytes`, also as `serving_default`: string [n], encoded images -> `probabilities` float32 [n, classes].
      Images are decoded and resized as in evaluation.
    - `images`: float32 [n, S, S, 3], RGB in 0..255 -> `probabilities`.
    - `explain`: string [n], encoded images -> `probabilities`, `embedding` float32 [n, C] (the pooled features), and
      `heatmap` float32 [n, h, w] in 0..1, the Grad-CAM heatmap of the predicted class, of the size of the feature maps.

    Assets: `labels.txt`, one class name per line, and `reference.json`. `assets.extra` has the warm-up requests.
    """
    # A model server that lists the folder now ignores the temporary folder, since its name is not a version number.
    with temporary_folder(folder) as scratch:
        labels_file, reference_file, new_model = (scratch / name for name in ("labels.txt", "reference.json", "model"))
        write_atomically(labels_file, format_labels(bundle.class_names))
        write_reference(reference_file, bundle.reference)
        module = _ServedModule(bundle, labels_file, reference_file)
        signatures = {name: getattr(module, name) for name in ("image_bytes", "images", "explain")}
        tf.saved_model.save(module, str(new_model), signatures={"serving_default": module.image_bytes, **signatures})
        write_warmup(new_model, bundle.image_size)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(new_model, folder)
