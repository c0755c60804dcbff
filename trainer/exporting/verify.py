"""Parity check of an exported file: compare its predictions with the trained model's, and time it."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.errors import ModelError
from trainer.evaluation.paired import compare_paired
from trainer.exporting.bundle import ParityExamples
from trainer.monitoring.log import suppress_litert_output
from trainer.storage.disk import translate_disk_error

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> float32 probabilities [b, classes]

BATCH_SIZE = 32  # images per call
TIMED_CALLS = 20  # calls with one image each
WARMUP_CALLS = 3  # calls before the timed ones, because the first calls allocate memory
SIGNIFICANCE = 0.05  # an accuracy drop is significant if McNemar's p is below this level


def load_export(path: Path) -> Classify:
    """Load a .keras, .tflite or .onnx file or a SavedModel folder with its own library; return its predict function.

    Raises:
        ModelError: the file is missing or corrupt, or the library is not installed.
        Interrupted: the disk is full or fails.
    """
    load = {".keras": _load_keras, ".tflite": _load_tflite, ".onnx": _load_onnx}.get(path.suffix, _load_saved_model)
    try:
        return load(path)
    except ModuleNotFoundError as error:
        raise ModelError(f"{path} cannot be loaded: {error}", fix="run pip install 'kubetune[onnx]'") from error
    except Exception as error:  # each library has its own error classes
        if disk_error := translate_disk_error(error, [path, "/tmp"]):
            raise disk_error from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} cannot be loaded: {reason}", fix="export it again") from error


def _load_saved_model(folder: Path) -> Classify:
    loaded = tf.saved_model.load(str(folder))  # referenced below, because its variables are deleted with it

    def classify(images: np.ndarray) -> np.ndarray:
        pixels = tf.cast(tf.constant(images), tf.float32)  # `tf.constant(images, tf.float32)` takes ten times as long
        return loaded.signatures["images"](images=pixels)["probabilities"].numpy()

    return classify


def _load_keras(path: Path) -> Classify:
    import keras

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    image_size = model.input_shape[1]
    spec = tf.TensorSpec([None, image_size, image_size, 3], tf.uint8)  # one trace for all batch sizes
    predict = tf.function(
        lambda images: model(tf.cast(images, tf.float32), training=False), input_signature=[spec], autograph=False
    )
    return lambda images: predict(tf.constant(images)).numpy()


def _load_tflite(path: Path) -> Classify:
    from ai_edge_litert.interpreter import Interpreter

    with suppress_litert_output():
        interpreter = Interpreter(model_content=path.read_bytes())
        model_input, model_output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        interpreter.allocate_tensors()

    def classify(images: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(model_input["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(model_input["index"], images.astype(model_input["dtype"]))
        interpreter.invoke()
        output = interpreter.get_tensor(model_output["index"])
        if output.dtype == np.float32:
            return output
        scale, zero_point = model_output["quantization"]
        return (output.astype(np.float32) - zero_point) * np.float32(scale)

    return classify


def _load_onnx(path: Path) -> Classify:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images.astype(np.float32)})[0]


def score(classify: Classify, held_out: ParityExamples, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Score an export on held-out examples, and time it on this machine.

    Args:
        classify: predict function of the loaded export.
        held_out: at least one example, with the probabilities of the trained model.
        check: called before each batch; may raise an exception to stop the parity check.

    Returns:
        `examples`: number of examples.
        `accuracy`, `trainer_accuracy`: accuracy of the export and of the trained model on these examples.
        `lost`: number of examples that only the trained model classifies correctly.
        `gained`: number of examples that only the export classifies correctly.
        `p`: p-value of McNemar's exact test, whose null hypothesis is that both are equally accurate.
        `largest_difference`: largest absolute difference of a probability; infinite if the export has one that is not
            finite.
        `timing`: `milliseconds_per_image`, the median over `TIMED_CALLS` calls with one image.
    """
    images = held_out.images
    batches = []
    for start in range(0, len(images), BATCH_SIZE):
        check()
        batches.append(classify(images[start : start + BATCH_SIZE]))
    probabilities = np.concatenate(batches)
    seconds = []
    for i in range(WARMUP_CALLS + TIMED_CALLS):
        image = images[i % len(images)][None]
        start_time = time.perf_counter()
        classify(image)
        seconds.append(time.perf_counter() - start_time)
    is_finite = np.isfinite(probabilities).all()
    correct, trainer_correct = (p.argmax(-1) == held_out.labels for p in (probabilities, held_out.probabilities))
    comparison = compare_paired(trainer_correct, correct)
    return {
        "examples": len(images),
        "accuracy": float(correct.mean()),
        "trainer_accuracy": float(trainer_correct.mean()),
        "lost": comparison.lost,
        "gained": comparison.won,
        "p": comparison.p,
        "largest_difference": float(np.abs(probabilities - held_out.probabilities).max()) if is_finite else np.inf,
        "timing": {"milliseconds_per_image": round(float(np.median(seconds[WARMUP_CALLS:])) * 1000, 3)},
    }


def judge_accuracy_drop(scores: Mapping[str, Any], max_drop: float) -> tuple[bool, str]:
    """Decide whether an export is refused because of its accuracy.

    An export is refused if its net loss (`lost` - `gained`) exceeds the fraction `max_drop` of the examples and is
    significant by McNemar's test. Rounding changes some predictions for better or worse, so on few examples the net
    loss can exceed any limit by chance: 3 lost of 120 are not significant, 6 are. An export with a probability that is
    not finite is always refused.

    Args:
        scores: scores of the export, from `score`.
        max_drop: largest acceptable net loss, as a fraction of the examples.

    Returns:
        Whether the export is refused; and the reason, or a warning if the net loss exceeds the limit but is not
        significant, or "".
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
