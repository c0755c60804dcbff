"""The flowers recipe with MobileNetV2 in plain Keras: the peers of `python -m benchmarks.whole_recipe`.

    python -m benchmarks.plain_keras SPLIT --peer best --weights FILE --alpha 0.35 --seed 1 --augment

    notebook    as its notebook has it, with the defaults of Keras. Thawed normalization trains with the statistics of
                the batch although the backbone is called with `training=False` (keras#20285).
    corrected   the statistics are frozen, as its author meant; gamma and beta of thawed layers train.
    best        corrected, without XLA (`jit_compile=False`), and one call per epoch (`steps_per_execution`).

SPLIT holds {train,validation}/<class>. Decoded images are cached by tf.data in each. Prints one JSON object: seconds
from opening the data to the end of the second fit, seconds of each epoch after the first of a phase, validation
accuracy after each epoch, trainable parameters of the second fit, and whether it changed the moving averages.
"""

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.peers import PEERS

IMAGE_SIZE, BATCH_SIZE, EPOCHS, FROM_LAYER = 160, 32, 5, 100
BatchNormalization = keras.layers.BatchNormalization


class FrozenStatistics(BatchNormalization):
    """A BatchNormalization layer that uses the moving averages also in training. Gamma and beta train."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002 - as Keras calls it
        return super().call(inputs, training=False, mask=mask)


class EpochTimer(keras.callbacks.Callback):
    """Records the times at which epochs end, after their validation."""

    def __init__(self) -> None:
        super().__init__()
        self.end_times: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - as Keras calls it
        self.end_times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each epoch except the first one, which compiles."""
        return [b - a for a, b in pairwise(self.end_times)]


def open_split(folder: Path, seed: int) -> tuple[tf.data.Dataset, tf.data.Dataset, int]:
    """Return training batches, validation batches, and the number of classes."""
    train = keras.utils.image_dataset_from_directory(
        folder / "train", image_size=(IMAGE_SIZE, IMAGE_SIZE), batch_size=BATCH_SIZE, seed=seed
    )
    validation = keras.utils.image_dataset_from_directory(
        folder / "validation", image_size=(IMAGE_SIZE, IMAGE_SIZE), batch_size=BATCH_SIZE, shuffle=False
    )
    autotune = tf.data.AUTOTUNE
    return train.cache().shuffle(1000).prefetch(autotune), validation.cache().prefetch(autotune), len(train.class_names)


def freeze_statistics(backbone: keras.Model) -> keras.Model:
    """Copy a network and its weights. Normalization layers of the copy never use the statistics of a batch."""

    def copy_layer(layer: keras.Layer) -> keras.Layer:
        layer_class = FrozenStatistics if isinstance(layer, BatchNormalization) else type(layer)
        return layer_class.from_config(layer.get_config())

    copy = keras.models.clone_model(backbone, clone_function=copy_layer)
    copy.set_weights(backbone.get_weights())
    return copy


def build_model(
    classes: int, weights: str, alpha: float, augment: bool, frozen_statistics: bool = False
) -> tuple[keras.Model, keras.Model]:
    """Build a classifier, float [b, S, S, 3] in 0..255 -> probabilities. Return it, and the frozen backbone in it."""
    backbone = keras.applications.MobileNetV2(
        input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3), include_top=False, weights=None, alpha=alpha
    )
    if weights != "none":
        backbone.load_weights(weights)
    if frozen_statistics:  # after the weights: a file of weights names the classes of the layers
        backbone = freeze_statistics(backbone)
    backbone.trainable = False
    inputs = x = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    if augment:
        x = keras.layers.RandomFlip("horizontal")(x)
        x = keras.layers.RandomRotation(0.2)(x)
        x = keras.layers.RandomZoom(0.2)(x)
    x = keras.applications.mobilenet_v2.preprocess_input(x)
    x = backbone(x, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(x)), backbone


def train_phase(
    model: keras.Model,
    learning_rate: float,
    training_data: Any,
    validation: Any,
    first_epoch: int,
    options: dict[str, Any],
) -> tuple[EpochTimer, list[float]]:
    """Compile a model with `options`, and train `EPOCHS` epochs. Return their times and validation accuracies."""
    timer = EpochTimer()
    loss, optimizer = "sparse_categorical_crossentropy", keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, loss=loss, metrics=["accuracy"], **options)
    history = model.fit(
        training_data,
        validation_data=validation,
        initial_epoch=first_epoch,
        epochs=first_epoch + EPOCHS,
        callbacks=[timer],
        verbose=0,
    )
    return timer, [float(value) for value in history.history["val_accuracy"]]


def copy_moving_averages(backbone: keras.Model) -> list[np.ndarray]:
    """Return copies of the moving averages of all normalization layers."""
    norms = [layer for layer in backbone.layers if isinstance(layer, BatchNormalization)]
    return [np.array(value) for layer in norms for value in (layer.moving_mean, layer.moving_variance)]


def main() -> None:
    """Train the head and then the upper layers, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peer", choices=PEERS, default="notebook")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--alpha", type=float, default=0.35)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--augment", action="store_true")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    keras.utils.disable_interactive_logging()
    started_at = time.perf_counter()
    training_data, validation, classes = open_split(options.data, options.seed)
    model, backbone = build_model(
        classes, options.weights, options.alpha, options.augment, frozen_statistics=options.peer != "notebook"
    )
    one_call = {"jit_compile": False, "steps_per_execution": int(training_data.cardinality())}
    compile_options = one_call if options.peer == "best" else {}
    head_timer, head_accuracies = train_phase(model, 1e-3, training_data, validation, 0, compile_options)
    averages_before = copy_moving_averages(backbone)
    backbone.trainable = True
    for layer in backbone.layers[:FROM_LAYER]:
        layer.trainable = False
    fine_tune_timer, fine_tune_accuracies = train_phase(model, 1e-5, training_data, validation, EPOCHS, compile_options)
    seconds = time.perf_counter() - started_at
    result = {
        "seconds": seconds,
        "trainable": sum(math.prod(variable.shape) for variable in model.trainable_variables),
        "averages_changed": any(
            (a != b).any() for a, b in zip(averages_before, copy_moving_averages(backbone), strict=True)
        ),
        "epochs": {"head": head_timer.seconds, "fine_tune": fine_tune_timer.seconds},
        "val_accuracy": {"head": head_accuracies, "fine_tune": fine_tune_accuracies},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
