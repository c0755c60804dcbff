"""Requests that TensorFlow Serving makes to a model of its own accord, before it answers anyone.

https://www.tensorflow.org/tfx/serving/saved_model_warmup: a TFRecord file of PredictionLog messages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

WARMUP = "assets.extra/tf_serving_warmup_requests"
TOGETHER = 4  # images of the second request: what is compiled for one image may not serve several


def write_warmup(saved_model: Path, image_size: int) -> None:
    """One image and several, as bytes and to explain, and one as pixels.

    Args:
        saved_model: the folder of a SavedModel.
        image_size: S, pixels.
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
