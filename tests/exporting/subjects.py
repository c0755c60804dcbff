"""A small network, its export bundle, and the examples of the parity check."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.exporting.bundle import ExportBundle, ParityExamples, as_plain_float32
from trainer.exporting.reference import compute_reference
from trainer.exporting.verify import load_export, score

NAMES = ("daisy", "löwenzahn", "rose\nred")
SIZE = 32


def small_model(precision: str = "float32") -> keras.Model:
    """Build a small convolutional classifier of 0..255 pixels with a nested network as its backbone."""
    with_policy = {"dtype": precision}
    inner_in = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(8, 3, 2, "same", kernel_initializer=keras.initializers.HeNormal(1), **with_policy)(inner_in)
    x = keras.layers.BatchNormalization(**with_policy)(x)
    inner = keras.Model(inner_in, keras.layers.ReLU(**with_policy)(x))
    images = keras.Input((SIZE, SIZE, 3), name="images")
    x = keras.ops.mean(keras.ops.cast(inner(images / 127.5 - 1, training=False), "float32"), axis=(1, 2))
    logits = keras.layers.Dense(3, kernel_initializer=keras.initializers.HeNormal(2), dtype="float32")(x)
    return keras.Model(images, keras.ops.softmax(3 * logits))


def some_images(count: int, seed: int = 0) -> np.ndarray:
    levels = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3)).astype("uint8")
    return levels.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)


def bundle_for(model: keras.Model, resize: str = "stretch") -> ExportBundle:
    """Return the bundle of a bare network; its "heatmap" is the red channel."""

    def explain(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "probabilities": model(images, training=False),
            "embedding": tf.reduce_mean(images, axis=(1, 2)),
            "heatmap": images[:, ::16, ::16, 0] / 255,
        }

    images = some_images(40)
    reference = compute_reference("test", NAMES, predictions_of(model, images), images.mean((1, 2)), SIZE, resize)
    predict = trace_predict(model)
    with as_plain_float32(model):
        predict_in_float32 = trace_predict(model)
    return ExportBundle(
        build_model=lambda: model,
        predict=predict,
        predict_in_float32=predict_in_float32,
        explain=explain,
        variables=[variable.value for variable in model.variables],
        class_names=NAMES,
        image_size=SIZE,
        resize=resize,  # type: ignore[arg-type]
        reference=reference,
        calibration_images=lambda: some_images(60, seed=1),
    )


def trace_predict(model: keras.Model) -> Any:
    """Return a function of images that is traced with the model's present layers."""
    spec = tf.TensorSpec([None, SIZE, SIZE, 3], tf.float32, "images")
    predict = tf.function(lambda images: {"probabilities": model(images, training=False)}, input_signature=[spec])
    predict.get_concrete_function()
    return predict


def predictions_of(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return model.predict(images.astype("float32"), verbose=0)


def held_out(probabilities: np.ndarray, images: np.ndarray) -> ParityExamples:
    return ParityExamples(images, probabilities.argmax(-1), probabilities, probabilities)


def largest_difference(path: Path, probabilities: np.ndarray, images: np.ndarray) -> float:
    """Return the largest difference of any probability between a file and `probabilities`."""
    return float(score(load_export(path), held_out(probabilities, images))["largest_difference"])
