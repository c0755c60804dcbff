"""Synchronized BatchNormalization over the examples of the global batch, padding excluded."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

NORM = keras.layers.BatchNormalization

_weight: ContextVar[Any] = ContextVar("weight", default=None)


@contextmanager
def example_weights(weight: Any) -> Iterator[None]:
    """Context in which batch statistics cover the examples of `weight` 1, float32 [b]; None: the whole batch."""
    token = _weight.set(weight)
    try:
        yield
    finally:
        _weight.reset(token)


class ExampleNormalization(keras.layers.BatchNormalization):
    """Keras' layer with `synchronized=True`, but padding is excluded and two collectives replace three.

    Keras' mask is no substitute: it is not synchronized, and the layers of a backbone do not propagate it.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        weight = _weight.get()
        if weight is None or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        x = tf.cast(inputs, tf.float32)
        axes, channels = list(range(len(x.shape) - 1)), x.shape[-1]
        assert self.axis in (-1, len(x.shape) - 1), "channels come last"
        rows = tf.reshape(weight, [-1] + [1] * len(axes))
        count = tf.reduce_sum(tf.ones_like(x[..., :1]) * rows)
        sums = _over_replicas(tf.concat([tf.reduce_sum(x * rows, axes), count[None]], axis=0))
        total, count = sums[:channels], sums[channels]
        mean = tf.math.divide_no_nan(total, count)
        # Keras computes E(x^2) - E(x)^2 over replicas, which loses small variances in float32.
        squares = _over_replicas(tf.reduce_sum(tf.square(x - mean) * rows, axes))
        variance = tf.math.divide_no_nan(squares, count)
        step = tf.where(count > 0, 1.0 - self.momentum, 0.0)  # an all-padding micro-batch must not move the averages
        for average, update in ((self.moving_mean, mean), (self.moving_variance, variance)):
            value = tf.convert_to_tensor(average)
            average.assign(value + (update - value) * step)
        gamma = tf.convert_to_tensor(self.gamma) if self.scale else None
        beta = tf.convert_to_tensor(self.beta) if self.center else None
        return tf.cast(tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon), self.compute_dtype)


def _over_replicas(sums: tf.Tensor) -> tf.Tensor:
    replica = tf.distribute.get_replica_context()
    return sums if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, sums)
