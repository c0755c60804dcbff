"""Assign checkpoint values to a classifier, also from another run (warm start)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.data.records import join_first
from trainer.errors import DataError
from trainer.models.classifier import Classifier
from trainer.models.weights import refresh_normalization
from trainer.monitoring.log import log
from trainer.runs.checkpoints import read_checkpoint, select_inference_weights
from trainer.runs.initial_weights import find_warm_start
from trainer.runs.publisher import fetch_run
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.training import variables


def assign_values(classifier: Classifier, targets: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign trained values, by name, to `targets`, which are all or some of the classifier's variables.

    Raises DataError if a value is missing or has another shape; then nothing was assigned. `source` names the values.
    """
    variables.assign_values(targets, values, source)
    refresh_normalization(classifier.backbone)


def load_warm_start(
    control: ControlChannel, classifier: Classifier, source: str, cache_folder: Path
) -> tuple[str, int]:
    """Assign the variables that this model and another run's checkpoint have in common, with averages (EMA) if any.

    All workers must call this; the chief reads the checkpoint and broadcasts it. Return its path and the number of
    assigned values. A head with other classes keeps its initial values. Backbone variables that the checkpoint lacks
    cause a warning.

    Args:
        source: output_dir of the other run, local or in a bucket, to read its best or else its newest checkpoint; or
            the folder of a local checkpoint.
        cache_folder: a run in a bucket is downloaded below it.

    Raises DataError if there is no checkpoint, or it is of another backbone (`match_warm_start`).
    """
    path, values = read_warm_start(source, cache_folder) if control.is_chief else ("", {})
    path = control.broadcast("warm start", lambda: path)
    values = select_inference_weights(control.broadcast_arrays("weights", values))
    names, warning = match_warm_start(collect_shapes(classifier.variables), collect_shapes(values), source)
    if warning:
        log.warning(warning)
    assign_values(classifier, {name: classifier.variables[name] for name in names}, values, source)
    return path, len(names)


Shapes = dict[str, tuple[int, ...]]  # shape of each variable by its name


def collect_shapes(values: Mapping[str, Any]) -> Shapes:
    """Return the shapes of variables or arrays by name."""
    return {name: tuple(value.shape) for name, value in values.items()}


def match_warm_start(model: Shapes, checkpoint: Shapes, source: str) -> tuple[list[str], str]:
    """Return the names of the variables that a warm start assigns, and a warning, "" if the backbone is complete.

    The head can have other classes or layers. Backbone variables that the checkpoint lacks cause a warning. Backbone
    variables of the same name must have the same shape, since another shape means another backbone or width.

    Raises DataError if a backbone variable has another shape, or the checkpoint has no backbone variable.
    """
    matching = [name for name, shape in model.items() if checkpoint.get(name) == shape]
    backbone = [name for name in model if name.startswith("backbone/")]
    differing = [name for name in backbone if name in checkpoint and name not in matching]
    missing = [name for name in backbone if name not in checkpoint]
    total, fix = len(backbone), "give a run with the same model.backbone and model.alpha"
    if differing:
        first = differing[0]
        problem = (f"is of another backbone: {len(differing)} of {total} variables of the backbone have other shapes, "
                   f"the first: {first} {list(checkpoint[first])}, here {list(model[first])}")  # fmt: skip
        raise DataError(problem, key="warm_start", value=source, fix=fix)
    if len(missing) == total:
        raise DataError("has none of the backbone's variables", key="warm_start", value=source, fix=fix)
    warning = f"warm_start={source} has only {total - len(missing)} of the backbone's {total} variables: "
    return matching, f"{warning}{join_first(missing)} keep their initial values" if missing else ""


def read_warm_start(source: str, cache_folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Read the checkpoint of a warm start; return its local path and its variables."""
    folder = Path(source).expanduser()
    if is_remote(source):
        folder = cache_folder / "warm_start"
        fetch_run(storage_path(source), folder)
    folder = find_warm_start(source, folder)
    return str(folder), read_checkpoint(storage_path(folder))[1]
