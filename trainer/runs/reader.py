"""A run that was trained before, found by its output_dir, here or in a bucket: what it was told, and its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.config.schema import RunConfig, load
from trainer.errors import ConfigError, DataError
from trainer.monitoring.log import say
from trainer.runs.checkpoints import PREFIX, read_checkpoint, step_of, weights_of
from trainer.storage.path import Place, place
from trainer.types import Dataset

if TYPE_CHECKING:
    from trainer.models.classifier import Classifier


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says of it."""

    address: str  # as the user gave it
    home: Place
    config: RunConfig
    class_names: tuple[str, ...]
    fingerprint: str  # of its data


def read_run(address: str) -> tuple[Place, dict[str, Any], dict[str, Any]]:
    """The folder of a run, its configuration as it was written, and what run.json says: `classes`, `data_fingerprint`.

    Args:
        address: its output_dir, local or gs://.

    Raises:
        DataError: there is no run, or its files are damaged.
    """
    home = place(address)
    written = (home / "config.yaml").fetch()
    if written is None:
        raise DataError(f"run={address} holds no run (no config.yaml in it); give the output_dir of one")
    try:
        facts = json.loads((home / "run.json").read())
        if {"classes", "data_fingerprint"} <= facts.keys():
            return home, yaml.safe_load(written[0]), facts
    except (ValueError, DataError):
        pass
    raise DataError(f"run={address}: its run.json is damaged or missing")


def find_run(address: str, changes: dict[str, Any] | None = None) -> FinishedRun:
    """Read what a run was told.

    Args:
        address: its output_dir, local or gs://.
        changes: values that replace its own, {"data.root": "/elsewhere"}.

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
        return FinishedRun(address, home, load(tree), tuple(facts["classes"]), facts["data_fingerprint"])
    except ConfigError as error:
        raise ConfigError(f"run={address}: its config.yaml cannot be used; {error}") from None


def exported_checkpoint(run: FinishedRun) -> str:
    """Which checkpoint a run exports at its end: best | last."""
    return run.config.training.keep


def find_checkpoint(run: FinishedRun, which: str) -> Place:
    """The folder of a checkpoint.

    Args:
        which: best | last | the number of a step.

    Raises:
        ConfigError: `which` is none of these.
        DataError: the run has none, or not that one.
    """
    folder = run.home / "checkpoints"
    latest = _names_in(folder / "LATEST")
    there = {child.name: child for child in folder.folders() if child.name.startswith(PREFIX)}
    if not run.home.is_local:
        there = {name: child for name, child in there.items() if name in latest}  # what counts in a bucket
    if which in ("best", "last"):
        names = latest[:1] if which == "last" else _names_in(folder / "BEST")
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


def _names_in(pointer: Place) -> list[str]:
    found = pointer.fetch()
    return found[0].decode().split() if found else []


def open_classifier(run: FinishedRun, checkpoint: Place) -> Classifier:
    """The run's classifier with the weights of a checkpoint, in the precision it trained in."""
    import keras

    from trainer.rebuilding import rebuild_classifier

    precision = run.config.runtime.precision
    keras.config.set_dtype_policy(precision if precision == "float32" else f"mixed_{precision}")
    values, source = weights_of(read_checkpoint(checkpoint)[1]), f"checkpoint {checkpoint.name}"
    return rebuild_classifier(run.config.model, len(run.class_names), run.config.seed, values, source)


def open_data(run: FinishedRun) -> Dataset:
    """The data of a run, fetched where it is in a bucket.

    Raises:
        DataError: it cannot be read, or has other classes than the run.
    """
    from trainer.data.open import open_dataset
    from trainer.data.remote import local_copies

    cache = Path(run.config.runtime.cache_dir).expanduser()
    bare = run.config.model_copy(update={"model": run.config.model.model_copy(update={"weights": "none"})})
    local, _ = local_copies(bare, cache, say, lambda _: None)
    limit = run.config.training.batch_size if run.config.debug.overfit else run.config.debug.max_examples
    dataset = open_dataset(local.data, seed=run.config.seed, cache_dir=cache, max_examples=limit, note=say)
    if dataset.class_names != run.class_names:
        raise DataError(
            f"the data has the classes {', '.join(dataset.class_names[:5])}, run={run.address} was trained on "
            f"{', '.join(run.class_names[:5])}; give data of the same classes"
        )
    return dataset
