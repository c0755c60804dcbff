"""Parity check of an exported file: compare its predictions in its own library with the trainer's, and time it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ModelError
from trainer.exporting.bundle import ParityExamples
from trainer.exporting.tflite import quiet
from trainer.storage.disk import disk_error

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> float32 probabilities [b, classes]

BATCH = 32  # images
TIMED_CALLS = 20  # with one image each
WARMUP_CALLS = 3  # before them, not timed: they allocate memory
Z_ONE_SIDED = 1.645  # standard deviations, for a one-sided test at 5 %


def load_export(path: Path) -> Classify:
    """Load a .keras, .tflite or .onnx file, or the folder of a SavedModel, with its own library.

    Raises:
        ModelError: the file is missing or damaged, or onnxruntime is not installed.
    """
    load = {".keras": _keras, ".tflite": _tflite, ".onnx": _onnx}.get(path.suffix, _saved_model)
    try:
        return load(path)
    except ModuleNotFoundError as error:
        raise ModelError(f"{path} cannot be loaded: {error}", fix="run pip install 'kubetune[onnx]'") from error
    except Exception as error:  # each library has its own error classes
        if full := disk_error(error, [path, "/tmp"]):
            raise full from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {reason}", fix="export it again") from error


def _saved_model(folder: Path) -> Classify:
    loaded = tf.saved_model.load(str(folder))  # the signature fails after its model is collected
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
    """Score an export on held-out examples, and time it on this machine; `check` is called before each batch.

    Returns:
        `examples`, their number; `accuracy` of the export and `trainer_accuracy` on them; `lost` and `gained`, the
        numbers of examples that only the trainer and only the export predicts correctly; `largest_difference` of any
        probability, infinite if one is not finite; `timing`: `milliseconds_per_image`, the median of single images.
    """
    images, batches = held_out.images, []
    for start in range(0, len(images), BATCH):
        check()
        batches.append(classify(images[start : start + BATCH]))
    probabilities, seconds = np.concatenate(batches), []
    for i in range(WARMUP_CALLS + TIMED_CALLS):
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
        "timing": {"milliseconds_per_image": round(float(np.median(seconds[WARMUP_CALLS:])) * 1000, 3)},
    }


def accuracy_drop_too_large(scores: dict[str, Any], max_drop: float) -> bool:
    """Return True if an export loses more than the fraction `max_drop` of the examples, and significantly many.

    Rounding changes some predictions by chance, for better or worse, so that the net loss has a standard deviation of
    sqrt(lost + gained) (McNemar 1947): 2 lost of 60 are not significant, 6 are. Probabilities that are not finite are
    always too large a drop.
    """
    net_loss, changed = scores["lost"] - scores["gained"], scores["lost"] + scores["gained"]
    too_large = net_loss > max_drop * scores["examples"] and net_loss > Z_ONE_SIDED * changed**0.5
    return too_large or not np.isfinite(scores["largest_difference"])
