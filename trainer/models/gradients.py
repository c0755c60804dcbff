"""The operations of a backbone whose gradient a training step computes."""

from dataclasses import dataclass

import keras


@dataclass(frozen=True)
class Differentiated:
    """An operation of a backbone, with respect to whose input the loss is differentiated."""

    name: str
    kind: str  # name of the class of the layer or operation in Keras, such as MaxPooling2D


def find_differentiated(backbone: keras.Model) -> tuple[Differentiated, ...]:
    """Find the operations that are differentiated with respect to an input, in order, given `apply_thaw`.

    These are the operations with an input that depends on a trainable variable: below the first thawed layer, gradients
    end.
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
