"""A run that was trained before, found by its output_dir, here or in a bucket: what it was told, and its weights."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import yaml

from trainer.config import RunConfig, load
from trainer.contracts import Dataset
from trainer.errors import ConfigError, DataError
from trainer.storage.places import Place, place
from trainer.watching.lines import say

if TYPE_CHECKING:
    from trainer.models.classifier import Classifier

PREFIX = "step-"


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says of it."""

    address: str  # as the user gave it
    home: Place
    config: RunConfig
    class_names: tuple[str, ...]
    fingerprint: str  # of its data


def find_run(address: str, changes: dict[str, Any] | None = None) -> FinishedRun:
    """Read what a run was told.

    Args:
        address: its output_dir, local or gs://.
        changes: values that replace its own, {"data.root": "/elsewhere"}.

    Raises:
        DataError: there is no run, or its files are damaged.
        ConfigError: its config.yaml is of another version, or the changes do not fit.
    """
    home = place(address)
    if not (home / "config.yaml").exists():
        raise DataError(f"run={address} holds no run (no config.yaml in it); give the output_dir of one")
    tree = yaml.safe_load((home / "config.yaml").read_text())
    for key, value in (changes or {}).items():
        here = tree
        *path, last = key.split(".")
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    try:
        config = load(tree)
        told = json.loads((home / "run.json").read())
        return FinishedRun(address, home, config, tuple(told["classes"]), told["data_fingerprint"])
    except ConfigError as error:
        raise ConfigError(f"run={address}: its config.yaml cannot be used; {error}") from None
    except (ValueError, KeyError, OSError):
        raise DataError(f"run={address}: its run.json is damaged or missing") from None


def exported_checkpoint(run: FinishedRun) -> str:
    """Which checkpoint a run exports at its end: best | last."""
    return run.config.training.keep


def find_checkpoint(run: FinishedRun, which: str) -> Place:
    """The folder of a checkpoint.

    Args:
        which: best | last | the number of a step.

    Raises:
        DataError: the run has none, or not that one.
    """
    folder = run.home / "checkpoints"
    pointer = {"best": "BEST", "last": "LATEST"}.get(which)
    if pointer:
        names = (folder / pointer).read_text().split() if (folder / pointer).exists() else []
    else:
        names = [
            f.name for f in folder.folders() if f.name.split("-")[1:2] == [f"{which:0>8}"] and f.name[:5] == PREFIX
        ]
    if names:
        return folder / names[0]
    there = sorted({str(int(f.name.split("-")[1])) for f in folder.folders() if f.name.startswith(PREFIX)}, key=int)
    if not there:
        raise DataError(f"run={run.address} has no checkpoint yet; let it train first")
    raise DataError(f"run={run.address} has no checkpoint {which}; it has best, last, {', '.join(there)}")


def read_checkpoint(folder: Place) -> dict[str, np.ndarray]:
    """The variables of a model by name, averaged where the run had EMA on.

    Raises:
        DataError: it is damaged.
    """
    try:
        content = (folder / "variables.npz").read()
        expected = json.loads((folder / "manifest.json").read())["variables.npz"]["crc32c"]
        if f"{google_crc32c.value(content):08x}" != expected:
            raise DataError(f"checkpoint {folder}: variables.npz does not match its checksum")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            values = {name: arrays[name] for name in arrays.files if not name.startswith("optimizer/")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"checkpoint {folder} cannot be read: {error}") from None
    return values | {name.removeprefix("ema/"): value for name, value in values.items() if name.startswith("ema/")}


def open_classifier(run: FinishedRun, checkpoint: Place) -> Classifier:
    """The run's classifier with the weights of a checkpoint, in the precision it trained in."""
    import keras

    from trainer.rebuilding import rebuild_classifier

    precision = run.config.runtime.precision
    keras.config.set_dtype_policy(precision if precision == "float32" else f"mixed_{precision}")
    values, source = read_checkpoint(checkpoint), f"checkpoint {checkpoint.name}"
    return rebuild_classifier(run.config.model, len(run.class_names), run.config.seed, values, source)


def open_data(run: FinishedRun) -> Dataset:
    """The data of a run, fetched where it is in a bucket.

    Raises:
        DataError: it cannot be read, or has other classes than the run.
    """
    from trainer.data.sources import open_dataset
    from trainer.local_copies import local_copies

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
