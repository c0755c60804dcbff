"""Checkpoints of a run: written to a temporary folder, committed by one rename, verified when read.

A checkpoint is a folder `step-00000420` with `variables.npz` (the exact values by name), `state.json` and
`manifest.json` (size and CRC32C of both). `LATEST` and `BEST` next to them are pointers: text files with the names of
checkpoints. On disk each names one. In a bucket, where a folder name also has a token (`step-00000420-1a2b3c4d`),
`LATEST` lists all committed checkpoints, newest first.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.arrays import pack, unpack
from trainer.errors import DataError
from trainer.storage.local import sync, write_whole
from trainer.storage.path import StoragePath, storage_path
from trainer.types import LogMessage

PREFIX = "step-"


def crc32c_hex(content: bytes | np.ndarray) -> str:
    """Compute the CRC32C as 8 hex digits."""
    return f"{google_crc32c.value(content):08x}"


def step_of(name: str) -> int:
    """Parse the step from the name of a checkpoint, on disk or in a bucket."""
    return int(name[len(PREFIX) :].partition("-")[0])


def read_pointer(pointer: StoragePath) -> list[str]:
    """Read the names of checkpoints in LATEST or BEST; empty if the file does not exist."""
    content = pointer.fetch()
    return content[0].decode().split() if content else []


def read_checkpoint(folder: StoragePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the state and the variables of a checkpoint, and verify their sizes and checksums.

    Raises DataError if the checkpoint is missing or damaged, and Interrupted if the bucket does not respond.
    """
    fix = "give another one, or delete it and start the run again"
    try:
        manifest = json.loads((folder / "manifest.json").read())
        contents = {name: (folder / name).read() for name in manifest}
        actual = {name: {"bytes": len(content), "crc32c": crc32c_hex(content)} for name, content in contents.items()}
        damaged = [name for name in manifest if actual[name] != manifest[name]]
        if not damaged:
            return json.loads(contents["state.json"]), unpack(contents["variables.npz"])
    except (DataError, ValueError, KeyError) as error:
        raise DataError(f"checkpoint {folder} cannot be read ({error})", fix=fix) from None
    raise DataError(f"{folder / damaged[0]} does not match its size or checksum", fix=fix)


def inference_weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the model's variables of a checkpoint by name, with the averages (EMA) where its run computed them."""
    values = {name: value for name, value in variables.items() if not name.startswith("optimizer/")}
    return values | {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}


class CheckpointFolder:
    """The checkpoints of one run in a local folder."""

    def __init__(self, folder: Path, keep: int, log_message: LogMessage) -> None:
        """`keep`: number of newest checkpoints that `save` retains; `log_message`: called for each damaged one."""
        self.folder, self.keep, self.log_message = folder, keep, log_message

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """List the steps of the committed checkpoints in ascending order."""
        return sorted(step_of(p.name) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir())

    def save(self, state: dict[str, Any], variables: dict[str, np.ndarray], best_step: int | None) -> Path:
        """Commit a checkpoint, update LATEST and BEST, and delete checkpoints that are no longer needed.

        `best_step` is the step of the best checkpoint so far, None if there is none yet. Raises OSError if the disk is
        full or fails; earlier checkpoints are intact.
        """
        final = self.path(state["step"])
        temporary = self.folder / f".writing-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            contents = {"variables.npz": pack(variables), "state.json": json.dumps(state).encode()}
            manifest = {name: {"bytes": len(c), "crc32c": crc32c_hex(c)} for name, c in contents.items()}
            for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
                write_whole(temporary / name, content)
            if final.exists():  # an earlier checkpoint of the same step
                shutil.rmtree(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(self.folder)
        write_whole(self.folder / "LATEST", final.name + "\n")
        if best_step is not None:
            write_whole(self.folder / "BEST", self.path(best_step).name + "\n")
        self._prune()
        return final

    def _prune(self) -> None:
        """Delete all checkpoints except the newest `keep` and those that the state of one of them refers to."""
        steps = self.steps()
        newest = steps[-self.keep :]
        needed = set(newest)
        for step in newest:
            with contextlib.suppress(OSError, ValueError):  # a damaged one is logged when it is read
                state = json.loads((self.path(step) / "state.json").read_text())
                needed |= {state["best"]["step"]} if state["best"] else set()
                needed |= {state["carried"]} if state.get("carried") else set()
        for step in set(steps) - needed:
            shutil.rmtree(self.path(step))

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Read state and variables of the checkpoint of a step. Raises DataError if it is missing or damaged."""
        return read_checkpoint(storage_path(self.path(step)))

    def newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Read the newest intact checkpoint, None if there is none; rename damaged ones and log a message for each."""
        for unfinished in self.folder.glob(".writing-*"):  # left by a killed process
            shutil.rmtree(unfinished)
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except DataError as error:
                damaged = self.folder / f"damaged-{self.path(step).name}"
                shutil.rmtree(damaged, ignore_errors=True)
                self.path(step).rename(damaged)
                self.log_message(f"{error.problem}; renamed to {damaged.name}, using the previous one")
        return None
