"""The recipe R4 as its notebook has it, in plain Keras: what `python -m benchmarks.whole_recipe` compares with.

    python -m benchmarks.plain_keras SPLIT --weights FILE --alpha 0.35 --seed 1 --augment

SPLIT holds {train,validation}/<class>. Prints one JSON object: seconds from opening the data to the end of the second
fit, seconds of each epoch after the first of a phase, validation accuracy after each epoch. The defaults of Keras
stand wherever the recipe says nothing.
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
    """When each epoch ended, its validation included."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - as Keras calls it
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Of every epoch but the first, which compiles."""
        return [b - a for a, b in pairwise(self.ends)]


def open_split(folder: Path, seed: int) -> tuple[tf.data.Dataset, tf.data.Dataset, int]:
    """Training batches, validation batches, and the number of classes."""
    train = keras.utils.image_dataset_from_directory(
        folder / "train", image_size=(SIZE, SIZE), batch_size=BATCH, seed=seed
    )
    validation = keras.utils.image_dataset_from_directory(
        folder / "validation", image_size=(SIZE, SIZE), batch_size=BATCH, shuffle=False
    )
    ahead = tf.data.AUTOTUNE
    return train.cache().shuffle(1000).prefetch(ahead), validation.cache().prefetch(ahead), len(train.class_names)


def build(classes: int, weights: str, alpha: float, augment: bool) -> tuple[keras.Model, keras.Model]:
    """The whole model, float [b, S, S, 3] in 0..255 -> probabilities, and the frozen backbone in it."""
    backbone = keras.applications.MobileNetV2(input_shape=(SIZE, SIZE, 3), include_top=False, weights=None, alpha=alpha)
    if weights != "none":
        backbone.load_weights(weights)
    backbone.trainable = False
    inputs = x = keras.Input((SIZE, SIZE, 3))
    if augment:
        for layer in (
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(0.2),
            keras.layers.RandomZoom(0.2),
        ):
            x = layer(x)
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = backbone(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(x)), backbone


def fit(model: keras.Model, rate: float, data: Any, validation: Any, first_epoch: int) -> tuple[Clock, list[float]]:
    """Compile and train five epochs; their clock and validation accuracies."""
    clock = Clock()
    model.compile(keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    told = model.fit(
        data,
        validation_data=validation,
        initial_epoch=first_epoch,
        epochs=first_epoch + EPOCHS,
        callbacks=[clock],
        verbose=0,
    )
    return clock, [float(value) for value in told.history["val_accuracy"]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--weights", default="none")
    arguments.add_argument("--alpha", type=float, default=0.35)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--augment", action="store_true")
    asked = arguments.parse_args()
    keras.utils.set_random_seed(asked.seed)
    keras.utils.disable_interactive_logging()
    began = time.perf_counter()
    data, validation, classes = open_split(asked.data, asked.seed)
    model, backbone = build(classes, asked.weights, asked.alpha, asked.augment)
    head, first = fit(model, 1e-3, data, validation, 0)
    backbone.trainable = True
    for layer in backbone.layers[:FROM_LAYER]:
        layer.trainable = False
    tuned, second = fit(model, 1e-5, data, validation, EPOCHS)
    whole = time.perf_counter() - began
    answer = {
        "seconds": whole,
        "epochs": {"head": head.seconds, "fine_tune": tuned.seconds},
        "val_accuracy": {"head": first, "fine_tune": second},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
