"""Check the parity of an exported file: compare its predictions with those of the trainer, and time it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ModelError
from trainer.evaluation.paired import compare_paired
from trainer.exporting.bundle import ParityExamples
from trainer.exporting.tflite import suppress_litert_output
from trainer.storage.disk import translate_disk_error

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> float32 probabilities [b, classes]

BATCH_SIZE = 32  # images
TIMED_CALLS = 20  # with one image each
WARMUP_CALLS = 3  # before the timed ones, as the first calls allocate memory
SIGNIFICANCE = 0.05  # largest p of a significant drop


def load_export(path: Path) -> Classify:
    """Load a .keras, .tflite or .onnx file, or the folder of a SavedModel, with its own library.

    Raises:
        ModelError: the file is missing or corrupt, or onnxruntime is not installed.
    """
    load = {".keras": _load_keras, ".tflite": _load_tflite, ".onnx": _load_onnx}.get(path.suffix, _load_saved_model)
    try:
        return load(path)
    except ModuleNotFoundError as error:
        raise ModelError(f"{path} cannot be loaded: {error}", fix="run pip install 'kubetune[onnx]'") from error
    except Exception as error:  # each library has its own error classes
        if full := translate_disk_error(error, [path, "/tmp"]):
            raise full from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {reason}", fix="export it again") from error


def _load_saved_model(folder: Path) -> Classify:
    loaded = tf.saved_model.load(str(folder))  # the signature fails without a reference to it
    return lambda images: loaded.signatures["images"](images=tf.constant(images, tf.float32))["probabilities"].numpy()


def _load_keras(path: Path) -> Classify:
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    side = model.input_shape[1]
    signature = tf.TensorSpec([None, side, side, 3], tf.uint8)  # one trace for all batch sizes
    predict = tf.function(
        lambda images: model(tf.cast(images, tf.float32), training=False), input_signature=[signature], autograph=False
    )
    return lambda images: predict(tf.constant(images)).numpy()


def _load_tflite(path: Path) -> Classify:
    from ai_edge_litert.interpreter import Interpreter

    with suppress_litert_output():
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


def _load_onnx(path: Path) -> Classify:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images.astype(np.float32)})[0]


def score(classify: Classify, held_out: ParityExamples, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Score an export on held-out examples, and time it on this machine; `check` is called before each batch.

    Returns:
        `examples`: count; `accuracy` and `trainer_accuracy` on them; `lost`: count that only the trainer predicts
        correctly; `gained`: count that only the export predicts correctly; `p` of McNemar's test that both predict
        equally well; `largest_difference` of a probability, infinite if one is not finite; `timing`:
        `milliseconds_per_image`, the median over calls with one image.
    """
    images, batches = held_out.images, []
    for start in range(0, len(images), BATCH_SIZE):
        check()
        batches.append(classify(images[start : start + BATCH_SIZE]))
    probabilities, seconds = np.concatenate(batches), []
    for i in range(WARMUP_CALLS + TIMED_CALLS):
        image = images[i % len(images)][None]
        began = time.perf_counter()
        classify(image)
        seconds.append(time.perf_counter() - began)
    finite = np.isfinite(probabilities).all()
    correct, expected = (p.argmax(-1) == held_out.labels for p in (probabilities, held_out.probabilities))
    pair = compare_paired(expected, correct)
    return {
        "examples": len(images),
        "accuracy": float(correct.mean()),
        "trainer_accuracy": float(expected.mean()),
        "lost": pair.lost,
        "gained": pair.won,
        "p": pair.p,
        "largest_difference": float(np.abs(probabilities - held_out.probabilities).max()) if finite else np.inf,
        "timing": {"milliseconds_per_image": round(float(np.median(seconds[WARMUP_CALLS:])) * 1000, 3)},
    }


def judge_accuracy_drop(scores: Mapping[str, Any], max_drop: float) -> tuple[bool, str]:
    """Decide whether an export is refused; return also the reason, or a warning, or "" if the drop is not too large.

    A refused export has lost more than the fraction `max_drop` of the examples, and significantly more than chance
    explains, by the test that `trainer.compare` uses. Rounding changes some predictions for better or worse, and on few
    examples the net of them can exceed any limit: 3 lost of 120 are not significant, 6 are. If a probability is not
    finite, the export is always refused.
    """
    if not np.isfinite(scores["largest_difference"]):
        return True, "has probabilities that are not finite"
    lost, gained, examples = scores["lost"], scores["gained"], scores["examples"]
    if lost - gained <= max_drop * examples:
        return False, ""
    drop = f"predicts {lost} examples worse and {gained} better than the trainer, of {examples:,}"
    limit = f"above the limit of {max_drop:g}, {{}} significant (McNemar's p = {scores['p']:.2g})"
    refused = scores["p"] < SIGNIFICANCE
    return refused, f"{drop}: {limit.format('and' if refused else 'but not')}"
