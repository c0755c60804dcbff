"""Open datasets in TFDS's format, by name or from the folder of one version."""

import difflib
import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Data
from trainer.config.typed import argument
from trainer.data.splits import (
    RawData,
    RecordSource,
    count_overlap,
    rank_in_class,
    read_shards,
    split_of,
    split_sizes,
    take,
    unused_fractions,
)
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.names import path_fault, printable
from trainer.types import LogMessage, Shard, Split


def open_tfds(data: Data, cache_dir: Path, log_message: LogMessage, streamed: bool = False) -> RawData:
    """Open the dataset of data.root or data.name, and read the labels of its splits.

    If data.validation_split is null, the dataset's split "validation" is used. If it has none, the last
    data.validation_fraction of the training records becomes the validation split, or a stratified random sample of them
    if a class is absent there, as in records that are sorted by class. The same applies to the test split. A `streamed`
    folder has only manifest and labels; its shards are fetched later.

    Raises:
        DataError: the dataset is missing, damaged or not stored as TFRecords, has no such split or field, or train has
            records in common with another split.
    """
    info = (_open_folder(os.path.expanduser(data.root)) if data.root else _open_by_name(data)).info
    file_format = info.file_format.value if info.file_format else "tfrecord"
    if file_format != "tfrecord":
        raise DataError(f"{info.name} is stored as {file_format}", fix="prepare it with file_format=tfrecord")
    class_names, group_names = _class_names(info, data), _group_names(info, data)
    specs, ranges, split_notes = resolve_splits(info, data)
    source = RecordSource(data, len(class_names), cache_dir, log_message, streamed)
    paths = sorted({shard.path for shards in ranges.values() for shard in shards})
    labels, identities, skipped = read_shards(paths, source)
    splits = {name: split_of(name, shards, labels, source, skipped) for name, shards in ranges.items()}
    notes = split_notes + _check_overlaps(splits, specs) + unused_fractions(data, splits)
    if fractions := missing_fractions(data, splits):
        new_splits, new_notes = carve(splits["train"], fractions, data.split_seed)
        splits |= new_splits
        notes += new_notes
    return RawData(info.name, class_names, splits, identities, skipped, notes, group_names=group_names)


def split_specs(data: Data, existing: Container[str]) -> dict[str, str]:
    """Return the TFDS split string of each split; null means the split of that name, if it is in `existing`."""
    specs = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    return {
        name: name if spec is None else spec for name, spec in specs.items() if spec is not None or name in existing
    }


def resolve_splits(info: Any, data: Data) -> tuple[dict[str, str], dict[str, list[Shard]], list[str]]:
    """Return the split string and the ranges of shards of each split, and notes.

    A validation or test split that the configuration does not name (null) is the dataset's split of that name without
    the records of data.train_split; if none are left, there is no such split.
    """
    specs, notes = split_specs(data, info.splits), []
    ranges = {name: resolve_split(info, spec, name) for name, spec in specs.items()}
    for name in [n for n in ("validation", "test") if n in specs and getattr(data, f"{n}_split") is None]:
        rest = _without(ranges[name], ranges["train"])
        if rest != ranges[name]:
            all_records, left = (sum(s.stop - s.start for s in shards) for shards in (ranges[name], rest))
            used = f"{all_records - left} of the {all_records} examples of {name} are in data.train_split"
            outcome = f"the others are the {name} split" if left else f"they are not the {name} split"
            notes.append(f"{used}={specs['train']}: {outcome}")
            ranges[name] = rest
            if not rest:
                del ranges[name], specs[name]
    return specs, ranges, notes


def _without(ranges: list[Shard], removed: list[Shard]) -> list[Shard]:
    """Return the records of `ranges` that are not in `removed`."""
    for other in removed:
        parts = [
            (shard, ((shard.start, min(shard.stop, other.start)), (max(shard.start, other.stop), shard.stop)))
            if shard.path == other.path and max(shard.start, other.start) < min(shard.stop, other.stop)
            else (shard, ((shard.start, shard.stop),))
            for shard in ranges
        ]
        ranges = [replace(shard, start=a, stop=b) for shard, bounds in parts for a, b in bounds if a < b]
    return ranges


def missing_fractions(data: Data, splits: Container[str]) -> dict[str, float]:
    """Return the fraction of the training records for each split that is not in `splits`, if it is above 0."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    return {name: fraction for name, fraction in fractions.items() if name not in splits and fraction > 0}


def _open_folder(root: str) -> Any:
    import tensorflow_datasets as tfds

    if not os.path.exists(os.path.join(root, "dataset_info.json")):
        nested = sorted(Path(root).glob("*/dataset_info.json")) + sorted(Path(root).glob("*/*/dataset_info.json"))
        fix = f"set {argument('data.root', nested[0].parent)}" if nested else "write one with python -m trainer.prepare"
        raise DataError("has no prepared dataset (dataset_info.json)", key="data.root", value=root, fix=fix)
    try:
        return tfds.builder_from_directory(root)
    except Exception as error:  # including those of TFDS's JSON and protobuf parsers
        problem = f"TFDS cannot read this folder: {_first_line(error)}"
        raise DataError(problem, key="data.root", value=root, fix="prepare the dataset again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open_by_name(data: Data) -> Any:
    import tensorflow_datasets as tfds

    assert data.name
    folder = os.path.expanduser(data.data_dir) if data.data_dir else None
    prepared_in = folder or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(data.name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        builders = tfds.list_builders(with_community_datasets=False)  # listing community datasets requires the network
        close = difflib.get_close_matches(data.name.split("/")[0].split(":")[0], builders, 1)
        fix = f"set data.name={close[0]}" if close else "set a name that TFDS lists, or data.data_dir to its folder"
        problem = f"TFDS has no dataset of this name, and none is prepared in {prepared_in}"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    except Exception as error:  # a wrong version or config: TFDS raises AssertionError, ValueError and others
        problem, fix = f"TFDS cannot open it: {_first_line(error)}", "set a version and config that TFDS lists"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    if builder.info.splits:
        return builder
    if not data.download:
        fix = "set data.download=true to download it, or data.data_dir to its folder"
        raise DataError(f"is not prepared in {prepared_in}", key="data.name", value=data.name, fix=fix)
    try:
        with health.waiting_for(f"TFDS, which downloads and prepares {data.name}"):  # it reports no progress for hours
            builder.download_and_prepare(file_format="tfrecord")
    except Exception as error:  # network, checksums, missing packages or disk space
        problem = f"TFDS cannot download and prepare it: {_first_line(error)}"
        fix = "prepare it with TFDS on another machine, and set data.data_dir to its folder"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    return builder


def _class_names(info: Any, data: Data) -> tuple[str, ...]:
    """Return the class names, after checking that the image and label fields have suitable types."""
    import tensorflow_datasets as tfds

    features = dict(info.features) if hasattr(info.features, "items") else {}
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
    required = (("image", data.image_field, tfds.features.Image), ("label", data.label_field, tfds.features.ClassLabel))
    for kind, name, expected in required:
        feature = features.get(name)
        kinds = {"text": tfds.features.Text, "onehot": tfds.features.Tensor}
        numbered = isinstance(feature, expected) and (kind == "image" or data.label_kind == "index")
        named = kind == "label" and isinstance(feature, kinds.get(data.label_kind, tfds.features.Scalar))
        if numbered or (named and data.class_names):
            continue
        if kind == "label" and isinstance(feature, expected):
            problem, fix = f"{name} of {info.name} is a {expected.__name__}, which counts from 0", "leave it out"
            raise DataError(problem, key="data.label_kind", value=data.label_kind, fix=fix)
        suitable = [n for n, f in features.items() if isinstance(f, expected)]
        required_type = expected.__name__
        fix = f"set data.{kind}_field={suitable[0]}" if suitable else f"use a dataset with a feature {required_type}"
        if kind == "label" and isinstance(feature, tfds.features.Text):
            fix = f"{fix}, or set data.class_names, and data.label_kind=text to read the text as label"
        problem = f"{info.name} has no {required_type} of this name; it has {listed}"
        raise DataError(problem, key=f"data.{kind}_field", value=name, fix=fix)
    own = getattr(features[data.label_field], "names", None)
    return tuple(own) if own else data.class_names or ()


def _group_names(info: Any, data: Data) -> tuple[str, ...] | None:
    """Return the names of the values 0, 1, ... of data.group_field; None if they have no names."""
    if not data.group_field:
        return None
    features = dict(info.features)
    if data.group_field not in features:
        close = difflib.get_close_matches(data.group_field, list(features), 1)
        fix = "set another field, or prepare the data again with data.group_field (python -m trainer.prepare)"
        fix = f"set data.group_field={close[0]}" if close else fix
        problem = f"{info.name} has no such feature; it has {', '.join(sorted(features))}"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=fix)
    return tuple(getattr(features[data.group_field], "names", None) or ()) or None


def resolve_split(info: Any, spec: str, name: str) -> list[Shard]:
    """Resolve the split string of split `name` to ranges of shards; raise a DataError if it is unknown or empty."""
    existing = ", ".join(f"{split} ({split_info.num_examples})" for split, split_info in info.splits.items())
    key, fix = f"data.{name}_split", f"set a split string over {existing}"
    try:
        instructions = info.splits[spec].file_instructions
    except Exception as error:  # KeyError, ValueError or AssertionError, depending on the mistake
        raise DataError(f"{info.name} has no such split ({_first_line(error)})", key=key, value=spec, fix=fix) from None
    shards = [Shard(str(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions if i.take]
    folder = str(info.data_dir)
    for file in (os.path.relpath(shard.path, folder) for shard in shards):
        if fault := path_fault(file):
            problem = f"dataset_info.json lists the shard {printable(file)}, which is not below {folder} ({fault})"
            raise DataError(problem, key=key, value=spec, fix="prepare the dataset again")
    if not shards:
        raise DataError(f"is empty in {info.name}", key=key, value=spec, fix=fix)
    return shards


def _check_overlaps(splits: dict[str, Split], specs: dict[str, str]) -> list[str]:
    """Refuse records that are both in train and in another split; return a note on those in validation and test."""
    for name in ("validation", "test"):
        if name in splits and (common := count_overlap(splits["train"], splits[name])):
            problem = f"has {common} examples in common with data.train_split={specs['train']}"
            fix = "set a split without training examples"
            raise DataError(problem, key=f"data.{name}_split", value=specs[name], fix=fix)
    if "validation" in splits and "test" in splits and (common := count_overlap(splits["validation"], splits["test"])):
        return [f"validation and test have {common} examples in common: the checkpoint is selected on test examples"]
    return []


def carve(train: Split, fractions: dict[str, float], seed: int) -> tuple[dict[str, Split], list[str]]:
    """Move fractions of the training records to new splits.

    The new splits are the last records, so that each split is one range of them; or a stratified random sample, if a
    class is absent from the last records or from those that are left for training. Return all splits, and notes.
    """
    count, sizes = train.count, split_sizes(train.count, fractions)
    classes = np.bincount(train.labels)

    def cut(order: np.ndarray) -> dict[str, np.ndarray]:
        """Cut the new splits off the end of an order of the records; return ascending positions for each split."""
        names = [*reversed(fractions), "train"]
        parts = np.split(order[::-1], np.cumsum([sizes[name] for name in names[:-1]]))
        return {name: np.sort(part) for name, part in zip(names, parts, strict=True)}

    def lacks_a_class(name: str, positions: np.ndarray) -> bool:
        """Return whether train lacks a class, or a new split lacks one that 95 % of random samples of its size have."""
        absent = np.bincount(train.labels[positions], minlength=len(classes)) == 0
        expected = classes * len(positions) / count  # a sample lacks a class with probability exp(-expected)
        return bool((absent & ((expected >= 3) | ((name == "train") & (classes > 0)))).any())

    cuts, notes = cut(np.arange(count)), []
    if any(lacks_a_class(name, positions) for name, positions in cuts.items()):
        rank = (rank_in_class(train.labels, seed) + 0.5) / classes[train.labels]  # between 0 and 1 in each class
        cuts = cut(np.argsort(rank, kind="stable"))
        drawn = f"{' and '.join(fractions)} {'was' if len(fractions) == 1 else 'were'} drawn record by record"
        notes.append(
            f"the tail of the training records lacks classes (they are sorted), so {drawn} with data.split_seed="
            f"{seed}; shards written by python -m trainer.prepare read faster, or set data.validation_split"
        )
    return {name: replace(take(train, positions), name=name) for name, positions in cuts.items()}, notes
