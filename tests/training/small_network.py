"""A network of a few hundred weights for training steps, and its batches."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

SIZE, CLASSES = 6, 3


class SmallNetwork:
    """Flatten, Dense, Dense, with the interface of a classifier."""

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


def arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [count, SIZE, SIZE, 3], and labels, int32 [count], that can be learned."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    images = rng.integers(0, 120, (count, SIZE, SIZE, 3)) + labels[:, None, None, None] * 60
    return images.astype(np.uint8), labels


def stream(count: int, batch: int, replicas: int = 1) -> tf.data.Dataset:
    """Infinite epochs in index order; the last batch of each is padded with weight 0."""
    images, labels = arrays(count)

    def replica_batches() -> Iterator[dict[str, np.ndarray]]:
        while True:
            for start in range(0, count, batch):
                for rows in np.split(np.arange(start, start + batch), replicas):
                    real = rows < count
                    index = np.where(real, rows, 0)
                    yield {
                        "image": images[index],
                        "label": labels[index],
                        "weight": real.astype(np.float32),
                        "index": index,
                        "position": rows - start,
                    }

    signature = {name: tf.TensorSpec(array.shape, array.dtype) for name, array in next(replica_batches()).items()}
    return tf.data.Dataset.from_generator(replica_batches, output_signature=signature)


def assert_near(values: Mapping[str, Any], expected: Mapping[str, Any], atol: float = 1e-6) -> None:
    assert list(values) == list(expected)
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], atol=atol, err_msg=name)


def run_python(code: str, *arguments: str) -> Any:
    """Run code in a new process, which can configure logical devices; return the JSON that it prints after RESULT."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("RESULT")[1])
