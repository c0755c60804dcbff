"""Read a run from its output_dir, local or in a bucket, for commands that use one of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import Model, RunConfig, parse_config, validate_resolved_config
from trainer.data.records import join_first
from trainer.errors import ConfigError, DataError
from trainer.monitoring.log import log
from trainer.names import normalize_class_name
from trainer.runs.checkpoints import is_checkpoint, parse_step, read_checkpoint, read_pointer, select_inference_weights
from trainer.storage.path import StoragePath, storage_path
from trainer.storage.small_files import read_json, require_json_object
from trainer.types import Dataset, require_fingerprint

if TYPE_CHECKING:
    from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class StoredRun:
    """The configuration and the classes of a run, which need not be finished."""

    address: str  # output_dir as the user wrote it, for messages
    folder: StoragePath  # output_dir as a storage path
    config: RunConfig
    class_names: tuple[str, ...]
    fingerprint: str | dict[str, str]  # of the training dataset; `trainer.types.has_fingerprints` compares it


def read_run(address: str) -> tuple[StoragePath, dict[str, Any], dict[str, Any]]:
    """Read the two files that describe the run in an output_dir.

    Returns:
        output_dir as a storage path; the content of config.yaml, which is not validated; and the content of run.json,
        which has at least `classes` and `data_fingerprint`.

    Raises:
        DataError: config.yaml does not exist, or run.json does not exist or is corrupt.
        ConfigError: config.yaml is corrupt.
    """
    folder = storage_path(address)
    config = (folder / "config.yaml").fetch()
    if config is None:
        raise DataError("has no config.yaml", key="run", value=address, fix="give the output_dir of a run")
    try:
        config_tree = parse_config(config[0])
    except ConfigError as error:
        fix = "restore the file, or give another run"
        raise ConfigError(f"its config.yaml {error.problem}", key="run", value=address, fix=fix) from None
    try:
        run_json = read_json(folder / "run.json", _parse_run_json, fix="")
    except DataError:
        run_json = None
    if run_json is None:
        raise DataError("has no run.json, or a corrupt one", key="run", value=address, fix="give another run")
    return folder, config_tree, run_json


def _parse_run_json(value: Any) -> dict[str, Any]:
    """Normalize the class names in run.json; raise `trainer.storage.small_files.CONTENT_ERRORS` if it is invalid."""
    class_names = value["classes"]
    require_fingerprint(value["data_fingerprint"])
    if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
        raise ValueError("no list of class names")
    return require_json_object(value) | {"classes": [normalize_class_name(name) for name in class_names]}


def find_run(address: str, changes: dict[str, Any] | None = None) -> StoredRun:
    """Read a run and validate its configuration.

    Args:
        address: output_dir of the run.
        changes: values that replace the run's values, by key, such as {"data.root": "/elsewhere"}.

    Raises:
        DataError: there is no run, or its run.json is corrupt.
        ConfigError: config.yaml is corrupt or of another version, or `changes` are invalid.
    """
    folder, config_tree, run_json = read_run(address)
    for key, value in (changes or {}).items():
        *section_names, field_name = key.split(".")
        section = config_tree
        for name in section_names:
            if not isinstance(section.setdefault(name, {}), dict):
                section[name] = {}
            section = section[name]
        section[field_name] = value
    try:
        config = validate_resolved_config(config_tree)
    except ConfigError as error:
        fix = "change the value on the command line, or give a run of this version"
        raise ConfigError(f"has an invalid config.yaml: {error}", key="run", value=address, fix=fix) from None
    return StoredRun(address, folder, config, tuple(run_json["classes"]), run_json["data_fingerprint"])


def find_checkpoint(run: StoredRun, selector: str) -> StoragePath:
    """Return the folder of one of a run's checkpoints.

    `selector` is "best", "last", a step such as "420", or the name of a phase, which selects the checkpoint with the
    weights that the phase ended with.

    Raises:
        ConfigError: `selector` is none of these, or names a phase that has not ended.
        DataError: the run does not have that checkpoint, or `LATEST` or `BEST` is corrupt.
    """
    checkpoints_folder = run.folder / "checkpoints"
    is_remote = not run.folder.is_local  # in a bucket, only checkpoints that LATEST lists are committed
    latest_names = read_pointer(checkpoints_folder / "LATEST") if is_remote or selector == "last" else []
    checkpoints = {child.name: child for child in checkpoints_folder.folders() if is_checkpoint(child.name)}
    if is_remote:
        checkpoints = {name: child for name, child in checkpoints.items() if name in latest_names}
    if selector in ("best", "last"):
        names = latest_names[:1] if selector == "last" else read_pointer(checkpoints_folder / "BEST")
    elif selector.isdecimal():
        names = [name for name in checkpoints if parse_step(name) == int(selector)]
    else:
        phases = _read_phases(run) or _read_finished_phases(find_checkpoint(run, "last"))
        step_by_phase = {name: phase["kept_step"] for name, phase in phases.items() if "kept_step" in phase}
        if selector in step_by_phase:
            return find_checkpoint(run, str(step_by_phase[selector]))
        hint = f", or a phase that has ended: {', '.join(step_by_phase)}" if step_by_phase else ""
        raise ConfigError("is not a checkpoint", key="checkpoint", value=selector, fix=f"give best, last, a step{hint}")
    if names and names[0] in checkpoints:
        return checkpoints[names[0]]
    if not checkpoints:
        raise DataError("has no checkpoint yet", key="run", value=run.address, fix="wait until it has saved one")
    steps = ", ".join(map(str, sorted(map(parse_step, checkpoints))))
    raise DataError(
        f"is not a checkpoint of {run.address}", key="checkpoint", value=selector, fix=f"give one of {steps}"
    )


def _read_phases(run: StoredRun) -> dict[str, Any]:
    """Read the phase summaries in a run's report, by phase; {} if it does not exist or is corrupt, which is logged."""
    try:
        return read_json(run.folder / "report" / "report.json", _parse_phases, fix="") or {}
    except DataError as error:
        log.info(f"{error.problem}; the summary of the phases is that of the checkpoint")
        return {}


def _read_finished_phases(checkpoint: StoragePath) -> dict[str, Any]:
    """Read the summaries of the phases that had finished at a checkpoint, by phase, from its state.json."""

    def parse(state: Any) -> dict[str, Any]:
        return require_json_object(require_json_object(state).get("finished", {}))

    return read_json(checkpoint / "state.json", parse, "give another checkpoint") or {}


def _parse_phases(report: Any) -> dict[str, Any]:
    return {name: require_json_object(phase) for name, phase in require_json_object(report["phases"]).items()}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The contents of a checkpoint that evaluation, export and prediction use."""

    name: str  # "best", "last", the name of a phase, or "step-420"
    step: int
    history: list[dict[str, Any]]  # one entry per epoch
    phases: dict[str, Any]  # summary of each finished phase, by phase, as in report.json
    values: dict[str, np.ndarray]  # the model's variables by name; averages (EMA) if the run computed them


def load_checkpoint(run: StoredRun, selector: str | None) -> LoadedCheckpoint:
    """Read one of a run's checkpoints.

    `selector` is as for `find_checkpoint`. It defaults to `training.keep`, the checkpoint that the run exports.

    Raises:
        ConfigError: `selector` is neither best, last, a step nor a phase that has ended.
        DataError: the checkpoint does not exist or is corrupt.
    """
    selector = selector or run.config.training.keep
    state, values = read_checkpoint(find_checkpoint(run, selector))
    phases = _read_phases(run)
    if not phases or list(phases.values())[-1].get("kept_step") != state["step"]:
        phases = state.get("finished", {})  # the report, if there is one, is of another checkpoint
    name = f"step-{state['step']}" if selector.isdecimal() else selector
    return LoadedCheckpoint(name, state["step"], state.get("history", []), phases, select_inference_weights(values))


def open_classifier(run: StoredRun, checkpoint: LoadedCheckpoint) -> Classifier:
    """Rebuild a run's classifier with a checkpoint's weights. Sets Keras' global dtype policy to the run's policy."""
    import keras

    from trainer.cluster.devices import DTYPE_POLICIES

    keras.config.set_dtype_policy(DTYPE_POLICIES[run.config.runtime.precision])
    num_classes = len(run.class_names)
    source = f"checkpoint step {checkpoint.step}"
    return rebuild_classifier(run.config.model, num_classes, run.config.seed, checkpoint.values, source)


def map_to_run_classes(run: StoredRun, dataset: Dataset) -> Dataset:
    """Return a dataset with a run's classes, in the run's order. Labels are mapped by class name.

    The dataset can lack some of the classes. A note in the result then names these classes, and is also logged.

    Raises:
        DataError: the dataset has a class that the run was not trained on.
    """
    names = run.class_names
    if dataset.class_names == names:
        return dataset
    if unknown_names := [repr(name) for name in dataset.class_names if name not in names]:
        problem = f"has classes that the run was not trained on: {join_first(unknown_names)}"
        fix = f"give data of the classes {join_first([repr(name) for name in names])}"
        raise DataError(problem, key="run", value=run.address, fix=fix)
    run_labels = np.array([names.index(name) for name in dataset.class_names], np.int32)  # by dataset label
    splits = {name: replace(split, labels=run_labels[split.labels]) for name, split in dataset.splits.items()}
    notes = dataset.notes
    if missing_names := [name for name in names if name not in dataset.class_names]:
        note = f"the data has no example of {join_first(missing_names)}: their rows in the report are empty"
        log.info(note)
        notes += (note,)
    return replace(dataset, class_names=names, splits=splits, notes=notes)


def disable_pretrained_weights(model: Model) -> Model:
    """Return a copy of the settings with `weights=none`: a checkpoint's model needs no pretrained weights."""
    return model.model_copy(update={"weights": "none"})


def rebuild_classifier(
    model: Model, class_count: int, seed: int, values: dict[str, np.ndarray], source: str
) -> Classifier:
    """Build a classifier, and assign trained values by name to all its variables.

    Must be called in the strategy's scope, after Keras' global dtype policy is set. The pretrained weights of `model`
    are not loaded. Arrays in `values` that match no variable are ignored. `source` describes their origin in errors.

    Raises:
        ModelError: the backbone cannot be built.
        DataError: a value is missing or has another shape.
    """
    from trainer.models.classifier import build_classifier  # imports TensorFlow, which is slow
    from trainer.runs.restore import assign_values

    classifier = build_classifier(disable_pretrained_weights(model), class_count, seed)
    assign_values(classifier, classifier.variables, values, source)
    return classifier
