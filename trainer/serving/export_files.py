"""Locate an export and read its labels and reference. This module does not import TensorFlow."""

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
MAX_EXPORT_BYTES = 20 * 1024**3  # of an export in a bucket, which is copied to the local disk


@dataclass(frozen=True)
class Export:
    """A SavedModel on the local disk."""

    address: str  # the setting `model`, for messages
    folder: Path
    version: str  # the name of its folder if that is a number, else "1"
    classes: tuple[str, ...]  # labels.txt, in the order of the probabilities
    reference: dict[str, Any] | None  # parsed reference.json; None if the export has none


@dataclass(frozen=True)
class Prediction:
    """The outputs of the model for one image."""

    probabilities: np.ndarray  # float32 [classes]
    embedding: np.ndarray | None = None  # float32 [C], the pooled features; None without the signature `explain`
    heatmap: np.ndarray | None = None  # float32 [h, w] in 0..1, Grad-CAM of the predicted class; None if not requested


def find_export(address: str, cache_dir: Path, log_message: Callable[[str], None]) -> Export:
    """Find the newest version of an export, and read its labels and reference.

    The address is the output_dir of a run, its `export`, a folder of numbered SavedModels, or one SavedModel. An export
    in a bucket is copied to `cache_dir`.

    Raises:
        DataError: there is no SavedModel, it has no labels, or labels or reference are corrupt or of another model.
        Interrupted: the bucket does not respond.
    """
    source = _find_newest_version(address, storage_path(address))
    folder = Path(stage(str(source), cache_dir, MAX_EXPORT_BYTES, log_message, lambda: None))
    labels, content = (_read_asset(folder / name, address) for name in (LABELS, REFERENCE))
    if labels is None:
        raise DataError(f"{source} has no {LABELS}", key="model", value=address, fix="export it with kubetune")
    try:
        classes = tuple(labels.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        problem = f"{folder / LABELS} is not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(problem, key="model", value=address, fix="export it again") from None
    reference = None if content is None else parse_reference(content, classes)
    if content is not None and reference is None:
        problem = f"{folder / REFERENCE} is corrupt or of another model"
        raise DataError(problem, key="model", value=address, fix="export it again")
    return Export(address, folder, source.name if source.name.isdecimal() else "1", classes, reference)


def _read_asset(file: Path, address: str) -> bytes | None:
    """Read a file of an export; return None if it does not exist."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        problem, fix = f"{file} cannot be read ({error.strerror})", "check its permissions, or export it again"
        raise DataError(problem, key="model", value=address, fix=fix) from None


def _find_newest_version(address: str, root: StoragePath) -> StoragePath:
    if (root / GRAPH).exists():
        return root
    for base in (root, root / "saved_model", root / "export" / "saved_model"):
        numbered = [f for f in base.folders() if f.name.isdecimal() and (f / GRAPH).exists()]
        if numbered:
            return max(numbered, key=lambda folder: int(folder.name))
    if root.exists():
        fix = "give the folder of a SavedModel"
        raise DataError("is a file, not a SavedModel", key="model", value=address, fix=fix)
    if (root / "config.yaml").exists():
        fix = "finish the run with saved_model in export.formats, or run trainer.export"
        raise DataError("is a run without export/saved_model", key="model", value=address, fix=fix)
    problem = f"has no {GRAPH}, directly or in a numbered folder of it, of saved_model/ or of export/saved_model/"
    fix = "give the output_dir of a run, or its export"
    if not root.is_folder():
        parent = "" if is_remote(address) or os.path.isabs(address) else f" in {os.getcwd()}"
        raise DataError(f"does not exist{parent}", key="model", value=address, fix=fix)
    raise DataError(problem, key="model", value=address, fix=fix)
