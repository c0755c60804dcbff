"""Checkpoints of a run: written to a temporary folder, committed by one rename, verified when read.

A checkpoint is a folder `step-00000420` with `variables.npz` (the exact values by name), `state.json` and
`manifest.json` (size and CRC32C of both). `LATEST` and `BEST` next to it are pointers: text files with checkpoint
names. On disk each has one name. In a bucket, where a folder name also has a token (`step-00000420-1a2b3c4d`),
`LATEST` lists all committed checkpoints, newest first.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.errors import DataError
from trainer.storage.arrays import pack, unpack
from trainer.storage.local import sync, temporary_folder, write_atomically
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS, parse_json, require_json_object
from trainer.types import LogMessage

PREFIX = "step-"
_NAME = re.compile(r"step-\d{8,}(-[0-9a-f]+)?", re.ASCII)
# Prefix of an earlier checkpoint of the same step, until its replacement is committed; a kill can leave it.
_REPLACED = ".replaced-"
_CORRUPT = "damaged-"


def crc32c_hex(content: bytes | np.ndarray) -> str:
    """Compute the CRC32C, formatted as 8 hex digits."""
    return f"{google_crc32c.value(content):08x}"


def is_checkpoint(name: str) -> bool:
    """Return whether this is the name of a committed checkpoint, on disk or in a bucket."""
    return bool(_NAME.fullmatch(name))


def is_local_checkpoint(name: str) -> bool:
    """Return whether this is the name that a checkpoint has on disk, and not of a copy, such as one from a bucket."""
    return is_checkpoint(name) and name == local_name(parse_step(name))


def local_name(step: int) -> str:
    """Return the name that the checkpoint of a step has on disk."""
    return f"{PREFIX}{step:08d}"


def parse_step(name: str) -> int:
    """Parse the step from the name of a checkpoint, on disk or in a bucket."""
    return int(name[len(PREFIX) :].partition("-")[0])


def has_checkpoints(names: Iterable[str]) -> bool:
    """Return whether these names in a folder `checkpoints` include a checkpoint, even a replaced or corrupt one."""
    return any(name.startswith((PREFIX, _REPLACED, f"{_CORRUPT}{PREFIX}")) for name in names)


def read_pointer(pointer: StoragePath) -> list[str]:
    """Read the checkpoint names in LATEST or BEST; return [] if the file does not exist.

    Raises DataError if the file contains anything else.
    """
    content = pointer.fetch()
    if content is None:
        return []
    names = content[0].decode(errors="replace").split()
    if not names or not all(map(is_checkpoint, names)):
        fix = "write the names of its checkpoints there, one per line and the newest first"
        raise DataError(f"{pointer} is corrupt (it does not list checkpoints)", fix=fix)
    return names


def read_checkpoint(folder: StoragePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the state and the variables of a checkpoint, and verify their sizes and checksums.

    Raises DataError if the checkpoint is missing or corrupt, and Interrupted if the bucket does not respond.
    """
    fix = "give another one, or delete it and start the run again"
    try:
        manifest = parse_json((folder / "manifest.json").read(), require_json_object, folder / "manifest.json", fix)
        contents = {name: (folder / name).read() for name in ("variables.npz", "state.json")}
        actual = {name: {"bytes": len(content), "crc32c": crc32c_hex(content)} for name, content in contents.items()}
        corrupt = [name for name in contents if actual[name] != manifest[name]]
        if not corrupt:
            state = parse_json(contents["state.json"], _parse_state, folder / "state.json", fix)
            return state, unpack(contents["variables.npz"])
    except (DataError, *CONTENT_ERRORS) as error:
        reason = error.problem if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"checkpoint {folder} cannot be read ({reason})", fix=fix) from None
    raise DataError(f"{folder / corrupt[0]} does not match its size or checksum", fix=fix)


def _parse_state(value: Any) -> dict[str, Any]:
    """Validate the state of a checkpoint; raise one of `CONTENT_ERRORS` for anything else."""
    step_is_valid = int(require_json_object(value)["step"]) >= 0
    best_is_valid = value.get("best") is None or "step" in value["best"]
    if not (step_is_valid and best_is_valid):
        raise ValueError("not the state of a run")
    return value


def select_inference_weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the model's variables of a checkpoint, by name. Averages (EMA) replace the variables if there are any."""
    values = {name: value for name, value in variables.items() if not name.startswith("optimizer/")}
    return values | {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}


class CheckpointFolder:
    """The checkpoints of one run in a local folder."""

    def __init__(self, folder: Path, keep: int, log_message: LogMessage) -> None:
        """`keep`: number of newest checkpoints that `save` retains; `log_message`: called for each corrupt one."""
        self.folder, self.keep, self.log_message = folder, keep, log_message

    def path(self, step: int) -> Path:
        """Return the checkpoint folder of a step."""
        name = local_name(step)
        replaced = self.folder / f"{_REPLACED}{name}"
        return replaced if replaced.is_dir() and not (self.folder / name).is_dir() else self.folder / name

    def list_steps(self) -> list[int]:
        """List the steps of the committed checkpoints in ascending order."""
        folders = [p for prefix in (PREFIX, _REPLACED) for p in self.folder.glob(f"{prefix}*") if p.is_dir()]
        names = {p.name.removeprefix(_REPLACED) for p in folders}
        return sorted(parse_step(name) for name in names if is_local_checkpoint(name))

    def save(self, state: dict[str, Any], variables: dict[str, np.ndarray], best_step: int | None) -> Path:
        """Commit a checkpoint, update LATEST and BEST, and delete checkpoints that are no longer needed.

        `best_step` is the step of the best checkpoint so far, None if there is none yet. Raises OSError if the disk is
        full or fails; earlier checkpoints remain intact.
        """
        self._complete_replacement()
        final = self.path(state["step"])
        with temporary_folder(final) as temporary:
            contents = {"variables.npz": pack(variables), "state.json": json.dumps(state).encode()}
            manifest = {name: {"bytes": len(c), "crc32c": crc32c_hex(c)} for name, c in contents.items()}
            for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
                write_atomically(temporary / name, content)
            if final.exists():  # an earlier checkpoint of the same step
                final.rename(self.folder / f"{_REPLACED}{final.name}")
            temporary.rename(final)
        sync(self.folder)
        self._complete_replacement()
        self.write_pointers(state["step"], best_step)
        self._prune()
        return final

    def write_pointers(self, step: int, best_step: int | None) -> None:
        """Write LATEST and, if there is a best checkpoint, BEST.

        A start does so too, because a kill between the commit of a checkpoint and this leaves the pointers behind it.
        """
        write_atomically(self.folder / "LATEST", self.path(step).name + "\n")
        if best_step is not None:
            write_atomically(self.folder / "BEST", self.path(best_step).name + "\n")

    def _complete_replacement(self) -> None:
        """Delete a replaced checkpoint; rename it back if its replacement was not committed."""
        for replaced in list(self.folder.glob(f"{_REPLACED}*")):
            final = self.folder / replaced.name.removeprefix(_REPLACED)
            shutil.rmtree(replaced) if final.exists() else replaced.rename(final)

    def _prune(self) -> None:
        """Delete all checkpoints except the newest `keep` and those to which the states of these refer.

        A state refers to the best checkpoint of its phase, and to the weights with which each earlier phase ended.
        """
        steps = self.list_steps()
        newest = steps[-self.keep :]
        needed = set(newest)
        for step in newest:
            with contextlib.suppress(OSError, *CONTENT_ERRORS):  # a corrupt one is logged when it is read
                state = json.loads((self.path(step) / "state.json").read_bytes())
                needed |= {state["best"]["step"]} if state["best"] else set()
                needed |= {state["carried"]} if state.get("carried") else set()
                needed |= {phase["kept_step"] for phase in state.get("finished", {}).values()}
        for step in set(steps) - needed:
            shutil.rmtree(self.path(step))

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Read the state and variables of a checkpoint. Raises DataError if it is missing or corrupt."""
        return read_checkpoint(storage_path(self.path(step)))

    def read_newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Read the newest intact checkpoint, None if there is none. Log a message for each corrupt one."""
        for step in reversed(self.list_steps()):
            try:
                return self.read(step)
            except DataError as error:
                self.log_message(f"{error.problem}; using the previous one")
        for name in sorted(path.name for path in self.folder.glob(f"{PREFIX}*") if is_checkpoint(path.name)):
            if not is_local_checkpoint(name):  # the folder was copied from a bucket
                self.log_message(
                    f"{self.folder / name} is not read; rename it to {local_name(parse_step(name))} if it should"
                )
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step`, the newest intact one (0: none), as corrupt."""
        if not self.folder.is_dir():
            return
        self._complete_replacement()
        for later in [other for other in self.list_steps() if other > step]:
            renamed = self.folder / f"{_CORRUPT}{self.path(later).name}"
            shutil.rmtree(renamed, ignore_errors=True)
            self.path(later).rename(renamed)
            self.log_message(f"{self.path(later).name} is renamed to {renamed.name}")
