"""A trained run by its output_dir, here or in a bucket: its configuration, its checkpoints, its classifier rebuilt."""

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
    """A run as its folder describes it."""

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
        raise DataError(f"run={address} holds no run (no config.yaml in it); give the output_dir of one")
    try:
        facts = json.loads((home / "run.json").read())
        if {"classes", "data_fingerprint"} <= facts.keys():
            return home, read_config(written[0]), facts
    except (ValueError, DataError):
        pass
    raise DataError(f"run={address}: its run.json is damaged or missing")


def find_run(address: str, changes: dict[str, Any] | None = None) -> FinishedRun:
    """Read a run by its output_dir, local or gs://; `changes`, {"data.root": "/elsewhere"}, replace its own values.

    Raises:
        DataError: there is no run, or its files are damaged.
        ConfigError: its config.yaml is of another version, or the changes do not fit.
    """
    home, tree, facts = read_run(address)
    for key, value in (changes or {}).items():
        here = tree
        *path, last = key.split(".")
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    try:
        return FinishedRun(address, home, load_resolved(tree), tuple(facts["classes"]), facts["data_fingerprint"])
    except ConfigError as error:
        raise ConfigError(f"run={address}: its config.yaml cannot be used; {error}") from None


def exported_checkpoint(run: FinishedRun) -> str:
    """The checkpoint that a run exports at its end: best | last."""
    return run.config.training.keep


def find_checkpoint(run: FinishedRun, which: str) -> StoragePath:
    """The folder of a checkpoint; `which` is best, last or the number of a step.

    Raises:
        ConfigError: `which` is none of these.
        DataError: the run has none, or not that one.
    """
    folder = run.home / "checkpoints"
    latest = names_in(folder / "LATEST")
    there = {child.name: child for child in folder.folders() if child.name.startswith(PREFIX)}
    if not run.home.is_local:  # in a bucket a checkpoint is committed once LATEST names it
        there = {name: child for name, child in there.items() if name in latest}
    if which in ("best", "last"):
        names = latest[:1] if which == "last" else names_in(folder / "BEST")
    elif which.isdigit():
        names = [name for name in there if step_of(name) == int(which)]
    else:
        raise ConfigError(f"checkpoint={which}: give best, last or a step, such as checkpoint=420")
    if names and names[0] in there:
        return there[names[0]]
    if not there:
        raise DataError(f"run={run.address} has no checkpoint yet; let it train first")
    steps = ", ".join(map(str, sorted(map(step_of, there))))
    raise DataError(f"run={run.address} has no checkpoint {which}; the steps it has: {steps}")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint of a run as an evaluation needs it."""

    name: str  # best, last or step-420
    step: int
    history: list[dict[str, Any]]  # one entry per epoch until then
    phases: dict[str, Any]  # summaries of the finished phases; of the last checkpoint, as the run's report has them
    values: dict[str, np.ndarray]  # of the model's variables by name, averaged where EMA is on


def load_checkpoint(run: FinishedRun, which: str | None) -> LoadedCheckpoint:
    """Read a checkpoint; `which` is best, last, a step, or None: the one that the run exported.

    Raises:
        ConfigError: it is none of these.
        DataError: it is missing or damaged.
    """
    chosen = which or exported_checkpoint(run)
    state, values = read_checkpoint(find_checkpoint(run, chosen))
    report = (run.home / "report" / "report.json").fetch()
    phases: dict[str, Any] = json.loads(report[0])["phases"] if report else {}
    if not phases or list(phases.values())[-1].get("kept_step") != state["step"]:
        phases = state.get("finished", {})
    name = chosen if chosen in ("best", "last") else f"step-{state['step']}"
    return LoadedCheckpoint(name, state["step"], state.get("history", []), phases, weights_of(values))


def open_classifier(run: FinishedRun, checkpoint: LoadedCheckpoint) -> Classifier:
    """The run's classifier with the weights of a checkpoint, in the precision it trained in."""
    import keras

    from trainer.cluster.devices import POLICIES

    keras.config.set_dtype_policy(POLICIES[run.config.runtime.precision])
    classes, source = len(run.class_names), f"checkpoint step {checkpoint.step}"
    return rebuild_classifier(run.config.model, classes, run.config.seed, checkpoint.values, source)


def check_classes(run: FinishedRun, dataset: Dataset) -> None:
    """Raise a DataError unless the data has the classes of the run, in the same order."""
    mine, theirs = run.class_names, dataset.class_names
    if mine == theirs:
        return
    unknown = [repr(name) for name in theirs if name not in mine]
    missing = [repr(name) for name in mine if name not in theirs]
    parts = [f"{_some(unknown)} unknown to it"] if unknown else []
    parts += [f"{_some(missing)} missing in the data"] if missing else []
    if not parts:
        wanted, name = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
        parts = [f"the same in another order, {name!r} where it has {wanted!r}"]
    raise DataError(
        f"run={run.address} knows {len(mine)} classes and the data has {len(theirs)}: {'; '.join(parts)}; "
        "give data with the same classes in the same order"
    )


def _some(names: list[str]) -> str:
    """ "'a' is", "'a', 'b' are", "'a', 'b', 'c' and 7 more are"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def without_weights(model: Model) -> Model:
    """The model with `weights=none`, where every value comes from elsewhere or none is needed."""
    return model.model_copy(update={"weights": "none"})


def rebuild_classifier(
    model: Model, class_count: int, seed: int, values: dict[str, np.ndarray], source: str
) -> Classifier:
    """Build a classifier and assign trained values, by name, to all its variables; other values are ignored.

    Call it under the strategy's scope and after the global Keras precision policy was set. `source` names the values
    in messages.

    Raises:
        ModelError: the backbone cannot be had.
        DataError: a value is missing or has another shape.
    """
    from trainer.models.classifier import build_classifier  # mistakes must answer before TensorFlow is imported
    from trainer.runs.restore import assign_values

    classifier = build_classifier(without_weights(model), class_count, seed)
    assign_values(classifier, classifier.variables, values, source)
    return classifier
