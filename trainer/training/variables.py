"""Reading and writing variables by name, whatever strategy holds them."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.errors import DataError


def _raw(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _first(variable: Any) -> Any:
    return variable.values[0] if isinstance(variable, tf.distribute.DistributedValues) else variable


def read(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Copies of the values. Under several replicas this worker's first one's: they are equal."""
    return {name: np.array(_first(_raw(v)).numpy()) for name, v in variables.items()}


def write(variables: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign `values` to every one of `variables`.

    Raises:
        DataError: a variable is missing in `values` or has another shape; nothing has been assigned then.
    """
    for name, variable in variables.items():
        if name not in values:
            raise DataError(f"{source} holds no variable {name}: it is of another model or another version of kubetune")
        if tuple(values[name].shape) != tuple(variable.shape):
            raise DataError(
                f"{source}: {name} has shape {tuple(values[name].shape)}, this model needs {tuple(variable.shape)}"
            )
    for name, variable in variables.items():
        _raw(variable).assign(values[name])


def of_optimizer(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """The optimizer's state by a stable name."""
    return {f"optimizer/{i:04d}/{v.path}": v for i, v in enumerate(optimizer.variables)}
