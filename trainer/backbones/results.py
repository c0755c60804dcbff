"""Store the results of a comparison: a folder per backbone, with a file per fold and a file of sizes and times.

The name of a backbone's folder contains a hash of its cache key, which is everything that its predictions depend on. So
an interrupted comparison that is started again, or another one with the same output folder, reads a stored result only
if it would compute the same one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from trainer.errors import ConfigError, DataError
from trainer.monitoring.log import log
from trainer.names import escape_unprintable, make_file_stem
from trainer.storage.path import StoragePath
from trainer.storage.small_files import read_json, require_json_object, require_nonnegative

T = TypeVar("T")
FORMAT = 1  # part of the hash of a cache key; increment it when the content of the files changes
RESULTS = "results"  # name of the folder in the output folder that contains the results of all backbones
SUMMARY = "backbones.json"  # name of the summary in the output folder


@dataclass(frozen=True)
class FoldResult:
    """The predictions of a head for the examples of the fold that it was not trained on."""

    indices: np.ndarray  # int64 [n]: example indices in the pool of train and validation examples, increasing
    predictions: np.ndarray  # int64 [n]: predicted class indices
    seconds: float  # time to train the head on features


@dataclass(frozen=True)
class Measurements:
    """Sizes of a backbone with its head, and the time of its forward pass on one machine.

    The names of the fields are the keys of measurements.json.
    """

    image_size: int  # height and width, pixels
    parameters: int  # number of values in all variables
    bytes: int  # total size of all variables
    single_ms: float  # median time of a batch of one image
    batch_ms: float  # time per image: median time of a batch of `batch_rows` images, divided by `batch_rows`
    batch_rows: int  # number of images in that batch
    machine: str  # description of the machine on which the times were measured


def require_comparison_folder(folder: StoragePath) -> None:
    """Raise a ConfigError if a folder has files but no comparison, so that results are not mixed with other files.

    A folder that is empty or does not exist is accepted too, because a new comparison can be written to it.
    """
    names = {info.path.name for info in folder.list(recursive=False)} | {child.name for child in folder.folders()}
    if names and not names & {RESULTS, SUMMARY}:
        problem = f"is not empty and holds no comparison ({escape_unprintable(min(names))})"
        raise ConfigError(problem, key="output", value=str(folder), fix="give an empty folder, or that of a comparison")


def make_folder_name(backbone: str, cache_key: Mapping[str, Any]) -> str:
    """Return the name of a backbone's folder, such as `mobilenet_v2-0a1b2c3d4e5f`.

    Args:
        backbone: name of the backbone.
        cache_key: everything that the backbone's predictions depend on, JSON-serializable.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **cache_key}, sort_keys=True).encode())
    return f"{make_file_stem(backbone)}-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class ResultFolder:
    """The stored results of one backbone."""

    folder: StoragePath  # it may not exist yet
    num_examples: int  # in the pool of train and validation examples
    num_classes: int

    def read_fold(self, fold: int) -> FoldResult | None:
        """Return the stored result of a fold, or None if there is none or it is corrupt."""
        return self._read(f"fold-{fold + 1}.json", self._parse_fold)

    def write_fold(self, fold: int, result: FoldResult) -> None:
        """Write the result of a fold atomically."""
        arrays = {"indices": result.indices.tolist(), "predictions": result.predictions.tolist()}
        self._write(f"fold-{fold + 1}.json", {**arrays, "seconds": result.seconds})

    def read_measurements(self) -> Measurements | None:
        """Return the stored measurements, or None if there are none or they are corrupt."""
        return self._read("measurements.json", _parse_measurements)

    def write_measurements(self, measurements: Measurements) -> None:
        """Write the measurements atomically."""
        self._write("measurements.json", asdict(measurements))

    def _parse_fold(self, value: Any) -> FoldResult:
        """Parse the content of a fold's file. Raise one of `CONTENT_ERRORS` if it is invalid."""
        fields = require_json_object(value)
        indices, predictions = (np.asarray(fields[key]) for key in ("indices", "predictions"))
        for array, limit in ((indices, self.num_examples), (predictions, self.num_classes)):
            if array.ndim != 1 or array.dtype.kind != "i" or not ((array >= 0) & (array < limit)).all():
                raise ValueError("not a list of indices")
        if not len(indices) or (np.diff(indices) <= 0).any():
            raise ValueError("the example indices are not increasing, or there are none")
        if len(indices) != len(predictions):
            raise ValueError("the number of predictions is not that of the examples")
        return FoldResult(indices, predictions, require_nonnegative(fields["seconds"]))

    def _read(self, name: str, parse: Callable[[Any], T]) -> T | None:
        """Read a JSON file with `parse`. Return None if it does not exist or, with a warning, if it is corrupt."""
        try:
            return read_json(self.folder / name, parse, fix="")
        except DataError as error:
            log.warning(f"{error.problem}; computing it again")
            return None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        (self.folder / name).write(json.dumps(value) + "\n")


def _parse_measurements(value: Any) -> Measurements:
    """Parse the content of measurements.json. Raise one of `CONTENT_ERRORS` if it is invalid."""
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
