"""Find the operations of a backbone whose input gradients a training step computes."""

from dataclasses import dataclass

import keras


@dataclass(frozen=True)
class DifferentiatedOperation:
    """A backbone operation through which a training step propagates gradients to an input."""

    name: str  # name of the layer or operation in the backbone
    class_name: str  # class of the Keras layer or operation, such as MaxPooling2D


def find_differentiated_operations(backbone: keras.Model) -> tuple[DifferentiatedOperation, ...]:
    """Find the operations through which gradients propagate, in network order.

    Freeze or thaw the layers first. The result contains the operations with an input that depends on a trainable
    variable. The first thawed layer, where backpropagation ends, is not included: only its variables have gradients.
    """
    dependent_ids: set[int] = set()  # ids of tensors that depend on a trainable variable
    differentiated = []
    for operation in backbone.operations:
        if isinstance(operation, keras.layers.InputLayer):
            continue
        needs_input_gradient = any(id(tensor) in dependent_ids for tensor in keras.tree.flatten(operation.input))
        if needs_input_gradient:
            differentiated.append(DifferentiatedOperation(operation.name, type(operation).__name__))
        if needs_input_gradient or (isinstance(operation, keras.Layer) and operation.trainable_weights):
            dependent_ids.update(id(tensor) for tensor in keras.tree.flatten(operation.output))
    return tuple(differentiated)
