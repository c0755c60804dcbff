"""Assign the values of a checkpoint to a classifier: of the run itself, or of another run (warm start)."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.errors import DataError
from trainer.models.classifier import Classifier
from trainer.models.weights import refresh_normalization
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, inference_weights, read_checkpoint, read_pointer
from trainer.runs.publisher import fetch_run
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.training import variables


def assign_values(classifier: Classifier, targets: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign trained values, by name, to `targets`, all or some of the classifier's variables.

    Raises DataError if a value is missing or has another shape: nothing was assigned. `source` names the values.
    """
    variables.write(targets, values, source)
    refresh_normalization(classifier.backbone)


def load_warm_start(
    control: ControlChannel, classifier: Classifier, source: str, cache_folder: Path
) -> tuple[str, int]:
    """Assign the variables of another run's checkpoint that have the same name and shape, with averages (EMA) if any.

    All workers call this; the chief reads the checkpoint and broadcasts it. Return its path and the number of values.

    Args:
        source: output_dir of the other run, local or gs://, to read its best or else its newest checkpoint; or the
            folder of a local checkpoint.
        cache_folder: a run in a bucket is downloaded below it.

    Raises DataError if there is no checkpoint or none of its variables matches.
    """
    path, values = _read_source(source, cache_folder) if control.is_chief else ("", {})
    path = control.broadcast("warm start", lambda: path)
    values = inference_weights(control.broadcast_arrays("weights", values))
    matching = {
        name: variable
        for name, variable in classifier.variables.items()
        if name in values and tuple(values[name].shape) == tuple(variable.shape)
    }
    if not matching:
        problem, fix = "none of its variables matches this model", "give a run with the same backbone"
        raise DataError(problem, key="warm_start", value=source, fix=fix)
    assign_values(classifier, matching, values, source)
    return path, len(matching)


def _read_source(source: str, cache_folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Read the variables of the checkpoint that a warm start begins with, and return them with its local path."""
    folder = Path(source).expanduser()
    if is_remote(source):
        folder = cache_folder / "warm_start"
        fetch_run(storage_path(source), folder)
    checkpoints = local_checkpoints(source, folder)
    if checkpoints.folder.parent == folder:
        best, steps = read_pointer(storage_path(checkpoints.folder / "BEST")), checkpoints.steps()
        folder = checkpoints.path(next((step for step in steps if checkpoints.path(step).name in best), steps[-1]))
    return str(folder), read_checkpoint(storage_path(folder))[1]


def local_checkpoints(source: str, folder: Path) -> CheckpointFolder:
    """Return the checkpoints of a run; `folder` is its output_dir or one of its checkpoints.

    Raises DataError if the folder does not exist or the run has no checkpoint; `source` is the value of `warm_start`.
    """
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    checkpoints = CheckpointFolder(home / "checkpoints", 1, log.info)
    if not folder.is_dir() or not checkpoints.steps():
        raise DataError("there is no checkpoint", key="warm_start", value=source, fix="give the output_dir of a run")
    return checkpoints
