"""The files from which a new run reads its weights: `model.weights`, and the checkpoint of `warm_start`.

A new run records their checksums in run.json, so that a later start with other weights is rejected. A resumed run does
not read these files.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config.diff import INITIAL_WEIGHTS_KEYS, flatten
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
    """Return {"address", "crc32c"} of a new run's initial weights, by configuration key, for run.json.

    The keys are "model.weights" and "warm_start". A key is omitted if its value is not an address, or if the checksum
    cannot be computed.
    """
    weights_by_key = {}
    values = flatten(config.model_dump(mode="json"))
    for key in INITIAL_WEIGHTS_KEYS:
        if (address := values.get(key)) and (crc32c := _compute_crc32c(key, address)):
            weights_by_key[key] = {"address": address, "crc32c": crc32c}
    return weights_by_key


def check_same_weights(run: str, recorded: Mapping[str, Any], config: RequestedConfig) -> None:
    """Raise a DataError if a run's first start had other initial weights than those in `config`.

    Weights at the recorded address are not compared, nor are weights that no longer exist, because a resumed run does
    not need them.

    Args:
        run: the run's output_dir, for the error.
        recorded: the result of `describe_initial_weights` at the run's first start.
        config: the configuration of this start.
    """
    values = flatten(config.model_dump(mode="json"))
    for key, recorded_weights in recorded.items():
        address = values.get(key)
        crc32c = _compute_crc32c(key, address) if address and address != recorded_weights["address"] else ""
        if crc32c not in ("", recorded_weights["crc32c"]):
            problem = f"{run} began with other weights (CRC32C {recorded_weights['crc32c']}, now {crc32c})"
            fix = f"give {recorded_weights['address']}, which need not exist any more, or another output_dir"
            raise DataError(problem, key=key, value=address, fix=fix)


def _compute_crc32c(key: str, address: str) -> str:
    """Return the CRC32C of the weights at an address, as 8 hex digits; "" if it cannot be determined."""
    if key == "model.weights" and address in NAMED_WEIGHTS:
        return ""
    with suppress(OSError, TrainerError, *CONTENT_ERRORS):
        if key == "model.weights":
            info = storage_path(address).stat() if is_remote(address) else None
            if info and info.crc32c is None:  # an object in S3 that another program has written
                return crc32c_hex(info.path.read())
            crc32c = info.crc32c if info else compute_file_crc32c(Path(address).expanduser())
            return f"{crc32c:08x}"
        if not is_remote(address):  # a remote run would have to be downloaded
            manifest = json.loads((find_warm_start(address, Path(address).expanduser()) / "manifest.json").read_bytes())
            return str(manifest["variables.npz"]["crc32c"])
    return ""


def find_warm_start(source: str, folder: Path) -> Path:
    """Return the checkpoint folder for a warm start: a run's best checkpoint, or else its newest.

    `folder` is a run's local output_dir, or one of its checkpoints, which is then returned. `source` is the value of
    `warm_start`, for errors. Raises DataError if there is no checkpoint, or the file `BEST` is corrupt.
    """
    checkpoints = open_local_checkpoints(source, folder)
    if checkpoints.folder.parent != folder:
        return folder
    best_names = read_pointer(storage_path(checkpoints.folder / "BEST"))
    steps = checkpoints.list_steps()
    return checkpoints.path(next((step for step in steps if checkpoints.path(step).name in best_names), steps[-1]))


def open_local_checkpoints(source: str, folder: Path) -> CheckpointFolder:
    """Open a run's checkpoints for reading.

    `folder` is the run's local output_dir, or one of its checkpoints. `source` is the value of `warm_start`, for
    errors. Raises DataError if the folder does not exist, or the run has no checkpoint.
    """
    run_folder = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    checkpoints = CheckpointFolder(run_folder / "checkpoints", 1, log.info)
    if not folder.is_dir() or not checkpoints.list_steps():
        raise DataError("there is no checkpoint", key="warm_start", value=source, fix="give the output_dir of a run")
    return checkpoints
