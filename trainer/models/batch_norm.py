"""BatchNormalization with statistics over the examples of all replicas, without padding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

NORM = keras.layers.BatchNormalization

_example_weights: ContextVar[Any] = ContextVar("example_weights", default=None)
_collected: ContextVar[dict[str, Any] | None] = ContextVar("collected", default=None)


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


@contextmanager
def collect_statistics() -> Iterator[dict[str, Any]]:
    """Make layers that are called in this context normalize by the statistics of this call alone.

    They neither all-reduce them nor update their moving averages, but put their sums into the dictionary by layer
    name: float32 [2 * channels + 1], the sums of the inputs and of their squared deviations, and the number of values.
    Such sums of several calls add up, for `update_moving_averages` (ghost batch normalization, Hoffer et al. 2017).
    """
    statistics: dict[str, Any] = {}
    token = _collected.set(statistics)
    try:
        yield statistics
    finally:
        _collected.reset(token)


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
        collected = _collected.get()
        all_reduce = _sum_over_replicas if collected is None else tf.identity
        sums = all_reduce(tf.concat([tf.reduce_sum(x * weights, axes), count[None]], axis=0))
        total, count = sums[:channels], sums[channels]
        mean = tf.math.divide_no_nan(total, count)
        # Keras computes E(x^2) - E(x)^2 over replicas, in which small variances cancel in float32.
        squares = all_reduce(tf.reduce_sum(tf.square(x - mean) * weights, axes))
        variance = tf.math.divide_no_nan(squares, count)
        if collected is None:
            for average, updated in _moving_averages(self, mean, variance, count):
                average.assign(updated)
        else:
            collected[self.name] = tf.concat([total, squares, count[None]], axis=0)
        gamma = tf.convert_to_tensor(self.gamma) if self.scale else None
        beta = tf.convert_to_tensor(self.beta) if self.center else None
        return tf.cast(tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon), self.compute_dtype)


def updates_moving_averages(layer: keras.layers.Layer) -> bool:
    """Return whether training updates the moving averages of a layer. Requires `apply_thaw`, which sets its class."""
    return isinstance(layer, PaddingAwareBatchNormalization) and layer.trainable


def count_statistics(layer: keras.layers.BatchNormalization) -> int:
    """Count the values that `collect_statistics` gives for a layer."""
    return 2 * int(layer.moving_mean.shape[0]) + 1


def update_moving_averages(
    strategy: tf.distribute.Strategy, layers: Mapping[str, keras.layers.BatchNormalization], sums: Mapping[str, Any]
) -> None:
    """Update the moving averages of layers from collected sums, the same on all replicas of the strategy."""

    def compute(sums: Mapping[str, Any]) -> list[Any]:
        updated = []
        for name, values in sums.items():
            total, squares = tf.split(values[:-1], 2)
            mean, variance = tf.math.divide_no_nan(total, values[-1]), tf.math.divide_no_nan(squares, values[-1])
            updated += [value for _, value in _moving_averages(layers[name], mean, variance, values[-1])]
        return updated

    averages = [average for name in sums for average in (layers[name].moving_mean, layers[name].moving_variance)]
    for average, value in zip(averages, strategy.run(compute, args=(sums,)), strict=True):
        strategy.extended.update(average.value, lambda variable, value: variable.assign(value), args=(value,))


def _moving_averages(layer: Any, mean: Any, variance: Any, count: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the moving averages of a layer with their new values, for batch statistics over `count` values."""
    rate = tf.where(count > 0, 1.0 - layer.momentum, 0.0)  # a micro-batch of padding must not move the averages
    for average, batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        value = tf.convert_to_tensor(average)
        yield average, value + (batch - value) * rate


def _sum_over_replicas(sums: tf.Tensor) -> tf.Tensor:
    """Add up sums over all replicas. In cross-replica context, return them unchanged."""
    replica = tf.distribute.get_replica_context()
    return sums if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, sums)
