"""The recipe R4 in plain Keras, as in its notebook: the baseline of `python -m benchmarks.whole_recipe`.

    python -m benchmarks.plain_keras SPLIT --weights FILE --alpha 0.35 --seed 1 --augment

SPLIT holds {train,validation}/<class>. Prints one JSON object: seconds from opening the data to the end of the second
fit, seconds of each epoch after the first of a phase, validation accuracy after each epoch. Everything that the recipe
does not specify has the default of Keras.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

SIZE, BATCH, EPOCHS, FROM_LAYER = 160, 32, 5, 100


class Clock(keras.callbacks.Callback):
    """Times of the ends of epochs, validation included."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - as Keras calls it
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of every epoch but the first, which compiles."""
        return [b - a for a, b in pairwise(self.ends)]


def open_split(folder: Path, seed: int) -> tuple[tf.data.Dataset, tf.data.Dataset, int]:
    """Training batches, validation batches, and the number of classes."""
    train = keras.utils.image_dataset_from_directory(
        folder / "train", image_size=(SIZE, SIZE), batch_size=BATCH, seed=seed
    )
    validation = keras.utils.image_dataset_from_directory(
        folder / "validation", image_size=(SIZE, SIZE), batch_size=BATCH, shuffle=False
    )
    autotune = tf.data.AUTOTUNE
    return train.cache().shuffle(1000).prefetch(autotune), validation.cache().prefetch(autotune), len(train.class_names)


def build(classes: int, weights: str, alpha: float, augment: bool) -> tuple[keras.Model, keras.Model]:
    """The whole model, float [b, S, S, 3] in 0..255 -> probabilities, and the frozen backbone in it."""
    backbone = keras.applications.MobileNetV2(input_shape=(SIZE, SIZE, 3), include_top=False, weights=None, alpha=alpha)
    if weights != "none":
        backbone.load_weights(weights)
    backbone.trainable = False
    inputs = x = keras.Input((SIZE, SIZE, 3))
    if augment:
        x = keras.layers.RandomFlip("horizontal")(x)
        x = keras.layers.RandomRotation(0.2)(x)
        x = keras.layers.RandomZoom(0.2)(x)
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = backbone(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(x)), backbone


def fit(model: keras.Model, rate: float, data: Any, validation: Any, first_epoch: int) -> tuple[Clock, list[float]]:
    """Compile and train five epochs; returns their times and validation accuracies."""
    clock = Clock()
    model.compile(keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(
        data,
        validation_data=validation,
        initial_epoch=first_epoch,
        epochs=first_epoch + EPOCHS,
        callbacks=[clock],
        verbose=0,
    )
    return clock, [float(value) for value in history.history["val_accuracy"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--alpha", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--augment", action="store_true")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    keras.utils.disable_interactive_logging()
    began = time.perf_counter()
    data, validation, classes = open_split(options.data, options.seed)
    model, backbone = build(classes, options.weights, options.alpha, options.augment)
    head, first = fit(model, 1e-3, data, validation, 0)
    backbone.trainable = True
    for layer in backbone.layers[:FROM_LAYER]:
        layer.trainable = False
    tuned, second = fit(model, 1e-5, data, validation, EPOCHS)
    whole = time.perf_counter() - began
    result = {
        "seconds": whole,
        "epochs": {"head": head.seconds, "fine_tune": tuned.seconds},
        "val_accuracy": {"head": first, "fine_tune": second},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
