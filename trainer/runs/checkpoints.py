"""Checkpoints of a run: written to a temporary folder, committed by one rename, verified when read.

A checkpoint is a folder `step-00000420` with `variables.npz` (the exact values by name), `state.json` and
`manifest.json` (size and CRC32C of both). `LATEST` and `BEST` name one each.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from trainer.arrays import pack, unpack
from trainer.errors import DataError
from trainer.storage.local import sync, write_whole
from trainer.storage.path import StoragePath, storage_path

PREFIX = "step-"


def checksum(content: bytes | np.ndarray) -> str:
    """CRC32C as 8 hex digits."""
    return f"{google_crc32c.value(content):08x}"


def step_of(name: str) -> int:
    """Parse the step from the name of a checkpoint, `step-00000420`, or in a bucket `step-00000420-1a2b3c4d`."""
    return int(name[len(PREFIX) :].partition("-")[0])


def names_in(pointer: StoragePath) -> list[str]:
    """The names of checkpoints in a pointer such as LATEST; empty if it does not exist."""
    content = pointer.fetch()
    return content[0].decode().split() if content else []


def read_checkpoint(folder: StoragePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """State and variables of the checkpoint in a folder.

    Raises:
        DataError: it is missing or damaged.
        Interrupted: the bucket does not respond.
    """
    fix = "give another one, or delete it and start the run again"
    try:
        manifest = json.loads((folder / "manifest.json").read())
        contents = {name: (folder / name).read() for name in manifest}
        damaged = [name for name, content in contents.items() if checksum(content) != manifest[name]["crc32c"]]
        if not damaged:
            return json.loads(contents["state.json"]), unpack(contents["variables.npz"])
    except (DataError, ValueError, KeyError) as error:
        raise DataError(f"checkpoint {folder} cannot be read ({error})", fix=fix) from None
    raise DataError(f"{folder / damaged[0]} does not match its checksum", fix=fix)


def weights_of(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's values among the variables of a checkpoint, averaged if its run used EMA."""
    values = {name: value for name, value in variables.items() if not name.startswith("optimizer/")}
    return values | {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int, note: Callable[[str], None]) -> None:
        self.folder, self.keep, self.note = folder, keep, note

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(step_of(p.name) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir())

    def save(self, state: dict[str, Any], variables: dict[str, np.ndarray], best_step: int | None) -> Path:
        """Commit a checkpoint and delete those without a reference.

        Raises:
            OSError: the disk is full or lost; earlier checkpoints are intact.
        """
        final = self.path(state["step"])
        temporary = self.folder / f".writing-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            contents = {"variables.npz": pack(variables), "state.json": json.dumps(state).encode()}
            manifest = {n: {"bytes": len(c), "crc32c": checksum(c)} for n, c in contents.items()}
            for name, content in {**contents, "manifest.json": json.dumps(manifest).encode()}.items():
                write_whole(temporary / name, content)
            if final.exists():  # of a process that was killed before it wrote LATEST
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
        """Delete all but the newest `keep` and the checkpoints that one of them refers to."""
        steps = self.steps()
        newest = steps[-self.keep :]
        needed = set(newest)
        for step in newest:
            with contextlib.suppress(OSError, ValueError):  # a damaged one has no references; `newest` logs it
                state = json.loads((self.path(step) / "state.json").read_text())
                needed |= {state["best"]["step"]} if state["best"] else set()
                needed |= {state["carried"]} if state.get("carried") else set()
        for step in set(steps) - needed:
            shutil.rmtree(self.path(step))

    def read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return read_checkpoint(storage_path(self.path(step)))

    def newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The newest checkpoint that can be read; damaged ones are renamed, with a message."""
        for unfinished in self.folder.glob(".writing-*"):  # of a killed process
            shutil.rmtree(unfinished)
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except DataError as error:
                damaged = self.folder / f"damaged-{self.path(step).name}"
                shutil.rmtree(damaged, ignore_errors=True)
                self.path(step).rename(damaged)
                self.note(f"{error.problem}; renamed to {damaged.name}, using the one before")
        return None
