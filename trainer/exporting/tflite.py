"""The LiteRT (TFLite) file, for phones and small machines: float32, no decoding inside."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import tensorflow as tf

from trainer.storage.files import write_whole


def export_tflite(model: keras.Model, path: Path, image_size: int) -> None:
    """Write `path` whole or not at all: one input, float32 [n, S, S, 3] RGB in 0..255, one output, probabilities.

    A model that computes in half precision is written in float32, for LiteRT has few kernels for anything else.

    Args:
        model: float32 [n, S, S, 3] in 0..255 -> float32 probabilities [n, classes].
        path: ".../model.tflite".
        image_size: S, pixels.
    """
    assert model.input_shape == (None, image_size, image_size, 3), model.input_shape
    with in_float32(model), contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable it saves
        write_whole(path, tf.lite.TFLiteConverter.from_keras_model(model).convert())


@contextmanager
def in_float32(model: keras.Model) -> Iterator[None]:
    """While this holds, what is traced of `model` computes in float32, whatever precision it trained in."""

    def layers(of: keras.layers.Layer) -> list[keras.layers.Layer]:
        return [of, *(inner for layer in getattr(of, "layers", ()) for inner in layers(layer))]

    before = [(layer, layer.dtype_policy) for layer in layers(model)]
    try:
        for layer, _ in before:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in before:
            layer.dtype_policy = policy
