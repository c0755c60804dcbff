"""BatchNormalization folding: merge a BatchNormalization layer into the convolution before it, for speed.

With constant moving averages, BatchNormalization is a scale and a shift per channel. A convolution with scaled kernels
and an adapted bias therefore computes both layers in one operation. The variables do not change: kernels are scaled in
the graph, in float32, and gradients flow through the scaling. Compare Jacob et al. 2018, "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3.2.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from trainer.models.batch_norm import BATCH_NORM_CLASS
from trainer.private_api import get_producer, run_through_graph

# Layer class -> function of keras.ops that computes it from inputs and kernels.
CONVOLUTIONS = {
    keras.layers.Conv2D: keras.ops.conv,
    keras.layers.DepthwiseConv2D: keras.ops.depthwise_conv,
    keras.layers.SeparableConv2D: keras.ops.separable_conv,
}
# Kernels and bias of a folded convolution, in its compute dtype. A SeparableConv2D has a depthwise and a pointwise
# kernel, the other layers have one.
FoldedWeights = tuple[Sequence[tf.Tensor | tf.Variable], tf.Tensor | tf.Variable]


def apply_folded(
    network: keras.Model,
    inputs: Any,
    training: bool = False,
    weights: Mapping[str, FoldedWeights] | None = None,
    fold_trainable: bool = True,
) -> Any:
    """Compute `network(inputs, training=training)` with folded layers. The result is equal up to rounding.

    Args:
        inputs: a tensor, or a `keras.KerasTensor`, for which nothing is folded.
        training: passed to the layers. If it is true, trainable BatchNormalization layers are not folded, because they
            use batch statistics.
        weights: result of `fold_weights`, if the network's variables no longer change. None folds in the graph, with
            the values of the variables at each execution.
        fold_trainable: whether to fold trainable BatchNormalization layers in inference. Folding rounds the gradients
            of gamma and beta differently from Keras, so a training step does not fold these layers.
    """
    if isinstance(inputs, keras.KerasTensor):  # a Keras model, such as an export, has the original layers
        return network(inputs, training=training)
    fold_trainable = fold_trainable and not training
    # Folded BatchNormalization layers by the name of the convolution before.
    norms = {conv.name: norm for conv, norm in find_foldable_pairs(network) if fold_trainable or not norm.trainable}
    folded_norms = {norm.name for norm in norms.values()}

    def operation_fn(operation: Any) -> Callable[..., Any]:
        if norm := norms.get(operation.name):
            folded = weights[operation.name] if weights is not None else _fold(operation, norm)
            return partial(_convolve, operation, folded)
        if operation.name in folded_norms:
            return lambda maps, **_: maps  # identity; Keras also passes a mask, which images do not have
        if isinstance(operation, keras.Layer) and "training" in inspect.signature(operation.call).parameters:
            return partial(operation, training=training)
        return operation

    outputs = run_through_graph(network, inputs, operation_fn)
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def fold_weights(network: keras.Model) -> dict[str, FoldedWeights]:
    """Fold all foldable pairs with the current values of their variables; return the weights by convolution name."""
    return {convolution.name: _fold(convolution, norm) for convolution, norm in find_foldable_pairs(network)}


def fold_into_variables(network: keras.Model) -> dict[str, FoldedWeights]:
    """Like `fold_weights`, but return variables, which a SavedModel stores outside its graph (limited to 2 GB)."""
    return {
        name: ([tf.Variable(kernel, trainable=False) for kernel in kernels], tf.Variable(bias, trainable=False))
        for name, (kernels, bias) in fold_weights(network).items()
    }


def find_foldable_pairs(network: keras.Model) -> list[tuple[keras.Layer, keras.layers.BatchNormalization]]:
    """Find the pairs of a convolution without activation and the BatchNormalization that is its only consumer.

    Both must be channels-last, and the convolution must not be an output of the network.
    """
    consumers: dict[int, list[Any]] = defaultdict(list)  # id of a tensor -> operations with this input
    for operation in network.operations:
        if not isinstance(operation, keras.layers.InputLayer):
            for tensor in keras.tree.flatten(operation.input):
                consumers[id(tensor)].append(operation)
    output_producers = {id(get_producer(tensor)) for tensor in network.outputs}
    pairs = []
    for operation in network.operations:
        if type(operation) in CONVOLUTIONS and id(operation) not in output_producers:
            is_linear = operation.activation in (None, keras.activations.linear)
            users = consumers[id(operation.output)]
            feeds_only_norm = len(users) == 1 and isinstance(users[0], BATCH_NORM_CLASS) and users[0].axis in (-1, 3)
            if is_linear and feeds_only_norm and operation.data_format == "channels_last":
                pairs.append((operation, users[0]))
    return pairs


def _fold(convolution: Any, norm: Any) -> FoldedWeights:
    """Compute the kernels and the bias that make a convolution include the BatchNormalization after it."""
    scale = tf.math.rsqrt(tf.convert_to_tensor(norm.moving_variance) + norm.epsilon)
    if norm.scale:
        scale *= norm.gamma
    shift = -norm.moving_mean * scale
    if norm.center:
        shift += norm.beta
    if convolution.use_bias:
        shift += convolution.bias * scale
    if isinstance(convolution, keras.layers.SeparableConv2D):
        kernels = [convolution.depthwise_kernel, convolution.pointwise_kernel * scale]
    elif isinstance(convolution, keras.layers.DepthwiseConv2D):
        kernels = [convolution.kernel * tf.reshape(scale, convolution.kernel.shape[2:])]
    else:
        kernels = [convolution.kernel * scale]
    dtype = convolution.compute_dtype
    return [tf.cast(kernel, dtype) for kernel in kernels], tf.cast(shift, dtype)


def _convolve(convolution: Any, weights: FoldedWeights, maps: Any, **_: Any) -> Any:
    """Convolve feature maps [b, h, w, C] with folded weights, in the layer's compute dtype."""
    op, (kernels, bias) = CONVOLUTIONS[type(convolution)], tf.nest.map_structure(tf.convert_to_tensor, weights)
    options = {name: getattr(convolution, name) for name in ("strides", "padding", "dilation_rate")}
    outputs = op(tf.cast(maps, convolution.compute_dtype), *kernels, **options)
    return tf.nn.bias_add(outputs, bias)  # bias_add, because TensorFlow fuses it with the convolution
