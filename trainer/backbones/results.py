"""The stored results of a comparison: one file per network and fold, and one of sizes and times per network.

The name of a network's folder has a hash of everything that its results depend on, so a later start, or another
comparison in the same folder, reads exactly the results that it would compute.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainer.errors import ConfigError, DataError
from trainer.monitoring.log import log
from trainer.names import escape_unprintable, make_file_stem
from trainer.storage.path import StoragePath
from trainer.storage.small_files import read_json, require_json_object, require_nonnegative

FORMAT = 1  # of the files; increment it when their content changes
RESULTS, SUMMARY = "results", "backbones.json"


@dataclass(frozen=True)
class FoldResult:
    """The predictions of a head for the examples of the fold that it was not trained on."""

    indices: np.ndarray  # int64 [n]: example index in the pool of train and validation, increasing
    predictions: np.ndarray  # int64 [n]: class index
    seconds: float  # to train the head on features


@dataclass(frozen=True)
class Measurements:
    """Sizes of a network with its head, and the times of its forward pass on this machine."""

    image_size: int  # pixels
    parameters: int
    bytes: int  # of its variables
    single_ms: float  # median of a batch of one image
    batch_ms: float  # median of a batch of `batch_rows` images, divided by their number
    batch_rows: int
    machine: str


def require_comparison_folder(folder: StoragePath) -> None:
    """Raise a ConfigError if a folder has files that are not of a comparison, which would be mixed with its own."""
    names = {info.path.name for info in folder.list(recursive=False)} | {child.name for child in folder.folders()}
    if names and not names & {RESULTS, SUMMARY}:
        problem = f"is not empty and holds no comparison ({escape_unprintable(min(names))})"
        raise ConfigError(problem, key="output", value=str(folder), fix="give an empty folder, or that of a comparison")


def name_folder(network: str, identity: Mapping[str, Any]) -> str:
    """Name the folder of a network with results that depend on `identity`, a JSON object."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **identity}, sort_keys=True).encode())
    return f"{make_file_stem(network)}-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class ResultFolder:
    """The results of one network."""

    folder: StoragePath
    examples: int  # of the pool
    classes: int

    def read_fold(self, fold: int) -> FoldResult | None:
        """Return a stored result; None if there is none, or it is corrupt."""
        return self._read(f"fold-{fold + 1}.json", self._parse_fold)

    def write_fold(self, fold: int, result: FoldResult) -> None:
        """Write a result atomically."""
        columns = {"indices": result.indices.tolist(), "predictions": result.predictions.tolist()}
        self._write(f"fold-{fold + 1}.json", {**columns, "seconds": result.seconds})

    def read_measurements(self) -> Measurements | None:
        """Return the stored measurements; None if there are none, or they are corrupt."""
        return self._read("measurements.json", _parse_measurements)

    def write_measurements(self, measurements: Measurements) -> None:
        """Write the measurements atomically."""
        self._write("measurements.json", asdict(measurements))

    def _parse_fold(self, value: Any) -> FoldResult:
        fields = require_json_object(value)
        indices, predictions = (np.asarray(fields[key]) for key in ("indices", "predictions"))
        for column, limit in ((indices, self.examples), (predictions, self.classes)):
            if column.ndim != 1 or column.dtype.kind != "i" or not ((column >= 0) & (column < limit)).all():
                raise ValueError("not a list of indices")
        if len(indices) != len(predictions) or not len(indices) or (np.diff(indices) <= 0).any():
            raise ValueError("not a prediction for each example")
        return FoldResult(indices, predictions, require_nonnegative(fields["seconds"]))

    def _read(self, name: str, parse: Any) -> Any:
        try:
            return read_json(self.folder / name, parse, "")
        except DataError as error:
            log.warning(f"{error.problem}; computing it again")
            return None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        (self.folder / name).write(json.dumps(value) + "\n")


def _parse_measurements(value: Any) -> Measurements:
    fields = require_json_object(value)
    return Measurements(
        image_size=int(require_nonnegative(fields["image_size"])),
        parameters=int(require_nonnegative(fields["parameters"])),
        bytes=int(require_nonnegative(fields["bytes"])),
        single_ms=require_nonnegative(fields["single_ms"]),
        batch_ms=require_nonnegative(fields["batch_ms"]),
        batch_rows=int(require_nonnegative(fields["batch_rows"])),
        machine=str(fields["machine"]),
    )
