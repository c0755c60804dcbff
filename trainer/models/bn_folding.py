"""BatchNormalization folding: frozen layers become part of the convolutions before them.

With constant averages the layer is a per-channel scale and shift, so a convolution with another kernel and bias
computes the same. Variables are unchanged: kernels are scaled in the graph, in float32, and gradients pass through.
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3.2, with constant averages.)
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
class FoldedWeights:
    """Kernels and bias of a convolution and the BatchNormalization after it, in the compute dtype."""

    kernels: tuple[tf.Tensor, ...]  # a separable convolution has two: depthwise and pointwise
    bias: tf.Tensor


def apply_folded(
    network: keras.Model, inputs: Any, training: bool = False, weights: Mapping[str, FoldedWeights] | None = None
) -> Any:
    """Compute `network(inputs, training=training)` with folded layers, equal up to rounding.

    With `training`, trainable BatchNormalization layers are not folded: they use the batch statistics.

    Args:
        weights: `fold_weights(network)`, where no variable of the network changes; None: fold in the graph.
    """
    if isinstance(inputs, keras.KerasTensor):  # a symbolic call: the model has Keras' own layers
        return network(inputs, training=training)
    norm_of = {conv.name: norm for conv, norm in foldable_pairs(network) if not (training and norm.trainable)}
    folded_norms = {norm.name for norm in norm_of.values()}

    def operation_fn(operation: Any) -> Callable[..., Any]:
        if norm := norm_of.get(operation.name):
            folded = weights[operation.name] if weights is not None else _fold(operation, norm)
            return partial(_convolve, operation, folded)
        if operation.name in folded_norms:
            return lambda maps, **_: maps  # Keras also passes a mask, which images do not have
        if isinstance(operation, keras.Layer) and "training" in inspect.signature(operation.call).parameters:
            return partial(operation, training=training)
        return operation

    outputs = run_through_graph(network, inputs, operation_fn)
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def fold_weights(network: keras.Model) -> dict[str, FoldedWeights]:
    """Fold the current weights; keys are the names of the convolutions in `foldable_pairs`."""
    return {convolution.name: _fold(convolution, norm) for convolution, norm in foldable_pairs(network)}


def foldable_pairs(network: keras.Model) -> list[tuple[keras.Layer, keras.layers.BatchNormalization]]:
    """List each linear convolution whose only consumer is a BatchNormalization, with that layer."""
    consumers: dict[int, list[Any]] = defaultdict(list)  # by id of the tensor
    for operation in network.operations:
        if not isinstance(operation, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(operation.input):
                consumers[id(tensor)].append(operation)
    last = {id(producer_of(tensor)) for tensor in network.outputs}
    pairs = []
    for operation in network.operations:
        if isinstance(operation, CONVOLUTIONS) and id(operation) not in last:
            linear = operation.activation in (None, keras.activations.linear)
            after = consumers[id(operation.output)]
            is_norm = len(after) == 1 and isinstance(after[0], NORM) and after[0].axis in (-1, 3)
            if linear and is_norm and operation.data_format == "channels_last":
                pairs.append((operation, after[0]))
    return pairs


def _fold(convolution: Any, norm: Any) -> FoldedWeights:
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
    return FoldedWeights(tuple(tf.cast(kernel, dtype) for kernel in kernels), tf.cast(shift, dtype))


def _convolve(convolution: Any, weights: FoldedWeights, maps: Any, **_: Any) -> Any:
    """[b, h, w, C] -> [b, h', w', C'] of the compute dtype."""
    op = keras.ops.conv
    if isinstance(convolution, keras.layers.SeparableConv2D):
        op = keras.ops.separable_conv
    elif isinstance(convolution, keras.layers.DepthwiseConv2D):
        op = keras.ops.depthwise_conv
    options = {name: getattr(convolution, name) for name in ("strides", "padding", "dilation_rate")}
    outputs = op(tf.cast(maps, convolution.compute_dtype), *weights.kernels, **options)
    return tf.nn.bias_add(outputs, weights.bias)  # TensorFlow fuses it with the convolution
