"""Restore the variables of a classifier from a checkpoint of its own or of another run (warm start)."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.errors import DataError
from trainer.models.classifier import Classifier
from trainer.models.weights import refresh_normalization
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, names_in, weights_of
from trainer.runs.publisher import Publisher
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.training import variables


def assign_values(classifier: Classifier, chosen: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign trained values, by name, to the `chosen` ones of a classifier's variables.

    Raises DataError, and assigns nothing, if a value is missing or has another shape.
    """
    variables.write(chosen, values, source)
    refresh_normalization(classifier.backbone)


def take_weights(control: ControlChannel, classifier: Classifier, source: str, cache_folder: Path) -> tuple[str, int]:
    """Assign every variable of the same name and shape from another run's best (or newest) checkpoint, averaged if that
    run used EMA, on every worker. `source` is its output_dir or a checkpoint, local or gs://, which the chief reads.

    Returns:
        the path of the checkpoint, and the number of assigned variables.

    Raises:
        DataError: there is no checkpoint, or none of its variables matches.
    """
    path, values = _read(source, cache_folder) if control.is_chief else ("", {})
    path = control.broadcast("warm start", lambda: path)
    values = weights_of(control.broadcast_arrays("weights", values))
    own = classifier.variables
    matching = {n: v for n, v in own.items() if n in values and tuple(values[n].shape) == tuple(v.shape)}
    if not matching:
        problem, fix = "none of its variables matches this model", "give a run with the same backbone"
        raise DataError(problem, key="warm_start", value=source, fix=fix)
    assign_values(classifier, matching, values, source)
    return path, len(matching)


def _read(source: str, cache_folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    folder = Path(source).expanduser()
    if is_remote(source):
        folder = cache_folder / "warm_start"
        Publisher(folder, storage_path(source), None).fetch()
    checkpoints = local_checkpoints(source, folder)
    pointer = storage_path(checkpoints.folder / "BEST")
    names = names_in(pointer) if checkpoints.folder.parent == folder else [folder.name]
    steps = checkpoints.steps()
    step = next((step for step in steps if checkpoints.path(step).name in names), steps[-1])
    return str(checkpoints.path(step)), checkpoints.read(step)[1]


def local_checkpoints(source: str, folder: Path) -> CheckpointFolder:
    """The checkpoints of a run; `folder` is its output_dir or one of them. Raises DataError if there are none."""
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    checkpoints = CheckpointFolder(home / "checkpoints", 1, log.info)
    if not checkpoints.steps():
        raise DataError("there is no checkpoint", key="warm_start", value=source, fix="give the output_dir of a run")
    return checkpoints
