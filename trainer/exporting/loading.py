"""An exported file as others see it: loaded by the library that it is for, and asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ModelError
from trainer.exporting.quiet import quiet

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> float32 probabilities [b, classes]


def load_export(path: Path) -> Classify:
    """Load the folder of a SavedModel, or a .keras, .tflite or .onnx file.

    Raises:
        ModelError: it is missing or damaged.
    """
    load = {".keras": _keras, ".tflite": _tflite, ".onnx": _onnx}.get(path.suffix, _saved_model)
    try:
        return load(path)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {reason}; export it again") from error


def _saved_model(folder: Path) -> Classify:
    loaded = tf.saved_model.load(str(folder))  # the signature lives only as long as this
    return lambda images: loaded.signatures["images"](images=tf.constant(images, tf.float32))["probabilities"].numpy()


def _keras(path: Path) -> Classify:
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    answer = tf.function(lambda images: model(tf.cast(images, tf.float32), training=False), reduce_retracing=True)
    return lambda images: answer(tf.constant(images)).numpy()


def _tflite(path: Path) -> Classify:
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(model_content=path.read_bytes())
        source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        interpreter.allocate_tensors()

    def classify(images: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(source["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], images.astype(source["dtype"]))
        interpreter.invoke()
        answers = interpreter.get_tensor(target["index"])
        if answers.dtype == np.float32:
            return answers
        scale, zero = target["quantization"]
        return (answers.astype(np.float32) - zero) * np.float32(scale)

    return classify


def _onnx(path: Path) -> Classify:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images.astype(np.float32)})[0]
