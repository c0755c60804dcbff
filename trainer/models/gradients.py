"""Find the operations of a backbone whose gradient a training step computes."""

from dataclasses import dataclass

import keras


@dataclass(frozen=True)
class Differentiated:
    """An operation of a backbone through which a training step propagates gradients to an input."""

    name: str
    kind: str  # class name of the Keras layer or operation, such as MaxPooling2D


def find_differentiated_operations(backbone: keras.Model) -> tuple[Differentiated, ...]:
    """Find the operations through which gradients propagate, in the order of the network. Call `apply_thaw` first.

    These are the operations with an input that depends on a trainable variable. Backpropagation ends at the first
    thawed layer, which is not one of them: only its variables have gradients.
    """
    dependent: set[int] = set()  # ids of tensors that depend on a trainable variable
    differentiated = []
    for operation in backbone.operations:
        if isinstance(operation, keras.layers.InputLayer):
            continue
        needs_input_gradient = any(id(tensor) in dependent for tensor in keras.tree.flatten(operation.input))
        if needs_input_gradient:
            differentiated.append(Differentiated(operation.name, type(operation).__name__))
        if needs_input_gradient or (isinstance(operation, keras.Layer) and operation.trainable_weights):
            dependent.update(id(tensor) for tensor in keras.tree.flatten(operation.output))
    return tuple(differentiated)
