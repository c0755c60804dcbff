"""A network computed with its frozen BatchNormalization as part of the convolutions before it.

A layer whose averages stand still multiplies and shifts each channel: so does a convolution with another kernel and
bias. The variables stay what they are; the kernel is multiplied in the graph, in float32, and what trains gets its
gradient through that. (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2, with averages that do not move.)
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from trainer.models.batch_norm import NORM
from trainer.private_api import producer_of, run_through_graph

CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)


@dataclass(frozen=True)
class Weights:
    """Kernels and bias of a convolution with the BatchNormalization behind it folded in, in the compute dtype."""

    kernels: tuple[tf.Tensor, ...]  # two of a separable convolution: depthwise and pointwise
    bias: tf.Tensor


def computed(
    network: keras.Model, inputs: Any, batch_norm_training: bool = False, weights: Mapping[str, Weights] | None = None
) -> Any:
    """`network(inputs, training=batch_norm_training)`, to rounding; in a tf.function, with less work.

    Layers that are trainable while `batch_norm_training` normalize with the statistics of the batch, as they would.

    Args:
        weights: what `folded` made of the network, if nothing in it will change.
    """
    if isinstance(inputs, keras.KerasTensor):  # of a model that is to have Keras' own layers
        return network(inputs, training=batch_norm_training)
    norm_of = {conv.name: norm for conv, norm in pairs(network) if not (batch_norm_training and norm.trainable)}
    done = {norm.name for norm in norm_of.values()}

    def instead(operation: Any) -> Callable[..., Any]:
        if norm := norm_of.get(operation.name):
            own = weights[operation.name] if weights is not None else _folded(operation, norm)
            return partial(_convolve, operation, own)
        if operation.name in done:
            return lambda maps, **_: maps  # Keras also passes a mask, of which images have none
        if isinstance(operation, keras.Layer) and "training" in inspect.signature(operation.call).parameters:
            return partial(operation, training=batch_norm_training)
        return operation

    made = run_through_graph(network, inputs, instead)
    return made[0] if isinstance(made, list) and len(made) == 1 else made


def folded(network: keras.Model) -> dict[str, Weights]:
    """Folded weights, as they are now, by the name of each convolution with a BatchNormalization behind it."""
    return {convolution.name: _folded(convolution, norm) for convolution, norm in pairs(network)}


def pairs(network: keras.Model) -> list[tuple[keras.Layer, keras.layers.BatchNormalization]]:
    """Convolutions whose maps go into a BatchNormalization and nowhere else."""
    readers: dict[int, list[Any]] = defaultdict(list)
    for operation in network.operations:
        if not isinstance(operation, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(operation.input):
                readers[id(tensor)].append(operation)
    ends = {id(producer_of(tensor)) for tensor in network.outputs}
    folding = []
    for operation in network.operations:
        if isinstance(operation, CONVOLUTIONS) and id(operation) not in ends:
            linear = operation.activation in (None, keras.activations.linear)
            behind = readers[id(operation.output)]
            is_norm = len(behind) == 1 and isinstance(behind[0], NORM) and behind[0].axis in (-1, 3)
            if linear and is_norm and operation.data_format == "channels_last":
                folding.append((operation, behind[0]))
    return folding


def _folded(convolution: Any, norm: Any) -> Weights:
    scale = tf.math.rsqrt(tf.convert_to_tensor(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale *= norm.gamma
    shift = -norm.moving_mean * scale
    if norm.center:
        shift += norm.beta
    if convolution.use_bias:
        shift += convolution.bias * scale
    kernels: tuple[tf.Tensor, ...]
    if isinstance(convolution, keras.layers.SeparableConv2D):
        kernels = (tf.convert_to_tensor(convolution.depthwise_kernel), convolution.pointwise_kernel * scale)
    elif isinstance(convolution, keras.layers.DepthwiseConv2D):
        kernel = tf.convert_to_tensor(convolution.kernel)
        kernels = (kernel * tf.reshape(scale, kernel.shape[2:]),)
    else:
        kernels = (convolution.kernel * scale,)
    dtype = convolution.compute_dtype
    return Weights(tuple(tf.cast(kernel, dtype) for kernel in kernels), tf.cast(shift, dtype))


def _convolve(convolution: Any, weights: Weights, maps: Any, **_: Any) -> Any:
    """[b, h, w, C] -> [b, h', w', C'] of the compute dtype."""
    make = keras.ops.conv
    if isinstance(convolution, keras.layers.SeparableConv2D):
        make = keras.ops.separable_conv
    elif isinstance(convolution, keras.layers.DepthwiseConv2D):
        make = keras.ops.depthwise_conv
    options = {name: getattr(convolution, name) for name in ("strides", "padding", "dilation_rate")}
    made = make(tf.cast(maps, convolution.compute_dtype), *weights.kernels, **options)
    return tf.nn.bias_add(made, weights.bias)  # which TensorFlow computes together with the convolution
