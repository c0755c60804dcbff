"""A network of a few hundred weights with what a training step asks of a classifier, and its batches."""

from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

SIZE, CLASSES = 6, 3


class SmallNetwork:
    """Flatten, Dense, Dense."""

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

    def logits(self, images: tf.Tensor, **_how: object) -> tf.Tensor:
        flat = tf.reshape(tf.cast(images, tf.float32), [-1, SIZE * SIZE * 3]) / 255
        return self.second(self.first(flat))

    def l2_loss(self) -> tf.Tensor:
        return self.l2 * tf.reduce_sum(tf.square(tf.convert_to_tensor(self.second.kernel)))


def arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, SIZE, SIZE, 3] and int32 [count]: classes that can be told apart."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    images = rng.integers(0, 120, (count, SIZE, SIZE, 3)) + labels[:, None, None, None] * 60
    return images.astype(np.uint8), labels


def stream(count: int, batch: int, replicas: int = 1) -> tf.data.Dataset:
    """Endless epochs in index order; the last batch of each is padded with weight 0."""
    images, labels = arrays(count)
    share = batch // replicas

    def parts() -> Iterator[dict[str, np.ndarray]]:
        while True:
            for start in range(0, count, batch):
                rows = np.arange(start, start + batch)
                for part in np.split(rows, replicas):
                    real = part < count
                    take = np.where(real, part, 0)
                    yield {
                        "image": images[take],
                        "label": labels[take],
                        "weight": real.astype(np.float32),
                        "index": take.astype(np.int64),
                        "position": (part - start).astype(np.int64),
                    }

    signature = {
        "image": tf.TensorSpec([share, SIZE, SIZE, 3], tf.uint8),
        "label": tf.TensorSpec([share], tf.int32),
        "weight": tf.TensorSpec([share], tf.float32),
        "index": tf.TensorSpec([share], tf.int64),
        "position": tf.TensorSpec([share], tf.int64),
    }
    return tf.data.Dataset.from_generator(parts, output_signature=signature)
