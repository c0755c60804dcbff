"""Synchronized BatchNormalization that excludes padding examples from its batch statistics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

BATCH_NORM_CLASS = keras.layers.BatchNormalization

# Context variables, because a Keras backbone does not pass additional arguments to its layers.
_example_weights: ContextVar[Any] = ContextVar("example_weights", default=None)
_collected_statistics: ContextVar[dict[str, Any] | None] = ContextVar("collected", default=None)


@contextmanager
def use_example_weights(weights: Any) -> Iterator[None]:
    """Exclude padding from the batch statistics of `PaddingAwareBatchNormalization` layers called in this context.

    Args:
        weights: 1 for examples and 0 for padding, float32 [b]; None to compute the statistics like Keras.
    """
    token = _example_weights.set(weights)
    try:
        yield
    finally:
        _example_weights.reset(token)


@contextmanager
def collect_statistics() -> Iterator[dict[str, Any]]:
    """Collect the statistics of the local batch from layers that are called in this context.

    This affects only `PaddingAwareBatchNormalization` layers that train within `use_example_weights`. They normalize by
    the statistics of the local batch without all-reducing them, and do not update their moving averages. Sum the
    collected vectors over micro-batches and replicas, and pass the totals to `update_moving_averages`: this is ghost
    batch normalization (Hoffer et al. 2017). Call each layer only once, because a second call replaces its vector.

    Yields:
        Vectors by layer name, float32 [2 * channels + 1]: per channel the sum of the inputs, per channel the sum of
        their squared deviations from the mean of this call, and the number of values per channel.
    """
    statistics: dict[str, Any] = {}
    token = _collected_statistics.set(statistics)
    try:
        yield statistics
    finally:
        _collected_statistics.reset(token)


class PaddingAwareBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization(synchronized=True)` without padding, in two all-reduces instead of three.

    In inference, if frozen, or outside `use_example_weights`, it behaves like Keras' layer. Keras' argument `mask` is
    not a substitute: Keras does not synchronize masked statistics, and the layers of a backbone do not propagate masks.
    With example weights, `mask` is ignored.
    """

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize inputs [..., channels], channels last. Update the moving averages, or collect the statistics."""
        weights = _example_weights.get()
        if weights is None or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        x = tf.cast(inputs, tf.float32)  # the statistics are float32 under every precision policy
        reduction_axes = list(range(len(x.shape) - 1))
        channels = x.shape[-1]
        assert self.axis in (-1, len(x.shape) - 1), "channels come last"
        weights = tf.reshape(weights, [-1] + [1] * len(reduction_axes))
        count = tf.reduce_sum(tf.ones_like(x[..., :1]) * weights)
        collected = _collected_statistics.get()
        reduce = _sum_over_replicas if collected is None else tf.identity
        total_and_count = reduce(tf.concat([tf.reduce_sum(x * weights, reduction_axes), count[None]], axis=0))
        total, count = total_and_count[:channels], total_and_count[channels]
        mean = tf.math.divide_no_nan(total, count)
        # Two passes. Keras computes E(x^2) - E(x)^2 over replicas, in which small variances cancel in float32.
        squared_deviations = reduce(tf.reduce_sum(tf.square(x - mean) * weights, reduction_axes))
        variance = tf.math.divide_no_nan(squared_deviations, count)
        if collected is None:
            for average, new_value in _compute_moving_averages(self, mean, variance, count):
                average.assign(new_value)
        else:
            collected[self.name] = tf.concat([total, squared_deviations, count[None]], axis=0)
        gamma = tf.convert_to_tensor(self.gamma) if self.scale else None
        beta = tf.convert_to_tensor(self.beta) if self.center else None
        return tf.cast(tf.nn.batch_normalization(x, mean, variance, beta, gamma, self.epsilon), self.compute_dtype)


def tracks_statistics(layer: keras.layers.Layer) -> bool:
    """Return whether training updates a layer's moving averages.

    For a backbone layer, call `trainer.models.freezing.set_trainable_layers` first, which sets its class.
    """
    return isinstance(layer, PaddingAwareBatchNormalization) and layer.trainable


def count_statistics(layer: keras.layers.BatchNormalization) -> int:
    """Return the length of the vector that `collect_statistics` collects for a layer: 2 * channels + 1."""
    return 2 * int(layer.moving_mean.shape[0]) + 1


def update_moving_averages(
    strategy: tf.distribute.Strategy, layers: Mapping[str, keras.layers.BatchNormalization], sums: Mapping[str, Any]
) -> None:
    """Update the moving averages of layers from collected statistics. Must be called in cross-replica context.

    Args:
        layers: BatchNormalization layers by name.
        sums: totals of the vectors of `collect_statistics` by layer name, float32 [2 * channels + 1], as returned by
            `strategy.run`. Every replica must have the same totals.
    """

    def compute(sums: Mapping[str, Any]) -> list[Any]:
        new_values = []
        for name, vector in sums.items():
            total, deviations = tf.split(vector[:-1], 2)
            mean, variance = tf.math.divide_no_nan(total, vector[-1]), tf.math.divide_no_nan(deviations, vector[-1])
            new_values += [value for _, value in _compute_moving_averages(layers[name], mean, variance, vector[-1])]
        return new_values

    averages = [average for name in sums for average in (layers[name].moving_mean, layers[name].moving_variance)]
    for average, value in zip(averages, strategy.run(compute, args=(sums,)), strict=True):
        strategy.extended.update(average.value, lambda variable, value: variable.assign(value), args=(value,))


def _compute_moving_averages(layer: Any, mean: Any, variance: Any, count: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the moving mean and the moving variance, each with its new value.

    `mean` and `variance` are the batch statistics, float32 [channels], over `count` values per channel.
    """
    rate = tf.where(count > 0, 1.0 - layer.momentum, 0.0)  # a micro-batch of padding must not move the averages
    for average, batch_statistic in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        old_value = tf.convert_to_tensor(average)
        yield average, old_value + (batch_statistic - old_value) * rate


def _sum_over_replicas(sums: tf.Tensor) -> tf.Tensor:
    """All-reduce sums over the replicas. In cross-replica context, return them unchanged."""
    replica_context = tf.distribute.get_replica_context()
    return sums if replica_context is None else replica_context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
