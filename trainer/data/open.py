"""Open the dataset of a run: class names, splits, notes and a fingerprint from `data.*`."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path

import numpy as np

from trainer.config.schema import Data, RequestedConfig
from trainer.data.digits import digits_folder
from trainer.data.image_folder import open_image_folder
from trainer.data.records import read_groups
from trainer.data.remote import local_copies
from trainer.data.splits import Note, RawData, at_most, fingerprint, open_tfrecords, per_class
from trainer.data.tfds import open_tfds
from trainer.errors import DataError
from trainer.storage.shard_cache import ShardCache
from trainer.types import Dataset, scored_split

TINY = 30  # examples: below this one example moves a score by more than 3 points
IMBALANCE = 3  # ratio of the largest to the smallest number of training examples of a class


@dataclass(frozen=True)
class OpenedData:
    """The dataset of a run, with local copies of what is in buckets."""

    dataset: Dataset
    addresses: dict[str, str]  # local path -> the address that it was fetched from
    shards: ShardCache | None  # fetches record shards while they are read; None: all is on the local disk
    weights: str  # `model.weights`, or the local copy of it


def open_run_data(config: RequestedConfig, note: Note, check: Callable[[str], None], stream: bool = True) -> OpenedData:
    """Open the data of a run, staged on the local disk where it is in a bucket.

    Args:
        note: called with one line before slow work, and with each note on the data.
        check: called with an address while it is fetched; may raise to stop.
        stream: fetch the shards of a prepared dataset while they are used, not before.

    Raises:
        DataError, Interrupted: as `open_dataset` and `trainer.storage.staging.stage`.
    """
    local, addresses, shards = local_copies(config, note, check, stream)
    dataset = open_run_dataset(config, local.data, note, streamed=shards is not None)
    return OpenedData(dataset, addresses, shards, local.model.weights)


def open_run_dataset(config: RequestedConfig, data: Data, note: Note, streamed: bool = False) -> Dataset:
    """Open `data`, `config.data` with local paths; with debug.overfit one batch, which is also the validation split."""
    cache, limit = config.runtime.cache_folder, config.example_limit
    dataset = open_dataset(data, seed=config.seed, cache_dir=cache, max_examples=limit, note=note, streamed=streamed)
    if config.debug.overfit:
        batch = dataset.splits["train"]
        dataset = Dataset(dataset.name, dataset.class_names, {"train": batch, "validation": batch}, dataset.fingerprint)
    return dataset


def require_validation(dataset: Dataset) -> None:
    """Raise a DataError if the dataset has no validation split."""
    if "validation" not in dataset.splits:
        fix = "set it above 0, or set data.validation_split"
        raise DataError("there is nothing to validate on", key="data.validation_fraction", fix=fix)


def open_dataset(
    data: Data,
    *,
    seed: int,
    cache_dir: Path,
    max_examples: int | None,
    note: Note,
    streamed: bool = False,
    all_groups: bool = False,
) -> Dataset:
    """Open the source that `data.source` names.

    Args:
        seed: draws the examples that data.labels_per_class and max_examples select.
        cache_dir: stores the digits and the labels of record shards between runs.
        max_examples: limit per split, with the same number from each class as far as possible.
        streamed: data.root has only manifest and labels; its shards are fetched while they are used.
        all_groups: read data.group_field of every split, not only of the one that is scored at the end.
        note: called with one line before slow work, and with each of `Dataset.notes`.

    Raises:
        DataError: the data is missing, damaged, or contradicts the configuration.
    """
    cache_dir = Path(cache_dir).expanduser()
    raw = _open_source(data, cache_dir, note, streamed)
    _check_classes(raw)
    train = raw.splits["train"]
    if data.labels_per_class:
        few = np.flatnonzero(np.bincount(train.labels) < data.labels_per_class)
        if few.size:
            raw.notes.append(f"data.labels_per_class={data.labels_per_class}: all there are of {_listed(raw, few)}")
        raw.splits["train"] = per_class(train, data.labels_per_class, seed)
    if max_examples:
        raw.splits = {name: at_most(split, max_examples, seed) for name, split in raw.splits.items()}
    if data.group_field:
        for name in raw.splits if all_groups else {scored_split(raw.splits)} & raw.splits.keys():
            groups = read_groups(raw.splits[name], data.group_field, raw.group_names)
            raw.splits[name] = replace(raw.splits[name], groups=groups)
    raw.notes += _notes(raw, limited=max_examples is not None) + _copy_notes(raw)
    for line in raw.notes:
        note(line)
    skipped, notes = tuple(raw.skipped), tuple(raw.notes)
    return Dataset(raw.name, raw.class_names, raw.splits, fingerprint(raw), skipped, notes)


def _open_source(data: Data, cache_dir: Path, note: Note, streamed: bool) -> RawData:
    if data.source == "image_folder":
        return open_image_folder(data)
    if data.source == "tfrecords":
        return open_tfrecords(data, cache_dir, note)
    if data.source == "digits":
        try:
            root = str(digits_folder(cache_dir))
        except OSError as error:
            problem, fix = f"the digits cannot be written there ({error.strerror})", "set a folder that can be written"
            raise DataError(problem, key="runtime.cache_dir", value=cache_dir, fix=fix) from None
        data = Data(source="tfds", root=root, on_error=data.on_error)  # its splits are fixed
    return open_tfds(data, cache_dir, note, streamed)


def _listed(raw: RawData, classes: Iterable[int]) -> str:
    names = [raw.class_names[i] for i in classes]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_classes(raw: RawData) -> None:
    count = len(raw.class_names)
    if count < 2:
        classes = _listed(raw, range(count)) or "no classes"
        raise DataError(f"{raw.name} has only {classes}", fix="use data of at least two classes")
    if len(set(raw.class_names)) < count:
        names = ", ".join(raw.class_names)
        raise DataError(f"{raw.name} has a class name twice: {names}", fix="use each class name once")
    without = np.flatnonzero(np.bincount(raw.splits["train"].labels, minlength=count) == 0)
    if without.size:
        skipped = f" ({len(raw.skipped)} unreadable ones were skipped)" if raw.skipped else ""
        fix = "add some, leave the class out, or choose another split"
        raise DataError(f"no training example of {_listed(raw, without)}{skipped}", fix=fix)


def _notes(raw: RawData, limited: bool) -> list[str]:
    notes = []
    counts = np.bincount(raw.splits["train"].labels, minlength=len(raw.class_names))
    if counts.max() > IMBALANCE * counts.min():
        order = np.argsort(counts, kind="stable")
        shown = order if len(order) <= 10 else np.concatenate([order[:5], order[-5:]])
        listed = ", ".join(f"{raw.class_names[i]} {counts[i]}" for i in shown)
        listed += "; the rarest and commonest five" * (len(order) > 10)
        fold = counts.max() / max(counts.min(), 1)
        notes.append(
            f"training examples per class differ {fold:.1f}-fold ({listed}): training.class_weights=balanced may help"
        )
    for name, split in raw.splits.items():
        if split.count < TINY and name != "train" and not limited:
            notes.append(f"{name} has only {split.count} examples: each is {100 / split.count:.1f} points of accuracy")
        absent = np.setdiff1d(np.arange(len(raw.class_names)), split.labels)
        if absent.size and not limited:
            notes.append(f"{name} has no example of {_listed(raw, absent)}")
    if raw.skipped:
        notes.append(f"{len(raw.skipped)} skipped (data.on_error=skip), the first: {raw.skipped[0]}")
    return notes


def _copy_notes(raw: RawData) -> list[str]:
    """Notes on files that are in train and in another split too; only files alike in size and ends are read."""

    def ends(path: str) -> tuple[str, ...]:
        return tuple(raw.facts[path].rsplit(" ", 2)[1:])

    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    notes = []
    for path in raw.splits["train"].files:
        alike[ends(path)].append(path)
    for name, split in raw.splits.items():
        files = split.files if name != "train" else ()
        pairs = [(path, other) for path in files for other in alike.get(ends(path), ()) if cmp(path, other, False)]
        if pairs:
            copies = f"{len(pairs)} of the {len(files)} files of {name} also occur byte for byte in train"
            notes.append(f"{copies}, the first: {pairs[0][0]} = {pairs[0][1]}")
    return notes
