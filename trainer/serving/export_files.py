"""Locate an export, and read its labels and drift reference. This module does not import TensorFlow."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.drift import parse_reference
from trainer.storage.base import ObjectInfo
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import parse_json
from trainer.storage.staging import is_remote, stage
from trainer.storage.versions import GRAPH, MANIFEST, describe_corruption, list_versions, parse_manifest

LABELS, REFERENCE = "assets/labels.txt", "assets/reference.json"  # files in a SavedModel: class names, drift reference
MAX_EXPORT_BYTES = 20 * 1024**3  # maximum size of an export in a bucket, which is copied to the local disk


@dataclass(frozen=True)
class Export:
    """A SavedModel on the local disk, with its labels and drift reference."""

    address: str  # the setting `model`, for messages
    folder: Path
    version: str  # the name of the version's folder if it is a number, else "1"
    classes: tuple[str, ...]  # class names from labels.txt, in the order of the probabilities
    reference: dict[str, Any] | None  # parsed reference.json; None if the export does not have this file
    graph: ObjectInfo | None = field(default=None, compare=False)  # the original saved_model.pb, in the bucket or local


@dataclass(frozen=True)
class Prediction:
    """The model's outputs for one image."""

    probabilities: np.ndarray  # float32 [classes]
    embedding: np.ndarray | None = None  # the C pooled features, float32 [C]; None if the signature omits them
    heatmap: np.ndarray | None = None  # Grad-CAM of the predicted class, float32 [h, w] in 0..1; None if not requested


def find_export(address: str, cache_dir: Path, log_message: Callable[[str], None]) -> Export:
    """Return the newest version of an export whose labels and reference can be read.

    Newer versions, which cannot be read, are logged and skipped.

    Args:
        address: a run's output_dir, its folder `export`, a folder of numbered SavedModels, or one SavedModel; local or
            in a bucket.
        cache_dir: folder for local copies of exports in a bucket.
        log_message: logs what is copied and which versions are skipped.

    Raises:
        ConfigError: the address has an unsupported scheme.
        DataError: there is no SavedModel, or no version can be read; in this case, the newest version's error.
        Interrupted: the bucket does not respond.
    """
    failures: list[tuple[str, DataError]] = []  # (version, error)
    for graph in list_export_versions(address):
        try:
            export = read_export(address, graph, cache_dir, log_message, check_cancelled=lambda: None)
        except DataError as error:
            failures.append((graph.path.parent.name, error))
            continue
        for version, failure in failures:
            log_message(f"version {version} is not served: {failure}")
        return export
    raise failures[0][1]


def list_export_versions(address: str) -> list[ObjectInfo]:
    """List the file `saved_model.pb` of each version at an address (see `find_export`), newest first.

    Raises DataError if there is no version.
    """
    root = storage_path(address)
    if graph := (root / GRAPH).stat():
        return [graph]
    for base in (root, root / "saved_model", root / "export" / "saved_model"):
        if versions := list_versions(base):
            return versions
    raise _make_no_export_error(address, root)


def read_export(
    address: str,
    graph: ObjectInfo,
    cache_dir: Path,
    log_message: Callable[[str], None],
    check_cancelled: Callable[[], None],
) -> Export:
    """Read a version's labels and reference, after copying the version to the local disk if it is in a bucket.

    Args:
        address: the setting `model`, for messages.
        graph: the version's `saved_model.pb`, from `list_export_versions`.
        cache_dir: folder for local copies.
        log_message: logs what is copied.
        check_cancelled: called after each copied file; may raise an exception to cancel.

    Raises:
        DataError: the version differs from its manifest, has no labels, or is larger than `MAX_EXPORT_BYTES`; its
            labels are corrupt; or its reference is corrupt or belongs to another model.
        Interrupted: the bucket does not respond.
    """
    source = graph.path.parent
    folder = Path(stage(str(source), cache_dir, MAX_EXPORT_BYTES, log_message, check_cancelled))
    if (manifest := _read_asset(folder / MANIFEST, address)) is not None:
        parsed = parse_json(manifest, parse_manifest, source / MANIFEST, "promote the run again")
        if damage := describe_corruption(folder, parsed):
            raise DataError(f"{source}: {damage}", key="model", value=address, fix="promote the run again")
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
    return Export(address, folder, source.name if source.name.isdecimal() else "1", classes, reference, graph)


def _read_asset(file: Path, address: str) -> bytes | None:
    """Read a file of an export; None if it does not exist. Raises DataError if it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        problem, fix = f"{file} cannot be read ({error.strerror})", "check its permissions, or export it again"
        raise DataError(problem, key="model", value=address, fix=fix) from None


def _make_no_export_error(address: str, root: StoragePath) -> DataError:
    """Return the error for an address without a SavedModel; its problem and fix depend on what is at the address."""
    if root.exists():
        fix = "give the folder of a SavedModel"
        return DataError("is a file, not a SavedModel", key="model", value=address, fix=fix)
    if (root / "config.yaml").exists():
        fix = "finish the run with saved_model in export.formats, or run trainer.export"
        return DataError("is a run without export/saved_model", key="model", value=address, fix=fix)
    problem = f"has no {GRAPH}, directly or in a numbered folder of it, of saved_model/ or of export/saved_model/"
    fix = "give the output_dir of a run, or its export"
    if not root.is_folder():
        location = "" if is_remote(address) or os.path.isabs(address) else f" in {os.getcwd()}"
        return DataError(f"does not exist{location}", key="model", value=address, fix=fix)
    return DataError(problem, key="model", value=address, fix=fix)
