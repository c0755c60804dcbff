"""Copy and assign the values of named variables, under any distribution strategy."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.errors import DataError


def _tf_variable(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def copy_values(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copy the values of variables from the first local replica. All replicas hold equal values."""
    tensors = {name: _tf_variable(variable) for name, variable in variables.items()}
    replicated = tf.distribute.DistributedValues
    return {n: np.array((v.values[0] if isinstance(v, replicated) else v).numpy()) for n, v in tensors.items()}


def assign_values(variables: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign `values` to all `variables`, or to none if one does not fit. `source` names their origin in errors.

    Raises:
        DataError: a variable is missing from `values`, or its shape differs.
    """
    for name, variable in variables.items():
        if name not in values:
            raise DataError(f"{source} has no variable {name}", fix="use a checkpoint of this model and version")
        if (shape := tuple(values[name].shape)) != (expected := tuple(variable.shape)):
            problem = f"{source}: {name} has shape {shape}, the model has {expected}"
            raise DataError(problem, fix="use a checkpoint of this model and version")
    for name, variable in variables.items():
        _tf_variable(variable).assign(values[name])


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Return the variables of an optimizer by names that are stable across processes.

    Keras names the product of momentum factors of Nadam by a counter of the process (`variable_7`).
    """
    paths = [v.path if v.path.startswith(f"{optimizer.name}/") else "product" for v in optimizer.variables]
    return {f"optimizer/{i:04d}/{path}": v for i, (path, v) in enumerate(zip(paths, optimizer.variables, strict=True))}
