"""Numbered versions of a model in one folder, NAME/1, NAME/2, ..., as TensorFlow Serving and `trainer.serve` read them.

A version is visible to servers while its `saved_model.pb` exists. A local version becomes visible when its folder is
renamed. Buckets have no atomic rename, so in a bucket `saved_model.pb` is uploaded last and deleted first. A new
version has a higher number than all other versions.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.storage.base import ObjectInfo, StoragePath
from trainer.storage.local import LocalPath, compute_file_crc32c, sync, temporary_folder
from trainer.storage.small_files import require_json_object

GRAPH = "saved_model.pb"  # the file that makes a version visible
MANIFEST = "promotion.json"  # file that `trainer.promote` adds to a version: its origin, and the checksums of its files


def parse_version_number(folder: StoragePath) -> int | None:
    """Return the version number that is a folder's name, or None if the name is not a number such as "12"."""
    name = folder.name
    return int(name) if name.isascii() and name.isdecimal() and str(int(name)) == name else None


def list_versions(folder: StoragePath) -> list[ObjectInfo]:
    """Return the object info of each visible version's `saved_model.pb`, newest version first.

    Two such infos are equal only if the version and its content are the same.
    """
    version_folders = [child for child in folder.folders() if parse_version_number(child) is not None]
    graphs = [(child / GRAPH).stat() for child in sorted(version_folders, key=lambda child: -int(child.name))]
    return [graph for graph in graphs if graph is not None]


def commit_version(folder: StoragePath, source: Path) -> StoragePath:
    """Add the files in the local folder `source` as the next version, and return this version's folder.

    The caller must hold the lease on `folder`. If the process is killed, servers do not see the incomplete version, and
    `delete_incomplete` deletes it later.
    """
    used_numbers = [number for child in folder.folders() if (number := parse_version_number(child)) is not None]
    version = folder / str(max(used_numbers, default=0) + 1)
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    if isinstance(version, LocalPath):
        with temporary_folder(version.path) as temporary_path:
            for name in files:
                (temporary_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary_path / name)
                sync(temporary_path / name)
            os.rename(temporary_path, version.path)
        sync(version.path.parent)
        return version
    for name in sorted(files, key=lambda name: name == GRAPH):  # the graph last, because it makes the version visible
        (version / name).upload(source / name)
    return version


def delete_version(version: StoragePath) -> None:
    """Delete a version, beginning with the file that makes it visible."""
    (version / GRAPH).delete()
    version.delete_tree()


def delete_incomplete(folder: StoragePath) -> None:
    """Delete the versions that a killed process left incomplete. The caller must hold the lease on `folder`."""
    for child in folder.folders():
        if parse_version_number(child) is not None and not (child / GRAPH).exists():
            child.delete_tree()


def checksum_files(folder: Path) -> dict[str, list[int]]:
    """Return [size in bytes, CRC32C] of each file below a local folder, by relative name, without the manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: [path.stat().st_size, compute_file_crc32c(path)] for name, path in files.items() if name != MANIFEST}


def parse_manifest(value: Any) -> dict[str, Any]:
    """Return a manifest, a JSON object with "files", "run" and "origin"; raise a ValueError or KeyError otherwise."""
    files = require_json_object(require_json_object(value)["files"])
    if not all(isinstance(item, list) and len(item) == 2 for item in files.values()):
        raise ValueError("files have no size and checksum")
    value["run"], value["origin"]
    return dict(value)


def describe_corruption(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Describe the first file in a local version that differs from its manifest. Return "" if no file differs."""
    for name, (size, crc32c) in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or compute_file_crc32c(path) != crc32c:
            return f"{name} is corrupt"
    return ""
