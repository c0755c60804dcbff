"""A network of a few hundred weights for training steps, and its batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.training.step import StepSettings, TrainingStep

SIZE, CLASSES = 6, 3


class SmallNetwork:
    """Flatten, Dense, Dense, with the interface of a classifier."""

    statistics_sizes: Mapping[str, int] = {}

    def __init__(self, seed: int = 1, l2: float = 0.0) -> None:
        self.l2 = l2
        start = keras.initializers.GlorotUniform(seed=seed)
        self.first = keras.layers.Dense(8, activation="tanh", kernel_initializer=start, name="first")
        self.second = keras.layers.Dense(CLASSES, kernel_initializer=start, name="second")
        self.first.build((None, SIZE * SIZE * 3))
        self.second.build((None, 8))

    @property
    def variables(self) -> dict[str, keras.Variable]:
        return {f"{layer.name}/{v.name}": v for layer in (self.first, self.second) for v in layer.weights}

    def logits(self, images: tf.Tensor, **_options: object) -> tf.Tensor:
        flat = tf.reshape(tf.cast(images, tf.float32), [-1, SIZE * SIZE * 3]) / 255
        return self.second(self.first(flat))

    def l2_loss(self) -> tf.Tensor:
        return self.l2 * tf.reduce_sum(tf.square(tf.convert_to_tensor(self.second.kernel)))


def make_step(
    network: SmallNetwork, optimizer: Any, *, should_stop: Any = lambda: False, teacher: Any = None, **settings: Any
) -> TrainingStep:
    """A training step of all weights, on one device."""
    chosen, strategy = StepSettings(seed=1, **settings), tf.distribute.get_strategy()
    return TrainingStep(
        strategy, network, network.variables, optimizer, chosen, should_stop=should_stop, teacher=teacher
    )


def compile_keras_model(network: SmallNetwork, optimizer: Any, **options: Any) -> keras.Model:
    """The same network as a model of Keras, compiled with cross-entropy."""
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), network.first, network.second]
    model = keras.Sequential([keras.Input((SIZE, SIZE, 3)), *layers])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def make_arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [count, SIZE, SIZE, 3], and labels, int32 [count], that can be learned."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    images = rng.integers(0, 120, (count, SIZE, SIZE, 3)) + labels[:, None, None, None] * 60
    return images.astype(np.uint8), labels


def make_batches(count: int, batch: int, replicas: int = 1) -> tf.data.Dataset:
    """Infinite epochs in index order; the last batch of each is padded with weight 0."""
    images, labels = make_arrays(count)

    def replica_batches() -> Iterator[dict[str, np.ndarray]]:
        while True:
            for start in range(0, count, batch):
                for rows in np.split(np.arange(start, start + batch), replicas):
                    real = rows < count
                    index = np.where(real, rows, 0)
                    yield {
                        "image": images[index], "label": labels[index], "weight": real.astype(np.float32),
                        "index": index, "position": rows - start,
                    }  # fmt: skip

    signature = {name: tf.TensorSpec(array.shape, array.dtype) for name, array in next(replica_batches()).items()}
    return tf.data.Dataset.from_generator(replica_batches, output_signature=signature)


def assert_near(values: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 1e-6) -> None:
    assert list(values) == list(expected)
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], atol=atol, err_msg=name)
