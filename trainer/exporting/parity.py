"""Whether what was exported answers as the trainer did."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

BATCH = 32


def largest_difference(exported: Path, probabilities: np.ndarray, images: np.ndarray) -> float:
    """Load an export back in and send images through it; the largest |difference| of any probability.

    Args:
        exported: the folder of a SavedModel, or a .tflite file.
        probabilities: float32 [n, classes], what the trainer said.
        images: uint8 [n, S, S, 3], the same images in the same order.
    """
    assert len(images) == len(probabilities), "one row of probabilities an image"
    classify = _tflite(exported) if exported.suffix == ".tflite" else _saved_model(exported)
    worst = 0.0
    for start in range(0, len(images), BATCH):
        answers = classify(images[start : start + BATCH].astype(np.float32))
        difference = np.abs(answers - probabilities[start : start + BATCH]).max()
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    return worst


def _saved_model(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    loaded = tf.saved_model.load(str(folder))  # the signature lives only as long as this
    return lambda images: loaded.signatures["images"](images=tf.constant(images))["probabilities"].numpy()


def _tflite(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tf.lite.Interpreter is deprecated", category=UserWarning)
        interpreter = tf.lite.Interpreter(model_path=str(path))
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def classify(images: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(source, images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(source, images)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return classify
