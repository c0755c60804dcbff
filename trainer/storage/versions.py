"""Numbered versions of a model in one folder, NAME/1, NAME/2, ..., as TensorFlow Serving and `trainer.serve` read them.

A version is visible from the moment its `saved_model.pb` exists. A local version is renamed as a whole. A bucket has no
atomic rename, so there `saved_model.pb` is uploaded last, in one request, and deleted first. A number is used once.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.storage.base import ObjectInfo, StoragePath
from trainer.storage.local import LocalPath, compute_file_crc32c, sync, temporary_folder
from trainer.storage.small_files import require_json_object

GRAPH = "saved_model.pb"
MANIFEST = "promotion.json"  # in a version that `trainer.promote` wrote: where it comes from, and its files


def number_of(folder: StoragePath) -> int | None:
    """Return the number of a version from the name of its folder; None if the folder is something else."""
    name = folder.name
    return int(name) if name.isascii() and name.isdecimal() and str(int(name)) == name else None


def list_versions(folder: StoragePath) -> list[ObjectInfo]:
    """List the `saved_model.pb` of the visible versions, newest first. Each is unique to a version and its content."""
    numbered = [child for child in folder.folders() if number_of(child) is not None]
    graphs = [(child / GRAPH).stat() for child in sorted(numbered, key=lambda child: -int(child.name))]
    return [graph for graph in graphs if graph is not None]


def commit_version(folder: StoragePath, source: Path) -> StoragePath:
    """Add the files of a local folder as the next version; the caller has the lease on `folder`.

    An incomplete version of a killed process stays invisible; `delete_incomplete` deletes it.
    """
    used = [number for child in folder.folders() if (number := number_of(child)) is not None]
    version = folder / str(max(used, default=0) + 1)
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    if isinstance(version, LocalPath):
        with temporary_folder(version.path) as temporary:
            for name in files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary / name)
                sync(temporary / name)
            os.rename(temporary, version.path)
        sync(version.path.parent)
        return version
    for name in sorted(files, key=lambda name: name == GRAPH):  # last, since it makes the version visible
        (version / name).upload(source / name)
    return version


def delete_version(version: StoragePath) -> None:
    """Delete a version; it is invisible from the first step on."""
    (version / GRAPH).delete()
    version.delete_tree()


def delete_incomplete(folder: StoragePath) -> None:
    """Delete the versions that a killed process left incomplete; the caller has the lease on `folder`."""
    for child in folder.folders():
        if number_of(child) is not None and not (child / GRAPH).exists():
            child.delete_tree()


def checksum_files(folder: Path) -> dict[str, list[int]]:
    """Return size and CRC32C of each file below a local folder, by relative name, without the manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {n: [p.stat().st_size, compute_file_crc32c(p)] for n, p in files.items() if n != MANIFEST}


def parse_manifest(value: Any) -> dict[str, Any]:
    """Validate a manifest; raise one of `CONTENT_ERRORS` if it is something else."""
    files = require_json_object(require_json_object(value)["files"])
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in files.values()):
        raise ValueError("files have no size and checksum")
    value["run"], value["origin"]
    return dict(value)


def find_damage(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Describe the first file of a local version that differs from its manifest; "" if there is none."""
    for name, (size, crc32c) in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or compute_file_crc32c(path) != crc32c:
            return f"{name} is corrupt"
    return ""
