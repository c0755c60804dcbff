"""What the weights of a new run are read from: the file of `model.weights` and the checkpoint of `warm_start`.

A run that resumes reads neither. It records their checksums when it begins, so that others are refused.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.diff import INITIAL_WEIGHTS, flatten
from trainer.config.model import NAMED_WEIGHTS
from trainer.config.schema import RequestedConfig
from trainer.errors import DataError, TrainerError
from trainer.monitoring.log import log
from trainer.runs.checkpoints import CheckpointFolder, crc32c_hex, read_pointer
from trainer.storage.local import compute_file_crc32c
from trainer.storage.path import storage_path
from trainer.storage.small_files import CONTENT_ERRORS
from trainer.storage.staging import is_remote


def describe_initial_weights(config: RequestedConfig) -> dict[str, dict[str, str]]:
    """Return the address and the CRC32C of the initial weights of a new run, by key, for run.json.

    Without the keys that name no address, and those whose content cannot be read.
    """
    described = {}
    values = flatten(config.model_dump(mode="json"))
    for key in INITIAL_WEIGHTS:
        if (address := values.get(key)) and (crc32c := _compute_crc32c(key, address)):
            described[key] = {"address": address, "crc32c": crc32c}
    return described


def check_same_weights(run: str, recorded: Mapping[str, Any], config: RequestedConfig) -> None:
    """Raise a DataError if the run at the address `run` began with other weights than those of `config`.

    `recorded` is what `describe_initial_weights` returned. Weights at the recorded address, and those that do not exist
    any more, are not compared, because a run that resumes does not need them.
    """
    values = flatten(config.model_dump(mode="json"))
    for key, entry in recorded.items():
        address = values.get(key)
        crc32c = _compute_crc32c(key, address) if address and address != entry["address"] else ""
        if crc32c not in ("", entry["crc32c"]):
            problem = f"{run} began with other weights (CRC32C {entry['crc32c']}, now {crc32c})"
            fix = f"give {entry['address']}, which need not exist any more, or another output_dir"
            raise DataError(problem, key=key, value=address, fix=fix)


def _compute_crc32c(key: str, address: str) -> str:
    """Return the CRC32C of the variables at an address, in 8 hex digits; "" if they cannot be read, or have no file."""
    if key == "model.weights" and address in NAMED_WEIGHTS:
        return ""
    with suppress(OSError, TrainerError, *CONTENT_ERRORS):
        if key == "model.weights":
            info = storage_path(address).stat() if is_remote(address) else None
            if info and info.crc32c is None:  # an object of another program in S3
                return crc32c_hex(info.path.read())
            crc32c = info.crc32c if info else compute_file_crc32c(Path(address).expanduser())
            return f"{crc32c:08x}"
        if not is_remote(address):  # a run in a bucket would have to be downloaded
            manifest = json.loads((find_warm_start(address, Path(address).expanduser()) / "manifest.json").read_bytes())
            return str(manifest["variables.npz"]["crc32c"])
    return ""


def find_warm_start(source: str, folder: Path) -> Path:
    """Return the folder of the checkpoint for the `warm_start` value `source`: the best one, or else the newest.

    `folder` is the output_dir of a run, or one of its checkpoints, which is returned. Raises the DataError of
    `open_local_checkpoints`.
    """
    checkpoints = open_local_checkpoints(source, folder)
    if checkpoints.folder.parent != folder:
        return folder
    best, steps = read_pointer(storage_path(checkpoints.folder / "BEST")), checkpoints.list_steps()
    return checkpoints.path(next((step for step in steps if checkpoints.path(step).name in best), steps[-1]))


def open_local_checkpoints(source: str, folder: Path) -> CheckpointFolder:
    """Open the checkpoints of a run; `folder` is its output_dir or one of its checkpoints.

    Raises DataError, which names the `warm_start` value `source`, if the folder or its checkpoints do not exist.
    """
    home = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    checkpoints = CheckpointFolder(home / "checkpoints", 1, log.info)
    if not folder.is_dir() or not checkpoints.list_steps():
        raise DataError("there is no checkpoint", key="warm_start", value=source, fix="give the output_dir of a run")
    return checkpoints
