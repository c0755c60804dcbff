"""The export at an address, and the answers of its model.

Nothing here imports TensorFlow: only files are read, and no code of the model runs.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.drift import BINS
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.staging import is_remote, stage

GRAPH, LABELS, REFERENCE = "saved_model.pb", "assets/labels.txt", "assets/reference.json"
LARGEST = 20 * 1024**3  # bytes of an export that is fetched


@dataclass(frozen=True)
class Export:
    """A SavedModel on this machine, and the files beside its graph.

    Attributes:
        reference: reference.json, how test images looked to this model; None where the export has none.
    """

    address: str
    folder: Path
    version: str
    classes: tuple[str, ...]
    reference: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """The outputs of the model for one image.

    Attributes:
        probabilities: float32 [classes].
        embedding: float32 [C], the pooled features; None where the export does not give them.
        heatmap: float32 [h, w] in 0..1, Grad-CAM of the most probable class; None where it was not asked for.
    """

    probabilities: np.ndarray
    embedding: np.ndarray | None = None
    heatmap: np.ndarray | None = None


@dataclass(frozen=True)
class Unreadable:
    """An image with a valid header and pixels that cannot be decoded."""

    reason: str


def find_export(address: str, cache_dir: Path, note: Callable[[str], None]) -> Export:
    """The newest version of the export at an address, which is fetched where it is in a bucket.

    Args:
        address: of a run's output_dir, its `export`, a folder of numbered SavedModels, or one SavedModel.

    Raises:
        DataError: there is none, or kubetune did not export it.
        Interrupted: the bucket does not answer.
    """
    home = storage_path(address)
    newest = _newest(address, home)
    folder = Path(stage(str(newest), cache_dir, LARGEST, note, lambda: None))
    if not (folder / LABELS).exists():
        raise DataError(f"model={address}: {newest} has no {LABELS}, so kubetune did not export it; export it again")
    classes = tuple((folder / LABELS).read_text(encoding="utf-8").splitlines())
    return Export(address, folder, newest.name if newest.name.isdigit() else "1", classes, _reference(folder, classes))


def _newest(address: str, home: StoragePath) -> StoragePath:
    if (home / GRAPH).exists():
        return home
    for base in (home, home / "saved_model", home / "export" / "saved_model"):
        numbered = [f for f in base.folders() if f.name.isdigit() and (f / GRAPH).exists()]
        if numbered:
            return max(numbered, key=lambda folder: int(folder.name))
    if home.exists():
        raise DataError(
            f"model={address} is a file; serving takes the folder of a SavedModel, which holds no Python code, or the "
            "output_dir of a run that exported one"
        )
    if not home.is_folder():
        seen = "" if is_remote(address) or os.path.isabs(address) else f" (seen from {os.getcwd()})"
        raise DataError(f"model={address} does not exist{seen}; give the output_dir of a run, or its export")
    if (home / "config.yaml").exists():
        raise DataError(
            f"model={address} is a run without a SavedModel (nothing in {home}/export/saved_model); let it end, with "
            "saved_model in export.formats"
        )
    raise DataError(
        f"model={address} holds no SavedModel (no {GRAPH} in it, in a numbered folder, in saved_model/ or in "
        "export/saved_model/); give the output_dir of a run, or its export"
    )


def _reference(folder: Path, classes: tuple[str, ...]) -> dict[str, Any] | None:
    file = folder / REFERENCE
    if not file.exists():
        return None
    try:
        reference = json.loads(file.read_text(encoding="utf-8"))
        counts, seen = reference["confidence_histogram"]["counts"], int(reference["n"])
        if len(reference["class_frequencies"]) != len(classes) or len(counts) != BINS or seen < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file} is damaged or of another model; export again") from None
    return reference
