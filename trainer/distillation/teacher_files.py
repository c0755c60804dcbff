"""Read and check a teacher's files. A teacher is the output_dir of a run or a SavedModel, local or in a bucket."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import schema as config
from trainer.errors import ConfigError, DataError
from trainer.names import normalize_class_name
from trainer.runs.checkpoints import crc32c_hex, read_checkpoint, read_pointer, select_inference_weights
from trainer.storage.local import safe_join
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import CONTENT_ERRORS, read_json
from trainer.storage.staging import separate_invalid_objects

KEY = "distillation.teacher"  # the configuration key in error messages
ROWS_PER_CALL = 32  # images per replica and predict call; constant, so that soft labels are the same for any batch size
_GRAPH, _LABELS = "saved_model.pb", "assets/labels.txt"  # files in the folder of an exported SavedModel


@dataclass(frozen=True)
class TeacherFiles:
    """A teacher's address, files and class names, without its weights."""

    address: str  # as configured
    home: StoragePath  # folder of the SavedModel or of the checkpoint
    classes: tuple[str, ...]  # class names in the order of the logits
    fingerprint: str  # 16 hex digits of SHA-256: of all files of a SavedModel; of a checkpoint's weights and `model`
    bytes_by_file: dict[str, int]  # path relative to `home` -> size; for a checkpoint, only variables.npz
    model: config.Model | None = None  # configuration of a checkpoint's network; None for a SavedModel

    @property
    def summary(self) -> str:
        """A one-line description: address, backbone and checkpoint (or "a SavedModel"), number of classes, size."""
        kind = f"{self.model.backbone}, checkpoint {self.home.name}" if self.model else "a SavedModel"
        return f"{self.address} ({kind}, {len(self.classes)} classes, {sum(self.bytes_by_file.values()) / 1e6:,.1f} MB)"

    @property
    def properties(self) -> dict[str, Any]:
        """`classes`, `fingerprint`, `summary` and `model` as JSON values. The chief broadcasts them to all workers."""
        values = {key: getattr(self, key) for key in ("classes", "fingerprint", "summary")}
        return values | {"model": self.model.model_dump(mode="json") if self.model else None}


def describe_teacher(address: str) -> TeacherFiles:
    """Describe the teacher at an address, which is the folder of a SavedModel or the output_dir of a run.

    In an output_dir, the teacher is the best checkpoint if the run has `training.keep=best`, otherwise the newest one.
    Weights are not read, except to hash the files of a SavedModel whose storage has no checksums, such as a local disk.

    Raises:
        DataError: the address is neither of them, the SavedModel is not an export of kubetune, the run has no
            checkpoint yet, or files are corrupt.
        ConfigError: the run's config.yaml is not valid in this version.
    """
    home = storage_path(address)
    if (home / _GRAPH).exists():
        return _describe_saved_model(address, home)
    if (home / "config.yaml").exists():
        return _describe_checkpoint(address, home)
    problem = f"is neither the output_dir of a run (no config.yaml) nor the folder of a SavedModel (no {_GRAPH})"
    raise DataError(problem, key=KEY, value=address, fix="give the output_dir of a run, or its export/saved_model/1")


def _describe_saved_model(address: str, home: StoragePath) -> TeacherFiles:
    """Describe the exported SavedModel in the folder `home`. Raise a DataError if it is not an export of kubetune."""
    if not (home / _LABELS).exists():
        problem = f"is a SavedModel without {_LABELS}, so it is not an export of kubetune"
        raise DataError(problem, key=KEY, value=address, fix="give export/saved_model/1 of a run")
    infos, _ = separate_invalid_objects(home, home.list())
    digest = hashlib.sha256()
    for name, info in sorted(infos.items()):
        crc32c = f"{info.crc32c:08x}" if info.crc32c is not None else crc32c_hex(info.path.read())
        digest.update(f"{name} {info.size} {crc32c}\n".encode())
    try:
        classes = tuple((home / _LABELS).read_text().splitlines())
    except UnicodeDecodeError:
        fix = "export the run again, or give another teacher"
        raise DataError(f"its {_LABELS} is not UTF-8", key=KEY, value=address, fix=fix) from None
    sizes = {name: info.size for name, info in infos.items()}
    return TeacherFiles(address, home, classes, digest.hexdigest()[:16], sizes)


def _describe_checkpoint(address: str, home: StoragePath) -> TeacherFiles:
    """Describe the best or newest checkpoint of the run in `home`. Raise a DataError if it has none or is corrupt."""
    try:
        settings = config.validate_resolved_config(config.parse_config((home / "config.yaml").read()))
    except ConfigError as error:
        problem = f"its config.yaml cannot be used: {error}"
        raise ConfigError(problem, key=KEY, value=address, fix="give a run of this version, or its export") from None
    fix = "restore the files, or give another teacher"
    try:
        names = read_pointer(home / "checkpoints" / ("BEST" if settings.training.keep == "best" else "LATEST"))
    except DataError as error:
        raise DataError(error.problem, key=KEY, value=address, fix=fix) from None
    if not names:
        raise DataError("the run has no checkpoint yet", key=KEY, value=address, fix="wait until the run has finished")
    folder = home / "checkpoints" / names[0]
    try:
        manifest = json.loads((folder / "manifest.json").read())["variables.npz"]
        size = int(manifest["bytes"])
        classes = tuple(json.loads((home / "run.json").read())["classes"])
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class name is no text")
    except CONTENT_ERRORS:
        raise DataError(f"{folder} or run.json is corrupt", key=KEY, value=address, fix=fix) from None
    identity = json.dumps([manifest, settings.model.model_dump()], sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    sizes = {"variables.npz": size}
    return TeacherFiles(address, folder, classes, fingerprint, sizes, settings.model)


def read_scores(address: str, fingerprint: str) -> dict[str, Any] | None:
    """Read the teacher's scores from its report.json, for the key `teacher` in the student's report.json.

    Args:
        address: output_dir of the teacher's run, or folder of a SavedModel.
        fingerprint: fingerprint of the student's dataset.

    Returns:
        `split` (the scored split), `n` (number of examples), `accuracy`, `interval` (its 95 % interval, [low, high])
        and `same_data` (whether the fingerprint of the teacher's dataset is equal). None if report.json is corrupt or
        missing; a SavedModel has none.
    """
    with suppress(DataError):
        return read_json(storage_path(address) / "report" / "report.json", partial(_parse_scores, fingerprint), fix="")
    return None


def _parse_scores(fingerprint: str, report: Any) -> dict[str, Any]:
    """Parse the scores in a report.json; raise one of `CONTENT_ERRORS` if they are missing or invalid."""
    test, (low, high) = report["test"], report["test"]["interval"]
    scores = {"accuracy": float(test["accuracy"]), "interval": [float(low), float(high)]}
    return {
        "split": str(test["split"]),
        "n": int(test["n"]),
        **scores,
        "same_data": report["data"]["fingerprint"] == fingerprint,
    }


def check_classes(address: str, teacher_names: tuple[str, ...], data_names: tuple[str, ...]) -> None:
    """Raise a DataError unless `teacher_names` and `data_names` are the same class names in the same order.

    Args:
        address: address of the teacher, for the message.
        teacher_names: class names of the teacher, in the order of its logits.
        data_names: class names of the dataset, in the order of its labels.
    """
    teacher_names, data_names = (tuple(map(normalize_class_name, names)) for names in (teacher_names, data_names))
    if teacher_names == data_names:
        return
    differences = {
        "only the teacher has": _list_extra(teacher_names, data_names),
        "only the data has": _list_extra(data_names, teacher_names),
    }
    detail = " and ".join(f"{prefix} {names}" for prefix, names in differences.items() if names)
    detail = detail or f"they are in a different order ({', '.join(teacher_names[:5])}; {', '.join(data_names[:5])})"
    problem = f"has {len(teacher_names)} classes and the data has {len(data_names)}: {detail}"
    raise DataError(problem, key=KEY, value=address, fix="give a teacher that was trained on these classes")


def check_same_teacher(output_dir: str, recorded: str | None, current: str) -> None:
    """Raise a DataError if a run was started with another teacher.

    Args:
        output_dir: output_dir of the run, for the message.
        recorded: teacher fingerprint in the run's checkpoint; None for a new run.
        current: fingerprint of the configured teacher.
    """
    if recorded not in (None, current):
        problem = f"{output_dir} began with another teacher (fingerprint {recorded}, now {current})"
        raise DataError(problem, key=KEY, fix="give the teacher that it began with, or another output_dir")


def _list_extra(names: tuple[str, ...], others: tuple[str, ...]) -> str:
    """Format the names that are not in `others`: the first five, and the number of the remaining ones."""
    extra = [name for name in names if name not in others]
    return ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")


def read_weights(teacher: TeacherFiles) -> dict[str, np.ndarray]:
    """Read a teacher's weights.

    Returns:
        For a checkpoint, the variables by name, or their moving averages (EMA) if the run computed them. For a
        SavedModel, the content of each file, uint8 [size], by path relative to `TeacherFiles.home`.

    Raises:
        DataError: a file is missing, or a file of a checkpoint does not match its size or checksum.
    """
    if teacher.model is None:
        return {name: np.frombuffer((teacher.home / name).read(), np.uint8) for name in teacher.bytes_by_file}
    try:
        return select_inference_weights(read_checkpoint(teacher.home)[1])
    except DataError as error:
        fix = error.fix or "restore the files, or give another teacher"
        raise DataError(error.problem, key=KEY, value=teacher.address, fix=fix) from None


def write_saved_model(files: dict[str, np.ndarray], folder: Path) -> None:
    """Write a SavedModel's files to a folder. `files` has their content by relative path, uint8 [size]."""
    for name, content in files.items():
        file = safe_join(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.tobytes())
