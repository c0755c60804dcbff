"""Read a run from its output_dir, local or in a bucket: configuration, checkpoints, classifier."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import Model, RunConfig, load_resolved, read_config
from trainer.errors import ConfigError, DataError
from trainer.runs.checkpoints import PREFIX, names_in, read_checkpoint, step_of, weights_of
from trainer.storage.path import StoragePath, storage_path
from trainer.types import Dataset

if TYPE_CHECKING:
    from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class FinishedRun:
    """A run as read from its folder."""

    address: str  # as the user gave it
    home: StoragePath
    config: RunConfig
    class_names: tuple[str, ...]
    fingerprint: str  # of its data


def read_run(address: str) -> tuple[StoragePath, dict[str, Any], dict[str, Any]]:
    """The folder of a run, its configuration as written, and run.json with `classes` and `data_fingerprint`.

    Raises:
        DataError: there is no run, or its files are damaged.
    """
    home = storage_path(address)
    written = (home / "config.yaml").fetch()
    if written is None:
        raise DataError("holds no run (no config.yaml)", key="run", value=address, fix="give the output_dir of one")
    try:
        facts = json.loads((home / "run.json").read())
        if {"classes", "data_fingerprint"} <= facts.keys():
            return home, read_config(written[0]), facts
    except (ValueError, DataError):
        pass
    raise DataError("its run.json is damaged or missing", key="run", value=address, fix="give another run")


def find_run(address: str, changes: dict[str, Any] | None = None) -> FinishedRun:
    """Read a run by its output_dir, local or gs://; `changes`, as {"data.root": "/elsewhere"}, replace its own values.

    Raises:
        DataError: there is no run, or its files are damaged.
        ConfigError: its config.yaml is of another version, or the changes are invalid.
    """
    home, tree, facts = read_run(address)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    try:
        return FinishedRun(address, home, load_resolved(tree), tuple(facts["classes"]), facts["data_fingerprint"])
    except ConfigError as error:
        fix = "change the value on the command line, or give a run of this version"
        raise ConfigError(f"its config.yaml is invalid: {error}", key="run", value=address, fix=fix) from None


def exported_checkpoint(run: FinishedRun) -> str:
    """The checkpoint that a run exports at its end: best or last."""
    return run.config.training.keep


def find_checkpoint(run: FinishedRun, which: str) -> StoragePath:
    """The folder of a checkpoint; `which` is best, last or a step.

    Raises ConfigError for another `which`, and DataError if the run does not have that checkpoint.
    """
    folder = run.home / "checkpoints"
    latest = names_in(folder / "LATEST")
    available = {child.name: child for child in folder.folders() if child.name.startswith(PREFIX)}
    if not run.home.is_local:  # in a bucket, LATEST names the committed ones
        available = {name: child for name, child in available.items() if name in latest}
    if which in ("best", "last"):
        names = latest[:1] if which == "last" else names_in(folder / "BEST")
    elif which.isdigit():
        names = [name for name in available if step_of(name) == int(which)]
    else:
        raise ConfigError("is not a checkpoint", key="checkpoint", value=which, fix="give best, last or a step")
    if names and names[0] in available:
        return available[names[0]]
    if not available:
        raise DataError("has no checkpoint yet", key="run", value=run.address, fix="let it train first")
    steps = ", ".join(map(str, sorted(map(step_of, available))))
    raise DataError(f"{run.address} has no such checkpoint", key="checkpoint", value=which, fix=f"give one of {steps}")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The contents of a checkpoint for an evaluation or export."""

    name: str  # best, last or step-420
    step: int
    history: list[dict[str, Any]]  # one entry per epoch
    phases: dict[str, Any]  # summaries of the finished phases, as in the report of the run
    values: dict[str, np.ndarray]  # of the model's variables by name, averaged with EMA


def load_checkpoint(run: FinishedRun, which: str | None) -> LoadedCheckpoint:
    """Read a checkpoint; `which` is best, last, a step, or None for the exported one. Raises as `find_checkpoint`."""
    chosen = which or exported_checkpoint(run)
    state, values = read_checkpoint(find_checkpoint(run, chosen))
    report = (run.home / "report" / "report.json").fetch()
    phases: dict[str, Any] = json.loads(report[0])["phases"] if report else {}
    if not phases or list(phases.values())[-1].get("kept_step") != state["step"]:
        phases = state.get("finished", {})
    name = chosen if chosen in ("best", "last") else f"step-{state['step']}"
    return LoadedCheckpoint(name, state["step"], state.get("history", []), phases, weights_of(values))


def open_classifier(run: FinishedRun, checkpoint: LoadedCheckpoint) -> Classifier:
    """Rebuild the classifier of a run with the weights of a checkpoint, in the precision of its training."""
    import keras

    from trainer.cluster.devices import POLICIES

    keras.config.set_dtype_policy(POLICIES[run.config.runtime.precision])
    classes, source = len(run.class_names), f"checkpoint step {checkpoint.step}"
    return rebuild_classifier(run.config.model, classes, run.config.seed, checkpoint.values, source)


def check_classes(run: FinishedRun, dataset: Dataset) -> None:
    """Raise a DataError unless the data has the classes of the run in the same order."""
    classes, given = run.class_names, dataset.class_names
    if classes == given:
        return
    unknown = [repr(name) for name in given if name not in classes]
    missing = [repr(name) for name in classes if name not in given]
    parts = [f"{_some(unknown)} unknown to the run"] if unknown else []
    parts += [f"{_some(missing)} missing in the data"] if missing else []
    if not parts:
        expected, name = next((a, b) for a, b in zip(classes, given, strict=True) if a != b)
        parts = [f"the order differs, {name!r} instead of {expected!r}"]
    problem = f"has {len(classes)} classes and the data has {len(given)}: {' and '.join(parts)}"
    raise DataError(problem, key="run", value=run.address, fix="give data with the same classes in the same order")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def without_weights(model: Model) -> Model:
    """The model with `weights=none`, for values that come from a checkpoint."""
    return model.model_copy(update={"weights": "none"})


def rebuild_classifier(
    model: Model, class_count: int, seed: int, values: dict[str, np.ndarray], source: str
) -> Classifier:
    """Build a classifier and assign trained values, by name, to all its variables; other values are ignored.

    Call it in the strategy's scope and after the global Keras dtype policy is set. `source` names the values in
    messages.

    Raises:
        ModelError: the backbone cannot be loaded.
        DataError: a value is missing or has another shape.
    """
    from trainer.models.classifier import build_classifier  # other errors are raised before TensorFlow is imported
    from trainer.runs.restore import assign_values

    classifier = build_classifier(without_weights(model), class_count, seed)
    assign_values(classifier, classifier.variables, values, source)
    return classifier
