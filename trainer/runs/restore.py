"""Restoring the variables of a classifier from its own checkpoint, or from another run (warm start)."""

from pathlib import Path
from typing import Any

import numpy as np

from trainer.cluster.control import ControlChannel
from trainer.errors import DataError
from trainer.models.classifier import Classifier
from trainer.models.weights import refresh_normalization
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, weights_of
from trainer.runs.publisher import Publisher
from trainer.storage.path import storage_path
from trainer.storage.staging import is_remote
from trainer.training import variables


def assign_values(classifier: Classifier, chosen: dict[str, Any], values: dict[str, np.ndarray], source: str) -> None:
    """Assign trained values to the `chosen` ones of a classifier's variables, by name.

    Raises:
        DataError: a value is missing or has another shape; nothing has been assigned then.
    """
    variables.write(chosen, values, source)
    refresh_normalization(classifier.backbone)


def take_weights(control: ControlChannel, classifier: Classifier, source: str, cache_folder: Path) -> tuple[str, int]:
    """Assign every variable of the same name and shape from another run's best (or newest) checkpoint, averaged where
    that run had EMA on, on every worker; the chief reads. `source` is its output_dir or a checkpoint, local or gs://.

    Returns:
        the path of the checkpoint, and the number of assigned variables.

    Raises:
        DataError: there is no checkpoint, or none of its variables fits.
    """
    where, values = _read(source, cache_folder) if control.is_chief else ("", {})
    where = control.broadcast("warm start", lambda: where)
    values = weights_of(control.broadcast_arrays("weights", values))
    own = classifier.variables
    fit = {n: v for n, v in own.items() if n in values and tuple(values[n].shape) == tuple(v.shape)}
    if not fit:
        raise DataError(f"warm_start={source}: none of its variables fits this model; is it of another backbone?")
    assign_values(classifier, fit, values, source)
    return where, len(fit)


def _read(source: str, cache_folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    folder = Path(source).expanduser()
    if is_remote(source):
        folder = cache_folder / "warm_start"
        Publisher(folder, storage_path(source), None).fetch()
    there = local_checkpoints(source, folder)
    pointer = there.folder / "BEST"
    name = folder.name if there.folder.parent != folder else pointer.read_text().strip() if pointer.exists() else ""
    steps = [step for step in there.steps() if there.path(step).name == name] or there.steps()[-1:]
    return str(there.path(steps[0])), there.read(steps[0])[1]


def local_checkpoints(source: str, folder: Path) -> CheckpointFolder:
    """The checkpoints of the run that `folder` is the output_dir, or one of the checkpoints, of.

    Raises:
        DataError: there is none.
    """
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    there = CheckpointFolder(home / "checkpoints", 1, log.info)
    if not there.steps():
        raise DataError(f"warm_start={source}: there is no checkpoint; give the output_dir of a run")
    return there
