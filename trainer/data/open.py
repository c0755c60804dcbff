"""From `data.*` to a `Dataset`: class names, splits, counts and a fingerprint."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.config.schema import Data, RequestedConfig
from trainer.data.digits import digits_folder
from trainer.data.image_folder import open_image_folder
from trainer.data.records import read_groups
from trainer.data.remote import copies_ahead, local_copies
from trainer.data.splits import Note, RawData, at_most, fingerprint, open_tfrecords, per_class
from trainer.data.tfds import open_tfds
from trainer.errors import DataError
from trainer.storage.shard_cache import ShardCache
from trainer.types import Dataset, scored_split

TINY = 30  # examples: below this one example moves a score by more than 3 points
IMBALANCE = 3  # most over fewest training examples of a class


@dataclass(frozen=True)
class OpenedData:
    """The dataset of a run, with all that is read from buckets on this machine's disk.

    Attributes:
        addresses: local path -> the address that it was fetched from.
        shards: where record shards come from while they are read; None: all that is read is here.
        weights: `model.weights`, or the local copy of it.
    """

    dataset: Dataset
    addresses: dict[str, str]
    shards: ShardCache | None
    weights: str


def open_run_data(config: RequestedConfig, note: Note, check: Callable[[str], None], stream: bool = True) -> OpenedData:
    """Open the data of a run, fetched where it is in a bucket.

    Args:
        note: called with one line before slow work, and with what is worth saying of the data.
        check: called with an address while it is fetched; may raise to leave.
        stream: the shards of a prepared dataset are fetched while they are used, not before.

    Raises:
        DataError: as `open_dataset`, or as `trainer.storage.staging.stage`.
        Interrupted: as `stage`.
    """
    copies = copies_ahead(config, note, check) if stream else (*local_copies(config, note, check), None)
    local, addresses, shards = copies
    dataset = open_run_dataset(config, local.data, note, arriving=shards is not None)
    return OpenedData(dataset, addresses, shards, local.model.weights)


def open_run_dataset(config: RequestedConfig, data: Data, note: Note, arriving: bool = False) -> Dataset:
    """The dataset of a run as it trains on it: with debug.overfit one batch, which is scored as well.

    Args:
        data: `config.data` with local paths.
    """
    cache_dir, limit = config.runtime.cache_folder, config.example_limit
    dataset = open_dataset(
        data, seed=config.seed, cache_dir=cache_dir, max_examples=limit, note=note, arriving=arriving
    )
    if config.debug.overfit:
        batch = dataset.splits["train"]
        dataset = Dataset(dataset.name, dataset.class_names, {"train": batch, "validation": batch}, dataset.fingerprint)
    return dataset


def require_validation(dataset: Dataset) -> None:
    """Raise a DataError where a run would have nothing to validate on."""
    if "validation" not in dataset.splits:
        raise DataError("there is nothing to validate on: set data.validation_fraction or data.validation_split")


def open_dataset(
    data: Data,
    *,
    seed: int,
    cache_dir: Path,
    max_examples: int | None,
    note: Note,
    arriving: bool = False,
    all_groups: bool = False,
) -> Dataset:
    """Open the named source.

    Args:
        seed: draws the examples that data.labels_per_class and max_examples keep.
        cache_dir: where the digits and the labels of record shards are kept between runs.
        max_examples: of each split, with the classes taking turns.
        arriving: data.root has manifest and labels, and its shards come from a bucket while they are used.
        all_groups: read data.group_field of every split, not only of the one that is scored at the end.
        note: called with one line before slow work, and with every note that also stands in `Dataset.notes`.

    Raises:
        DataError: the data is missing, damaged, or contradicts the configuration; says where and what to do.
    """
    cache_dir = Path(cache_dir).expanduser()
    raw = _open_source(data, cache_dir, note, arriving)
    _check_classes(raw)
    train = raw.splits["train"]
    if data.labels_per_class:
        few = [raw.class_names[i] for i, n in enumerate(np.bincount(train.labels)) if n < data.labels_per_class]
        if few:
            raw.notes.append(f"data.labels_per_class={data.labels_per_class}: all there are of {_listed(few)}")
        raw.splits["train"] = per_class(train, data.labels_per_class, seed)
    if max_examples:
        raw.splits = {name: at_most(split, max_examples, seed) for name, split in raw.splits.items()}
    if data.group_field:
        for name in raw.splits if all_groups else {scored_split(raw.splits)} & raw.splits.keys():
            groups = read_groups(raw.splits[name], data.group_field, raw.group_names)
            raw.splits[name] = replace(raw.splits[name], groups=groups)
    raw.notes += _remarks(raw, limited=max_examples is not None)
    for line in raw.notes:
        note(line)
    skipped, notes = tuple(raw.skipped), tuple(raw.notes)
    return Dataset(raw.name, raw.class_names, raw.splits, fingerprint(raw), skipped, notes)


def _open_source(data: Data, cache_dir: Path, note: Note, arriving: bool) -> RawData:
    if data.source == "image_folder":
        return open_image_folder(data)
    if data.source == "tfrecords":
        return open_tfrecords(data, cache_dir, note)
    if data.source == "digits":
        try:
            root = str(digits_folder(cache_dir))
        except OSError as error:
            raise DataError(
                f"the digits cannot be written below {cache_dir} ({error.strerror}): set runtime.cache_dir"
            ) from None
        data = Data(source="tfds", root=root, on_error=data.on_error)  # its splits are fixed
    return open_tfds(data, cache_dir, note, arriving)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_classes(raw: RawData) -> None:
    """Every class needs a training example, or the model could never answer it."""
    if len(raw.class_names) < 2:
        raise DataError(f"{raw.name} has the classes {_listed(list(raw.class_names))}; telling classes apart takes two")
    if len(set(raw.class_names)) < len(raw.class_names):
        raise DataError(f"{raw.name} has a class name twice: {', '.join(raw.class_names)}")
    counts = np.bincount(raw.splits["train"].labels, minlength=len(raw.class_names))
    without = [raw.class_names[i] for i in np.flatnonzero(counts == 0)]
    if without:
        skipped = f" ({len(raw.skipped)} unreadable ones were skipped)" if raw.skipped else ""
        advice = "add some, leave the class out, or choose another split"
        raise DataError(f"no training example of {_listed(without)}{skipped}: {advice}")


def _remarks(raw: RawData, limited: bool) -> list[str]:
    remarks = []
    train = raw.splits["train"]
    counts = np.bincount(train.labels, minlength=len(raw.class_names))
    if counts.max() > IMBALANCE * counts.min():
        order = np.argsort(counts, kind="stable")
        shown = order if len(order) <= 10 else np.concatenate([order[:5], order[-5:]])
        listed = ", ".join(f"{raw.class_names[i]} {counts[i]}" for i in shown)
        remarks.append(
            f"training examples per class differ {counts.max() / max(counts.min(), 1):.1f}-fold ({listed}"
            f"{'; the rarest and commonest five' * (len(order) > 10)}): training.class_weights=balanced may help"
        )
    for name, split in raw.splits.items():
        if split.count < TINY and name != "train" and not limited:
            remarks.append(
                f"{name} has only {split.count} examples: each is {100 / split.count:.1f} points of accuracy"
            )
        absent = sorted(set(range(len(raw.class_names))) - set(split.labels.tolist()))
        if absent and not limited:
            remarks.append(f"{name} has no example of {_listed([raw.class_names[i] for i in absent])}")
    if raw.skipped:
        remarks.append(f"{len(raw.skipped)} skipped (data.on_error=skip), the first: {raw.skipped[0]}")
    return remarks + _copies(raw)


def _copies(raw: RawData) -> list[str]:
    """Files that training shares byte for byte with another split; only files alike in size and ends are read."""

    def ends(path: str) -> tuple[str, ...]:
        return tuple(raw.facts[path].rsplit(" ", 2)[1:])

    def digest(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    trained_on: dict[tuple[str, ...], list[str]] = {}
    for path in raw.splits["train"].files:
        trained_on.setdefault(ends(path), []).append(path)
    remarks = []
    for name in [name for name in raw.splits if name != "train"]:
        files = raw.splits[name].files
        alike = [(path, other) for path in files for other in trained_on.get(ends(path), ())]
        pairs = [(path, other) for path, other in alike if digest(path) == digest(other)]
        if pairs:
            lie = "lies" if len(pairs) == 1 else "lie"
            remarks.append(
                f"{len(pairs)} of the {len(files)} files of {name} also {lie} byte for byte in train, the first: "
                f"{pairs[0][0]} = {pairs[0][1]}"
            )
    return remarks
