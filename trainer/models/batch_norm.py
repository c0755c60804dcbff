"""BatchNormalization with statistics over the examples of all replicas, without padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

NORM = keras.layers.BatchNormalization

_example_weights: ContextVar[Any] = ContextVar("example_weights", default=None)


@contextmanager
def use_example_weights(weights: Any) -> Iterator[None]:
    """Make layers that are called in this context exclude examples of weight 0 from their batch statistics.

    `weights` are 0 or 1, float32 [b]. None includes the entire batch.
    """
    token = _example_weights.set(weights)
    try:
        yield
    finally:
        _example_weights.reset(token)


class PaddingAwareBatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer with `synchronized=True`, but it excludes padding and needs two collectives, not three.

    Outside training, or without `use_example_weights`, it behaves as Keras' layer. Keras' mask does not help:
    statistics with a mask are not synchronized, and the layers of a backbone do not propagate it.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        weights = _example_weights.get()
        if weights is None or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        x = tf.cast(inputs, tf.float32)
        axes, channels = list(range(len(x.shape) - 1)), x.shape[-1]
        assert self.axis in (-1, len(x.shape) - 1), "channels come last"
        weights = tf.reshape(weights, [-1] + [1] * len(axes))
        count = tf.reduce_sum(tf.ones_like(x[..., :1]) * weights)
        sums = _sum_over_replicas(tf.concat([tf.reduce_sum(x * weights, axes), count[None]], axis=0))
        total, count = sums[:channels], sums[channels]
        mean = tf.math.divide_no_nan(total, count)
        # Keras computes E(x^2) - E(x)^2 over replicas, in which small variances cancel in float32.
        squares = _sum_over_replicas(tf.reduce_sum(tf.square(x - mean) * weights, axes))
        variance = tf.math.divide_no_nan(squares, count)
        rate = tf.where(count > 0, 1.0 - self.momentum, 0.0)  # a micro-batch of padding must not move the averages
        for average, update in ((self.moving_mean, mean), (self.moving_variance, variance)):
            value = tf.convert_to_tensor(average)
            average.assign(value + (update - value) * rate)
        gamma = tf.convert_to_tensor(self.gamma) if self.scale else None
        beta = tf.convert_to_tensor(self.beta) if self.center else None
        return tf.cast(tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon), self.compute_dtype)


def updates_moving_averages(layer: keras.layers.Layer) -> bool:
    """Return whether training updates the moving averages of a layer. Requires `apply_thaw`, which sets its class."""
    return isinstance(layer, PaddingAwareBatchNormalization) and layer.trainable


def _sum_over_replicas(sums: tf.Tensor) -> tf.Tensor:
    """Add up sums over all replicas. In cross-replica context, return them unchanged."""
    replica = tf.distribute.get_replica_context()
    return sums if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, sums)
