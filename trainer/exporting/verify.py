"""Checking an exported file: loaded by the library that it is for, and its answers and time beside the trainer's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ModelError
from trainer.exporting.bundle import ParityExamples
from trainer.exporting.tflite import quiet

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> float32 probabilities [b, classes]

BATCH = 32
TIMED = 20  # images, one at a time
UNTIMED = 3  # before them: the first ones allocate
SURE = 1.645  # standard deviations: 1 in 20, on one side


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


def score(classify: Classify, held_out: ParityExamples, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Send the examples through an export; `check` is called before each batch and may raise to leave.

    Returns:
        `examples` n, `accuracy` and `trainer_accuracy` on them, `lost` and `gained`: how many only the trainer or only
        the export gets right; `largest_difference` of any probability; `timing`: `milliseconds_per_image`, the median
        of single images on this machine.
    """
    images, parts = held_out.images, []
    for start in range(0, len(images), BATCH):
        check()
        parts.append(classify(images[start : start + BATCH]))
    answers, seconds = np.concatenate(parts), []
    for i in range(UNTIMED + TIMED):
        one = images[i % len(images)][None]
        began = time.perf_counter()
        classify(one)
        seconds.append(time.perf_counter() - began)
    differences = np.abs(answers - held_out.probabilities).max() if np.isfinite(answers).all() else np.inf
    right, was_right = (p.argmax(-1) == held_out.labels for p in (answers, held_out.probabilities))
    return {
        "examples": len(images),
        "accuracy": float(right.mean()),
        "trainer_accuracy": float(was_right.mean()),
        "lost": int((was_right & ~right).sum()),
        "gained": int((right & ~was_right).sum()),
        "largest_difference": float(differences),
        "timing": {"milliseconds_per_image": round(float(np.median(seconds[UNTIMED:])) * 1000, 3)},
    }


def drops_too_far(facts: dict[str, Any], most: float) -> bool:
    """Whether an export is worse than its trainer by more than the fraction `most` of the examples, and than chance.

    Examples that only one of the two gets right go either way by chance where rounding alone decides them, so that the
    net loss has a standard deviation of sqrt(lost + gained) (McNemar 1947): 2 lost of 60 say little, 6 say much. An
    answer that is no number is a drop.
    """
    if not np.isfinite(facts["largest_difference"]):
        return True
    net = facts["lost"] - facts["gained"]
    return net > most * facts["examples"] and net > SURE * (facts["lost"] + facts["gained"]) ** 0.5
