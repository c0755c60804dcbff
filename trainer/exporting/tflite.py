"""LiteRT (TFLite) files, for phones and small machines, in four precisions; no decoding inside."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf

from trainer.exporting.quiet import quiet
from trainer.exporting.subject import Subject, plain
from trainer.exporting.tflite_metadata import with_metadata
from trainer.storage.files import write_whole

Precision = Literal["float32", "float16", "dynamic", "int8"]


def export_tflite(subject: Subject, path: Path, precision: Precision) -> None:
    """Write `path` whole or not at all: one input, images [n, S, S, 3] RGB in 0..255, one output, probabilities.

    Args:
        path: ".../model.tflite".
        precision: `float32`; `float16`: weights of half the size; `dynamic`: weights in 8 bits, computing in float32
            where there is no better kernel; `int8`: everything in 8 bits, uint8 pixels in and probabilities in steps
            of 1/256 out, the ranges measured on `subject.examples`.
    """
    size = subject.image_size
    given = [tf.TensorSpec([None, size, size, 3], tf.float32, "images")]
    with plain(subject.model), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs were expected")  # int8 measures them
        answer = tf.function(lambda images: subject.model(images, training=False), input_signature=given)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([answer.get_concrete_function()], subject.model)
        converter.experimental_lower_to_saved_model = False  # constants: 4 times as fast, and int8 needs them
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            converter.representative_dataset = partial(_one_by_one, subject.examples())
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        with quiet():
            content = converter.convert()
    write_whole(path, with_metadata(content, subject.class_names))


def _one_by_one(images: np.ndarray) -> Iterator[list[np.ndarray]]:
    images = images.copy()
    images[0, 0, :2] = [[0], [255]]  # so that the input's range is 0..255 and a pixel is its own number
    for image in images:
        yield [image[None].astype(np.float32)]
