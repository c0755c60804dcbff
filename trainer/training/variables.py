"""Copy and assign the values of named variables, under any distribution strategy."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.errors import DataError


def _unwrap_keras_variable(variable: Any) -> Any:
    """Return the TensorFlow variable inside a Keras variable; return any other variable unchanged."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def copy_values(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copy the values of variables, by name, from the first local replica. All replicas have equal values."""
    tf_variables = {name: _unwrap_keras_variable(variable) for name, variable in variables.items()}
    dist_type = tf.distribute.DistributedValues
    return {n: np.array((v.values[0] if isinstance(v, dist_type) else v).numpy()) for n, v in tf_variables.items()}


def assign_values(variables: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign an array to each variable, or change none of them if an array is missing or does not fit.

    Args:
        variables: Keras or TensorFlow variables by name.
        values: arrays by name; arrays of other names are ignored.
        source: origin of the arrays for errors, such as "checkpoint step 420".

    Raises:
        DataError: `values` lacks an array for a variable, or the array has another shape.
    """
    for name, variable in variables.items():
        if name not in values:
            raise DataError(f"{source} has no variable {name}", fix="use a checkpoint of this model and version")
        if (shape := tuple(values[name].shape)) != (expected := tuple(variable.shape)):
            problem = f"{source}: {name} has shape {shape}, the model has {expected}"
            raise DataError(problem, fix="use a checkpoint of this model and version")
    for name, variable in variables.items():
        _unwrap_keras_variable(variable).assign(values[name])


def collect_optimizer_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Return an optimizer's variables by names that are the same in each process.

    A name contains the variable's index and its Keras path, such as "optimizer/0000/optimizer/iteration". Keras gives
    one variable of Nadam, the product of momentum factors, a path with a process-wide counter (`variable_7`), which is
    replaced by "product".
    """
    paths = [v.path if v.path.startswith(f"{optimizer.name}/") else "product" for v in optimizer.variables]
    return {f"optimizer/{i:04d}/{path}": v for i, (path, v) in enumerate(zip(paths, optimizer.variables, strict=True))}
