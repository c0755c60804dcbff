"""The files of a teacher in the folder that `distillation.teacher` names, here or in a bucket."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import schema as config
from trainer.errors import ConfigError, DataError
from trainer.exporting.model_card import label_lines
from trainer.runs.checkpoints import checksum, names_in, read_checkpoint, weights_of
from trainer.storage.path import StoragePath, storage_path

SAVED_MODEL, CHECKPOINT = "SavedModel", "checkpoint"
ROWS = 32  # a replica answers this many at once, whatever the batch: so workers and batch size change no bit
_GRAPH, _LABELS = "saved_model.pb", "assets/labels.txt"


@dataclass(frozen=True)
class TeacherFiles:
    """The files of a teacher, and its classes."""

    address: str  # as the user gave it
    kind: str  # SavedModel | checkpoint
    home: StoragePath
    classes: tuple[str, ...]
    fingerprint: str  # of its weights
    files: dict[str, int]  # name below `home` -> bytes
    model: config.Model | None = None  # of a checkpoint: the model to build

    @property
    def words(self) -> str:
        """One line for the log."""
        what = f"{self.model.backbone}, checkpoint {self.home.name}" if self.model else "a SavedModel"
        return f"{self.address} ({what}, {len(self.classes)} classes, {sum(self.files.values()) / 1e6:,.1f} MB)"

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values for the other workers."""
        values = {key: getattr(self, key) for key in ("kind", "classes", "fingerprint", "words")}
        return values | {"model": self.model.model_dump(mode="json") if self.model else None}


def find_teacher(address: str) -> TeacherFiles:
    """Find a teacher; of its weights only sizes and checksums are read.

    Args:
        address: output_dir of an earlier run (the checkpoint whose weights it exported), or of a SavedModel that
            kubetune exported.

    Raises:
        DataError: there is neither.
        ConfigError: the run's config.yaml is of another version.
    """
    home = storage_path(address)
    if (home / _GRAPH).exists():
        return _saved_model(address, home)
    if (home / "config.yaml").exists():
        return _checkpoint(address, home)
    raise DataError(
        f"distillation.teacher={address} is neither the output_dir of a run (no config.yaml in it) nor the folder of a "
        f"SavedModel (no {_GRAPH} in it)"
    )


def _saved_model(address: str, home: StoragePath) -> TeacherFiles:
    if not (home / _LABELS).exists():
        raise DataError(f"distillation.teacher={address} is a SavedModel without {_LABELS}: kubetune did not export it")
    entries = {str(e.path).removeprefix(f"{home}/"): e for e in home.list()}
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        known = f"{entry.crc32c:08x}" if entry.crc32c is not None else checksum(entry.path.read())
        digest.update(f"{name} {entry.size} {known}\n".encode())
    classes = tuple((home / _LABELS).read_text().splitlines())
    sizes = {name: entry.size for name, entry in entries.items()}
    return TeacherFiles(address, SAVED_MODEL, home, classes, digest.hexdigest()[:16], sizes)


def _checkpoint(address: str, home: StoragePath) -> TeacherFiles:
    try:
        settings = config.load_resolved(config.read_config((home / "config.yaml").read_text()))
    except ConfigError as error:
        raise ConfigError(f"distillation.teacher={address}: its config.yaml cannot be used; {error}") from None
    names = names_in(home / "checkpoints" / ("BEST" if settings.training.keep == "best" else "LATEST"))
    if not names:
        raise DataError(f"distillation.teacher={address}: that run has no checkpoint yet; let it end first")
    folder = home / "checkpoints" / names[0]
    try:
        manifest = json.loads((folder / "manifest.json").read())["variables.npz"]
        classes = tuple(json.loads((home / "run.json").read())["classes"])
    except (ValueError, KeyError):
        raise DataError(f"distillation.teacher={address}: {folder} or run.json is damaged") from None
    identity = json.dumps([manifest, settings.model.model_dump()], sort_keys=True)
    fingerprint, sizes = hashlib.sha256(identity.encode()).hexdigest()[:16], {"variables.npz": int(manifest["bytes"])}
    return TeacherFiles(address, CHECKPOINT, folder, classes, fingerprint, sizes, settings.model)


def check_classes(address: str, known: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Raise a DataError unless a teacher knows the classes of the data, in the same order."""
    wanted = tuple(label_lines(wanted).splitlines())  # as labels.txt has them
    known = tuple(label_lines(known).splitlines())
    if known == wanted:
        return
    only = [(f"it alone has {_listed(known, wanted)}", set(known) - set(wanted)),
            (f"the data alone has {_listed(wanted, known)}", set(wanted) - set(known))]  # fmt: skip
    how = " and ".join(words for words, names in only if names)
    how = how or f"they are the same in another order ({', '.join(known[:5])}; {', '.join(wanted[:5])})"
    raise DataError(
        f"distillation.teacher={address} knows {len(known)} classes, the data has {len(wanted)}: {how}; give a teacher "
        "that was trained on these classes"
    )


def check_same(run: str, before: str | None, now: str) -> None:
    """Raise a DataError where the run of this address began with a teacher of another fingerprint."""
    if before not in (None, now):
        raise DataError(
            f"{run} learned from another teacher (fingerprint {before}, now {now}); give the one it began with, or "
            "another output_dir"
        )


def _listed(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    rest = [name for name in names if name not in others]
    return ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")


def read_teacher(teacher: TeacherFiles) -> dict[str, np.ndarray]:
    """The variables of a checkpoint by name, averaged where that run had EMA on; or the files of a SavedModel by name,
    uint8 [bytes].

    Raises:
        DataError: something is missing or does not match its checksum.
    """
    if teacher.kind == SAVED_MODEL:
        return {name: np.frombuffer((teacher.home / name).read(), np.uint8) for name in teacher.files}
    try:
        return weights_of(read_checkpoint(teacher.home)[1])
    except DataError as error:
        raise DataError(f"distillation.teacher={teacher.address}: {error}") from None


def write_saved_model(files: dict[str, np.ndarray], folder: Path) -> None:
    """Write the files of a SavedModel, as `read_teacher` has them, below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.tobytes())
