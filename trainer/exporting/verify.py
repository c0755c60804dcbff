"""Parity check of an exported file: predictions and latency in its own library, against the trainer's predictions."""

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
WARMUP = 3  # images before them, which allocate memory
Z_ONE_SIDED = 1.645  # standard deviations: 5 %, one-sided


def load_export(path: Path) -> Classify:
    """Load the folder of a SavedModel, or a .keras, .tflite or .onnx file.

    Raises:
        ModelError: it is missing or damaged.
    """
    load = {".keras": _keras, ".tflite": _tflite, ".onnx": _onnx}.get(path.suffix, _saved_model)
    try:
        return load(path)
    except Exception as error:  # each library has its own classes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {reason}", fix="export it again") from error


def _saved_model(folder: Path) -> Classify:
    loaded = tf.saved_model.load(str(folder))  # keeps the signature alive
    return lambda images: loaded.signatures["images"](images=tf.constant(images, tf.float32))["probabilities"].numpy()


def _keras(path: Path) -> Classify:
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    predict = tf.function(lambda images: model(tf.cast(images, tf.float32), training=False), reduce_retracing=True)
    return lambda images: predict(tf.constant(images)).numpy()


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
        output = interpreter.get_tensor(target["index"])
        if output.dtype == np.float32:
            return output
        scale, zero = target["quantization"]
        return (output.astype(np.float32) - zero) * np.float32(scale)

    return classify


def _onnx(path: Path) -> Classify:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images.astype(np.float32)})[0]


def score(classify: Classify, held_out: ParityExamples, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Score an export on the examples; `check` is called before each batch and may raise to abort.

    Returns:
        `examples` n, `accuracy` and `trainer_accuracy` on them, `lost` and `gained`: how many only the trainer or only
        the export predicts correctly; `largest_difference` of any probability; `timing`: `milliseconds_per_image`, the
        median of single images on this machine.
    """
    images, batches = held_out.images, []
    for start in range(0, len(images), BATCH):
        check()
        batches.append(classify(images[start : start + BATCH]))
    probabilities, seconds = np.concatenate(batches), []
    for i in range(WARMUP + TIMED):
        image = images[i % len(images)][None]
        began = time.perf_counter()
        classify(image)
        seconds.append(time.perf_counter() - began)
    finite = np.isfinite(probabilities).all()
    correct, expected = (p.argmax(-1) == held_out.labels for p in (probabilities, held_out.probabilities))
    return {
        "examples": len(images),
        "accuracy": float(correct.mean()),
        "trainer_accuracy": float(expected.mean()),
        "lost": int((expected & ~correct).sum()),
        "gained": int((correct & ~expected).sum()),
        "largest_difference": float(np.abs(probabilities - held_out.probabilities).max()) if finite else np.inf,
        "timing": {"milliseconds_per_image": round(float(np.median(seconds[WARMUP:])) * 1000, 3)},
    }


def drops_too_far(facts: dict[str, Any], most: float) -> bool:
    """Return True if an export loses more than the fraction `most` of the examples, and more than chance.

    Rounding flips predictions either way by chance, so the net loss has a standard deviation of sqrt(lost + gained)
    (McNemar 1947): 2 lost of 60 are not significant, 6 are. Probabilities that are not finite count as a drop.
    """
    if not np.isfinite(facts["largest_difference"]):
        return True
    net = facts["lost"] - facts["gained"]
    return net > most * facts["examples"] and net > Z_ONE_SIDED * (facts["lost"] + facts["gained"]) ** 0.5
