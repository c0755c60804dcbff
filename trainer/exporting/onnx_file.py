"""The ONNX file, for ONNX Runtime, TensorRT and OpenVINO: float32, no decoding inside. Needs the extra `onnx`."""

from __future__ import annotations

import logging
from pathlib import Path

import tensorflow as tf

from trainer.exporting.card import label_lines
from trainer.exporting.subject import Subject, plain
from trainer.storage.files import write_whole

OPSET = 18  # of ONNX 1.13, 2022: what TensorRT 10 reads


def export_onnx(subject: Subject, path: Path) -> None:
    """Write `path` whole or not at all: `images` float32 [n, S, S, 3] RGB in 0..255 -> `probabilities` [n, classes].

    The class names are its metadata `labels`, one a line.
    """
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    size = subject.image_size
    given = [tf.TensorSpec([None, size, size, 3], tf.float32, "images")]
    with plain(subject.model):
        answer = tf.function(
            lambda images: {"probabilities": subject.model(images, training=False)}, input_signature=given
        )
        made, _ = tf2onnx.convert.from_function(answer, input_signature=given, opset=OPSET)
    onnx.helper.set_model_props(made, {"labels": label_lines(subject.class_names)})
    write_whole(path, made.SerializeToString())
