"""A run's checkpoints: written to a temporary folder, committed by one rename, verified when read.

A checkpoint is a folder `step-00000420` with `variables.npz` (all variables by name, in their dtypes), `state.json`
(the run state) and `manifest.json` (size and CRC32C of the other two files). Next to the checkpoints, the text files
`LATEST` and `BEST` contain the names of the newest and the best checkpoint. In a bucket, the name of a checkpoint ends
with a random token (`step-00000420-1a2b3c4d`), and `LATEST` lists all committed checkpoints, newest first.
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

PREFIX = "step-"  # prefix of every checkpoint's name
_CHECKPOINT_NAME = re.compile(r"step-\d{8,}(-[0-9a-f]+)?", re.ASCII)
# Prefix of an old checkpoint while a new one of the same step replaces it. A killed process can leave one behind.
_REPLACED_PREFIX = ".replaced-"
_CORRUPT_PREFIX = "damaged-"  # prefix of a checkpoint that could not be read; it is never read again, but not deleted


def crc32c_hex(content: bytes | np.ndarray) -> str:
    """Return the CRC32C checksum of bytes, or of a C-contiguous array, as 8 hex digits."""
    return f"{google_crc32c.value(content):08x}"


def is_checkpoint(name: str) -> bool:
    """Return whether `name` has the form of a checkpoint's name, on disk or in a bucket."""
    return bool(_CHECKPOINT_NAME.fullmatch(name))


def is_local_checkpoint(name: str) -> bool:
    """Return whether `name` is a checkpoint's name on disk, such as `step-00000420`, without the token of a bucket."""
    return is_checkpoint(name) and name == format_local_name(parse_step(name))


def format_local_name(step: int) -> str:
    """Return the name on disk of a step's checkpoint: `step-00000420` for step 420."""
    return f"{PREFIX}{step:08d}"


def parse_step(name: str) -> int:
    """Parse the step from a checkpoint's name, on disk or in a bucket."""
    return int(name[len(PREFIX) :].partition("-")[0])


def has_checkpoints(names: Iterable[str]) -> bool:
    """Return whether any of these file names belongs to a checkpoint, which can be replaced or corrupt."""
    return any(name.startswith((PREFIX, _REPLACED_PREFIX, f"{_CORRUPT_PREFIX}{PREFIX}")) for name in names)


def read_pointer(pointer: StoragePath) -> list[str]:
    """Read the checkpoint names in `LATEST` or `BEST`; return [] if the file does not exist.

    Raises:
        DataError: the file cannot be read, is empty, or contains anything but checkpoint names.
        Interrupted: the bucket does not respond.
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
    """Read a checkpoint, and verify its files' sizes and checksums.

    Returns:
        The run state (the decoded `state.json`), and the variables by name, with their shapes and dtypes in the run.

    Raises:
        DataError: a file of the checkpoint is missing or corrupt.
        Interrupted: the bucket does not respond.
    """
    fix = "give another one, or delete it and start the run again"
    try:
        manifest = parse_json((folder / "manifest.json").read(), require_json_object, folder / "manifest.json", fix)
        contents = {name: (folder / name).read() for name in ("variables.npz", "state.json")}
        actual = {name: {"bytes": len(content), "crc32c": crc32c_hex(content)} for name, content in contents.items()}
        corrupt_names = [name for name in contents if actual[name] != manifest[name]]
        if not corrupt_names:
            state = parse_json(contents["state.json"], _parse_state, folder / "state.json", fix)
            return state, unpack(contents["variables.npz"])
    except (DataError, *CONTENT_ERRORS) as error:
        reason = error.problem if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"checkpoint {folder} cannot be read ({reason})", fix=fix) from None
    raise DataError(f"{folder / corrupt_names[0]} does not match its size or checksum", fix=fix)


def _parse_state(value: Any) -> dict[str, Any]:
    """Return a checkpoint's decoded state if it is valid; raise one of `CONTENT_ERRORS` if it is not."""
    is_step_valid = int(require_json_object(value)["step"]) >= 0
    is_best_valid = value.get("best") is None or "step" in value["best"]
    if not (is_step_valid and is_best_valid):
        raise ValueError("not the state of a run")
    return value


def select_inference_weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a checkpoint's variables except the optimizer's. Averages (EMA) replace the trained weights.

    The result also contains `ema/...` and `loss_scale/...`; callers select the model's variables by name.
    """
    values = {name: value for name, value in variables.items() if not name.startswith("optimizer/")}
    return values | {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}


class CheckpointFolder:
    """One run's checkpoints in a local folder."""

    def __init__(self, folder: Path, keep: int, log_message: LogMessage) -> None:
        """Manage the checkpoints in `folder`, which need not exist yet.

        Args:
            folder: the folder `checkpoints` in the run's local folder.
            keep: number of newest checkpoints that `save` retains, at least 1.
            log_message: called with a message for each checkpoint that is skipped or renamed.
        """
        self.folder, self.keep, self.log_message = folder, keep, log_message

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, or of the replaced checkpoint if a kill interrupted `save`."""
        name = format_local_name(step)
        replaced = self.folder / f"{_REPLACED_PREFIX}{name}"
        return replaced if replaced.is_dir() and not (self.folder / name).is_dir() else self.folder / name

    def list_steps(self) -> list[int]:
        """List the committed checkpoints' steps in ascending order. Names with a bucket's token are ignored."""
        folders = [p for prefix in (PREFIX, _REPLACED_PREFIX) for p in self.folder.glob(f"{prefix}*") if p.is_dir()]
        names = {path.name.removeprefix(_REPLACED_PREFIX) for path in folders}
        return sorted(parse_step(name) for name in names if is_local_checkpoint(name))

    def save(self, state: dict[str, Any], variables: dict[str, np.ndarray], best_step: int | None) -> Path:
        """Commit a checkpoint, update `LATEST` and `BEST`, and delete checkpoints that are no longer needed.

        Args:
            state: the run state, JSON-serializable, with at least `step` and `best`.
            variables: the arrays to store, by name.
            best_step: step of the best checkpoint so far; None if there is none yet, in which case `BEST` is unchanged.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: the disk is full or fails. Earlier checkpoints remain intact.
        """
        self._complete_replacement()
        target = self.path(state["step"])
        with temporary_folder(target) as new_folder:
            contents = {"variables.npz": pack(variables), "state.json": json.dumps(state).encode()}
            manifest = {name: {"bytes": len(c), "crc32c": crc32c_hex(c)} for name, c in contents.items()}
            for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
                write_atomically(new_folder / name, content)
            if target.exists():  # a folder cannot be renamed onto another one that is not empty
                target.rename(self.folder / f"{_REPLACED_PREFIX}{target.name}")
            new_folder.rename(target)
        sync(self.folder)
        self._complete_replacement()
        self.write_pointers(state["step"], best_step)
        self._prune()
        return target

    def write_pointers(self, step: int, best_step: int | None) -> None:
        """Write `LATEST` and, if there is a best checkpoint, `BEST`.

        Each start also calls this, because the files still name an older checkpoint if the previous process was killed
        right after it had committed one.
        """
        write_atomically(self.folder / "LATEST", self.path(step).name + "\n")
        if best_step is not None:
            write_atomically(self.folder / "BEST", self.path(best_step).name + "\n")

    def _complete_replacement(self) -> None:
        """Delete each replaced checkpoint, or rename it back if its replacement was not committed."""
        for replaced in list(self.folder.glob(f"{_REPLACED_PREFIX}*")):
            target = self.folder / replaced.name.removeprefix(_REPLACED_PREFIX)
            shutil.rmtree(replaced) if target.exists() else replaced.rename(target)

    def _prune(self) -> None:
        """Retain the newest `keep` checkpoints and those that their states refer to; delete all others.

        A state refers to its phase's best checkpoint (`best`), to the best one of the earlier phases (`carried`), and
        to each finished phase's checkpoint with the phase weights (`kept_step`).
        """
        steps = self.list_steps()
        newest = steps[-self.keep :]
        steps_to_keep = set(newest)
        for step in newest:
            with contextlib.suppress(OSError, *CONTENT_ERRORS):  # a corrupt state is logged when it is read
                state = json.loads((self.path(step) / "state.json").read_bytes())
                steps_to_keep |= {state["best"]["step"]} if state["best"] else set()
                steps_to_keep |= {state["carried"]} if state.get("carried") else set()
                steps_to_keep |= {phase["kept_step"] for phase in state.get("finished", {}).values()}
        for step in set(steps) - steps_to_keep:
            shutil.rmtree(self.path(step))

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Read the state and the variables of a step's checkpoint. Raises DataError if it is missing or corrupt."""
        return read_checkpoint(storage_path(self.path(step)))

    def read_newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Read the newest intact checkpoint; return None if there is none.

        Corrupt checkpoints are logged and skipped. If none is intact, folders with names from a bucket are logged.
        """
        for step in reversed(self.list_steps()):
            try:
                return self.read(step)
            except DataError as error:
                self.log_message(f"{error.problem}; using the previous one")
        for name in sorted(path.name for path in self.folder.glob(f"{PREFIX}*") if is_checkpoint(path.name)):
            if not is_local_checkpoint(name):  # the folder was copied from a bucket, so its name has a token
                self.log_message(
                    f"{self.folder / name} is not read; rename it to {format_local_name(parse_step(name))} if it should"
                )
        return None

    def mark_corrupt_after(self, step: int) -> None:
        """Rename all checkpoints newer than `step` to `damaged-...`, so that they are not read again.

        `step` is the step of the newest intact checkpoint, from which this start resumes; 0 if there is none.
        """
        if not self.folder.is_dir():
            return
        self._complete_replacement()
        for corrupt_step in [s for s in self.list_steps() if s > step]:
            renamed = self.folder / f"{_CORRUPT_PREFIX}{self.path(corrupt_step).name}"
            shutil.rmtree(renamed, ignore_errors=True)
            self.path(corrupt_step).rename(renamed)
            self.log_message(f"{self.path(corrupt_step).name} is renamed to {renamed.name}")
