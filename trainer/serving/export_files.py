"""Locate an export, read the files next to its graph, and define predictions; without TensorFlow."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.drift import parse_reference
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.staging import is_remote, stage

GRAPH, LABELS, REFERENCE = "saved_model.pb", "assets/labels.txt", "assets/reference.json"
MAX_EXPORT_BYTES = 20 * 1024**3  # of an export that is copied from a bucket


@dataclass(frozen=True)
class Export:
    """A SavedModel on the local disk; `reference` is its reference.json, None if it has none."""

    address: str
    folder: Path
    version: str
    classes: tuple[str, ...]
    reference: dict[str, Any] | None


@dataclass(frozen=True)
class Prediction:
    """The outputs of the model for one image.

    Attributes:
        probabilities: float32 [classes].
        embedding: float32 [C], the pooled features; None if the export has no such output.
        heatmap: float32 [h, w] in 0..1, Grad-CAM of the most probable class; None without `explain`.
    """

    probabilities: np.ndarray
    embedding: np.ndarray | None = None
    heatmap: np.ndarray | None = None


def find_export(address: str, cache_dir: Path, note: Callable[[str], None]) -> Export:
    """The newest version of the export at an address, copied to `cache_dir` from a bucket.

    Args:
        address: output_dir of a run, its `export`, a folder of numbered SavedModels, or one SavedModel.

    Raises:
        DataError: there is none, or kubetune did not export it.
        Interrupted: the bucket does not respond.
    """
    source = _newest(address, storage_path(address))
    folder = Path(stage(str(source), cache_dir, MAX_EXPORT_BYTES, note, lambda: None))
    if not (folder / LABELS).exists():
        raise DataError(f"{source} has no {LABELS}", key="model", value=address, fix="export it with kubetune")
    classes = tuple((folder / LABELS).read_text(encoding="utf-8").splitlines())
    reference = None
    if (file := folder / REFERENCE).exists() and (reference := parse_reference(file.read_bytes(), classes)) is None:
        raise DataError(f"{file} is damaged or of another model", key="model", value=address, fix="export again")
    return Export(address, folder, source.name if source.name.isdigit() else "1", classes, reference)


def _newest(address: str, home: StoragePath) -> StoragePath:
    if (home / GRAPH).exists():
        return home
    for base in (home, home / "saved_model", home / "export" / "saved_model"):
        numbered = [f for f in base.folders() if f.name.isdigit() and (f / GRAPH).exists()]
        if numbered:
            return max(numbered, key=lambda folder: int(folder.name))
    if home.exists():
        raise DataError(
            "is a file, not a SavedModel", key="model", value=address, fix="give the folder of a SavedModel"
        )
    if not home.is_folder():
        parent = "" if is_remote(address) or os.path.isabs(address) else f" in {os.getcwd()}"
        raise DataError(
            f"does not exist{parent}", key="model", value=address, fix="give the output_dir of a run, or its export"
        )
    if (home / "config.yaml").exists():
        raise DataError(
            "the run has no export/saved_model",
            key="model",
            value=address,
            fix="let it end, with saved_model in export.formats",
        )
    raise DataError(
        f"there is no {GRAPH} in it, in a numbered folder, in saved_model/ or in export/saved_model/",
        key="model",
        value=address,
        fix="give the output_dir of a run, or its export",
    )
