"""Assign a checkpoint's values to a classifier. The checkpoint is this run's, or another run's (warm start)."""

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
    """Assign trained values to the variables in `targets`, by name, or change none of them if a value does not fit.

    `targets` are all or some of the classifier's variables. `source` describes the origin of the values in errors.
    Raises DataError if a value is missing or has another shape.
    """
    variables.assign_values(targets, values, source)
    refresh_normalization(classifier.backbone)


def load_warm_start(
    control: ControlChannel, classifier: Classifier, source: str, cache_folder: Path
) -> tuple[str, int]:
    """Assign to a classifier the variables that it has in common with another run's checkpoint.

    All workers must call this. The chief reads the checkpoint and broadcasts it. If the other run computed averages
    (EMA), they are assigned. Head variables that the checkpoint lacks, or that have another shape there, keep their
    initial values. A warning is logged if the checkpoint lacks backbone variables.

    Args:
        source: output_dir of the other run, local or in a bucket, to read its best or else its newest checkpoint; or
            the folder of a local checkpoint.
        cache_folder: folder into which a run in a bucket is downloaded.

    Returns:
        The path of the checkpoint, and the number of assigned variables.

    Raises:
        DataError: there is no checkpoint, it is corrupt, or it is a checkpoint of another backbone.
    """
    path, values = read_warm_start(source, cache_folder) if control.is_chief else ("", {})
    path = control.broadcast("warm start", lambda: path)
    values = select_inference_weights(control.broadcast_arrays("weights", values))
    names, warning = match_warm_start(collect_shapes(classifier.variables), collect_shapes(values), source)
    if warning:
        log.warning(warning)
    assign_values(classifier, {name: classifier.variables[name] for name in names}, values, source)
    return path, len(names)


Shapes = dict[str, tuple[int, ...]]  # name of a variable -> its shape


def collect_shapes(values: Mapping[str, Any]) -> Shapes:
    """Return the shapes of variables or arrays, by name."""
    return {name: tuple(value.shape) for name, value in values.items()}


def match_warm_start(model: Shapes, checkpoint: Shapes, source: str) -> tuple[list[str], str]:
    """Match a model's variables with those of a checkpoint, and return the variables that a warm start assigns.

    The head can have other classes or layers. Backbone variables of the same name must have the same shape, because
    another shape means another backbone or width.

    Args:
        model, checkpoint: shapes of the variables, by name.
        source: the value of `warm_start`, for messages.

    Returns:
        The names of the variables to assign, and a warning if the checkpoint lacks backbone variables, else "".

    Raises:
        DataError: a backbone variable has another shape, or the checkpoint has no backbone variable.
    """
    matches = [name for name, shape in model.items() if checkpoint.get(name) == shape]
    backbone_names = [name for name in model if name.startswith("backbone/")]
    mismatches = [name for name in backbone_names if name in checkpoint and name not in matches]
    missing_names = [name for name in backbone_names if name not in checkpoint]
    total, fix = len(backbone_names), "give a run with the same model.backbone and model.alpha"
    if mismatches:
        name = mismatches[0]
        problem = (f"is of another backbone: {len(mismatches)} of {total} variables of the backbone have other shapes, "
                   f"the first: {name} {list(checkpoint[name])}, here {list(model[name])}")  # fmt: skip
        raise DataError(problem, key="warm_start", value=source, fix=fix)
    if len(missing_names) == total:
        raise DataError("has none of the backbone's variables", key="warm_start", value=source, fix=fix)
    warning = f"warm_start={source} has only {total - len(missing_names)} of the backbone's {total} variables: "
    return matches, f"{warning}{join_first(missing_names)} keep their initial values" if missing_names else ""


def read_warm_start(source: str, cache_folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Read the checkpoint for a warm start; return its local path and its variables, by name.

    `source` and `cache_folder` are as in `load_warm_start`. Raises DataError if there is no checkpoint or it is
    corrupt, and Interrupted if the bucket does not respond.
    """
    folder = Path(source).expanduser()
    if is_remote(source):
        folder = cache_folder / "warm_start"
        fetch_run(storage_path(source), folder)
    folder = find_warm_start(source, folder)
    return str(folder), read_checkpoint(storage_path(folder))[1]
