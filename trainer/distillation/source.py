"""Files of the teacher that `distillation.teacher` names, local or in a bucket."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import schema as config
from trainer.errors import ConfigError, DataError
from trainer.exporting.model_card import label_lines
from trainer.runs.checkpoints import crc32c_hex, inference_weights, read_checkpoint, read_pointer
from trainer.storage.path import StoragePath, storage_path

KEY = "distillation.teacher"
SAVED_MODEL, CHECKPOINT = "SavedModel", "checkpoint"
ROWS = 32  # images per replica and call, whatever the batch size, so that workers and batch size change no bit
_GRAPH, _LABELS = "saved_model.pb", "assets/labels.txt"


@dataclass(frozen=True)
class TeacherFiles:
    """Files and classes of a teacher."""

    address: str  # as configured
    kind: str  # SavedModel | checkpoint
    home: StoragePath
    classes: tuple[str, ...]
    fingerprint: str  # of its weights
    files: dict[str, int]  # name below `home` -> bytes
    model: config.Model | None = None  # of a checkpoint: the model to build

    @property
    def summary(self) -> str:
        """One line for the log."""
        what = f"{self.model.backbone}, checkpoint {self.home.name}" if self.model else "a SavedModel"
        return f"{self.address} ({what}, {len(self.classes)} classes, {sum(self.files.values()) / 1e6:,.1f} MB)"

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values for the other workers."""
        values = {key: getattr(self, key) for key in ("kind", "classes", "fingerprint", "summary")}
        return values | {"model": self.model.model_dump(mode="json") if self.model else None}


def find_teacher(address: str) -> TeacherFiles:
    """Find the checkpoint that a run exported, by its output_dir, or a SavedModel; of weights it reads only checksums.

    Raises:
        DataError: the address is neither, or its files are damaged.
        ConfigError: the run's config.yaml is of another version.
    """
    home = storage_path(address)
    if (home / _GRAPH).exists():
        return _saved_model(address, home)
    if (home / "config.yaml").exists():
        return _checkpoint(address, home)
    problem = f"is neither the output_dir of a run (no config.yaml) nor the folder of a SavedModel (no {_GRAPH})"
    raise DataError(problem, key=KEY, value=address, fix="give the output_dir of a run, or its export/saved_model/1")


def _saved_model(address: str, home: StoragePath) -> TeacherFiles:
    if not (home / _LABELS).exists():
        problem = f"is a SavedModel without {_LABELS}, so not an export of kubetune"
        raise DataError(problem, key=KEY, value=address, fix="give export/saved_model/1 of a run")
    entries = {str(e.path).removeprefix(f"{home}/"): e for e in home.list()}
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        known = f"{entry.crc32c:08x}" if entry.crc32c is not None else crc32c_hex(entry.path.read())
        digest.update(f"{name} {entry.size} {known}\n".encode())
    classes = tuple((home / _LABELS).read_text().splitlines())
    sizes = {name: entry.size for name, entry in entries.items()}
    return TeacherFiles(address, SAVED_MODEL, home, classes, digest.hexdigest()[:16], sizes)


def _checkpoint(address: str, home: StoragePath) -> TeacherFiles:
    try:
        settings = config.load_resolved(config.read_config((home / "config.yaml").read_text()))
    except ConfigError as error:
        problem = f"its config.yaml cannot be used: {error}"
        raise ConfigError(problem, key=KEY, value=address, fix="give a run of this version, or its export") from None
    names = read_pointer(home / "checkpoints" / ("BEST" if settings.training.keep == "best" else "LATEST"))
    if not names:
        raise DataError("the run has no checkpoint yet", key=KEY, value=address, fix="wait until the run has finished")
    folder = home / "checkpoints" / names[0]
    try:
        manifest = json.loads((folder / "manifest.json").read())["variables.npz"]
        classes = tuple(json.loads((home / "run.json").read())["classes"])
    except (ValueError, KeyError):
        fix = "restore the files, or give another teacher"
        raise DataError(f"{folder} or run.json is damaged", key=KEY, value=address, fix=fix) from None
    identity = json.dumps([manifest, settings.model.model_dump()], sort_keys=True)
    fingerprint, sizes = hashlib.sha256(identity.encode()).hexdigest()[:16], {"variables.npz": int(manifest["bytes"])}
    return TeacherFiles(address, CHECKPOINT, folder, classes, fingerprint, sizes, settings.model)


def check_classes(address: str, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    """Raise a DataError unless the teacher's classes are those of the data, in the same order."""
    required = tuple(label_lines(required).splitlines())  # as in labels.txt
    known = tuple(label_lines(known).splitlines())
    if known == required:
        return
    differences = {"only the teacher has": _missing(known, required), "only the data has": _missing(required, known)}
    how = " and ".join(f"{whose} {names}" for whose, names in differences.items() if names)
    how = how or f"they are in another order ({', '.join(known[:5])}; {', '.join(required[:5])})"
    problem = f"has {len(known)} classes and the data has {len(required)}: {how}"
    raise DataError(problem, key=KEY, value=address, fix="give a teacher that was trained on these classes")


def check_same(run: str, before: str | None, now: str) -> None:
    """Raise a DataError if the run at this address began with a teacher of another fingerprint."""
    if before not in (None, now):
        problem = f"{run} began with another teacher (fingerprint {before}, now {now})"
        raise DataError(problem, key=KEY, fix="give the one that it began with, or another output_dir")


def _missing(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    rest = [name for name in names if name not in others]
    return ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")


def read_teacher(teacher: TeacherFiles) -> dict[str, np.ndarray]:
    """Read the variables of a checkpoint by name, averaged if its run had EMA on, or the files of a SavedModel by name.

    Files are uint8 [bytes].

    Raises:
        DataError: something is missing or does not match its size or checksum.
    """
    if teacher.kind == SAVED_MODEL:
        return {name: np.frombuffer((teacher.home / name).read(), np.uint8) for name in teacher.files}
    try:
        return inference_weights(read_checkpoint(teacher.home)[1])
    except DataError as error:
        fix = error.fix or "restore the files, or give another teacher"
        raise DataError(error.problem, key=KEY, value=teacher.address, fix=fix) from None


def write_saved_model(files: dict[str, np.ndarray], folder: Path) -> None:
    """Write the files of a SavedModel, as returned by `read_teacher`, to a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.tobytes())
