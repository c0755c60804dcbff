"""Open datasets in the format of TFDS (TensorFlow Datasets), by name or from the folder of one version."""

import difflib
import os
from collections.abc import Container
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Data
from trainer.config.typed import format_argument
from trainer.data.records import has_no_labels
from trainer.data.splits import (
    RawData,
    RecordSource,
    build_split,
    compute_split_sizes,
    count_overlap,
    list_unused_fractions,
    rank_within_classes,
    read_shards,
    select_examples,
)
from trainer.errors import DataError, Interrupted, format_count
from trainer.monitoring.health import health
from trainer.names import escape_unprintable, find_path_error
from trainer.storage.disk import translate_disk_error
from trainer.storage.download import request_size, translate_download_error
from trainer.types import LogMessage, Shard, Split


def open_tfds(data: Data, cache_dir: Path, log_message: LogMessage, streamed: bool = False) -> RawData:
    """Open the dataset of data.root or data.name, and read the labels of its splits.

    If data.validation_split is null, the validation split is the dataset's split "validation". If the dataset has no
    such split, or if that split's examples are not labelled, the fraction data.validation_fraction of the training
    records becomes the validation split (see `hold_out_splits`). The same applies to the test split.

    Args:
        cache_dir: stores the labels of shards for later runs.
        streamed: whether data.root has only the metadata, manifest and labels file of a dataset in a bucket, and shards
            are fetched while they are read.

    Raises:
        DataError: the dataset is missing, corrupt or not stored as TFRecords, it lacks a configured split or field, or
            the train split overlaps another split.
        Interrupted: the dataset cannot be downloaded now, or a disk is full or fails.
    """
    dataset_info = (_open_folder(os.path.expanduser(data.root)) if data.root else _open_by_name(data)).info
    file_format = dataset_info.file_format.value if dataset_info.file_format else "tfrecord"
    if file_format != "tfrecord":
        raise DataError(
            f"{escape_unprintable(dataset_info.name)} is stored as {file_format}",
            fix="prepare it with file_format=tfrecord",
        )
    class_names, group_names = _get_class_names(dataset_info, data), _get_group_names(dataset_info, data)
    specs, ranges, split_notes = resolve_splits(dataset_info, data)
    for name in [n for n in ("validation", "test") if n in ranges and getattr(data, f"{n}_split") is None]:
        if not streamed and has_no_labels(ranges[name], data.label_field):
            del ranges[name], specs[name]
            split_notes.append(f"the split {name} of the dataset is not used: its examples have no label (-1)")
    source = RecordSource(data, len(class_names), cache_dir, log_message, streamed)
    paths = sorted({shard.path for shards in ranges.values() for shard in shards})
    labels, identities, skipped = read_shards(paths, source)
    splits = {name: build_split(name, shards, labels, source, skipped) for name, shards in ranges.items()}
    notes = split_notes + _check_overlaps(splits, specs) + list_unused_fractions(data, splits)
    if fractions := select_missing_fractions(data, splits):
        new_splits, new_notes = hold_out_splits(splits["train"], fractions, data.split_seed)
        splits |= new_splits
        notes += new_notes
    return RawData(dataset_info.name, class_names, splits, identities, skipped, notes, group_names=group_names)


def list_split_specs(data: Data, existing: Container[str]) -> dict[str, str]:
    """Return the TFDS split string of each split that is configured or exists, by split name.

    If a split string is null in the configuration, it defaults to the split's name, provided that this name is in
    `existing`. A validation or test split that is configured as "none" is left out.

    Args:
        existing: names of the splits that the dataset has.
    """
    specs = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    return {
        name: name if spec is None else spec
        for name, spec in specs.items()
        if (name in existing if spec is None else name == "train" or spec != "none")
    }


def resolve_splits(dataset_info: Any, data: Data) -> tuple[dict[str, str], dict[str, list[Shard]], list[str]]:
    """Resolve the configured splits to ranges of the dataset's records.

    If data.validation_split or data.test_split is null, the split has the records of the dataset's split with that
    name, except those that are also in data.train_split. If no records remain, the split is left out.

    Args:
        dataset_info: the `tfds.core.DatasetInfo` of the dataset.

    Returns:
        Split name -> TFDS split string; split name -> record ranges in shards; and notes about removed records.

    Raises:
        DataError: a split does not exist, is empty, or has a shard outside the dataset's folder.
    """
    specs = list_split_specs(data, dataset_info.splits)
    notes = []
    ranges = {name: resolve_split_string(dataset_info, spec, name) for name, spec in specs.items()}
    for name in [n for n in ("validation", "test") if n in specs and getattr(data, f"{n}_split") is None]:
        remaining = _subtract_ranges(ranges[name], ranges["train"])
        if remaining != ranges[name]:
            count, num_remaining = (sum(s.stop - s.start for s in shards) for shards in (ranges[name], remaining))
            overlap = f"{count - num_remaining} of the {count} examples of {name} are in data.train_split"
            outcome = f"the others are the {name} split" if num_remaining else f"they are not the {name} split"
            notes.append(f"{overlap}={specs['train']}: {outcome}")
            ranges[name] = remaining
            if not remaining:
                del ranges[name], specs[name]
    return specs, ranges, notes


def _subtract_ranges(ranges: list[Shard], removed_ranges: list[Shard]) -> list[Shard]:
    """Return the ranges of the records that are in `ranges`, but not in `removed_ranges`."""
    for removed in removed_ranges:
        shards_and_bounds = [
            (shard, ((shard.start, min(shard.stop, removed.start)), (max(shard.start, removed.stop), shard.stop)))
            if shard.path == removed.path and max(shard.start, removed.start) < min(shard.stop, removed.stop)
            else (shard, ((shard.start, shard.stop),))
            for shard in ranges
        ]
        ranges = [replace(shard, start=a, stop=b) for shard, bounds in shards_and_bounds for a, b in bounds if a < b]
    return ranges


def select_missing_fractions(data: Data, splits: Container[str]) -> dict[str, float]:
    """Return the configured fractions above 0 of the validation and test splits that `splits` lacks, by split name."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    return {name: fraction for name, fraction in fractions.items() if name not in splits and fraction > 0}


def _open_folder(root: str) -> Any:
    """Return the TFDS builder for the folder of a dataset version."""
    import tensorflow_datasets as tfds

    if not os.path.exists(os.path.join(root, "dataset_info.json")):
        files: list[Path] = []
        with suppress(OSError, ValueError):  # `root` is not a valid path
            files = sorted(Path(root).glob("*/dataset_info.json")) + sorted(Path(root).glob("*/*/dataset_info.json"))
        fix = (
            f"set {format_argument('data.root', files[0].parent)}"
            if files
            else "write one with python -m trainer.prepare"
        )
        raise DataError("has no prepared dataset (dataset_info.json)", key="data.root", value=root, fix=fix)
    try:
        return tfds.builder_from_directory(root)
    except Exception as error:  # TFDS's JSON and protobuf parsers raise many types
        if disk_error := translate_disk_error(error, [root]):
            raise disk_error from error
        problem = f"TFDS cannot read this folder: {_get_first_line(error)}"
        raise DataError(problem, key="data.root", value=root, fix="prepare the dataset again") from None


def _get_first_line(error: Exception) -> str:
    """Return the first line of an error message, escaped, or the type of the error if it has no message."""
    return escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])


def _open_by_name(data: Data) -> Any:
    """Return the TFDS builder for data.name. If data.download is set, download and prepare a missing dataset."""
    import tensorflow_datasets as tfds

    assert data.name
    folder = os.path.expanduser(data.data_dir) if data.data_dir else None
    data_dir = folder or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(data.name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        builders = tfds.list_builders(with_community_datasets=False)  # listing community datasets requires the network
        matches = difflib.get_close_matches(data.name.split("/")[0].split(":")[0], builders, 1)
        fix = f"set data.name={matches[0]}" if matches else "set a name that TFDS lists, or data.data_dir to its folder"
        problem = f"TFDS has no dataset of this name, and none is prepared in {data_dir}"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    except Exception as error:  # a wrong version or config: TFDS raises AssertionError, ValueError and others
        if disk_error := translate_disk_error(error, [data_dir]):
            raise disk_error from error
        problem, fix = f"TFDS cannot open it: {_get_first_line(error)}", "set a version and config that TFDS lists"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    if builder.info.splits:
        return builder
    if not data.download:
        fix = "set data.download=true to download it, or data.data_dir to its folder"
        raise DataError(f"is not prepared in {data_dir}", key="data.name", value=data.name, fix=fix)
    try:
        with health.waiting_for(f"TFDS, which downloads and prepares {data.name}"):  # it reports no progress for hours
            builder.download_and_prepare(file_format="tfrecord")
    except Exception as error:  # network, checksums, missing packages or disk space
        if disk_error := translate_disk_error(error, [data_dir]):
            raise disk_error from error
        raise _make_download_error(error, data.name) from error
    return builder


def _make_download_error(error: Exception, name: str) -> DataError | Interrupted:
    """Make the error for a dataset that could not be downloaded or prepared.

    The error is an `Interrupted` if the same download can succeed later, else a DataError.
    """
    fix = "prepare it with TFDS on another machine, and set data.data_dir to its folder"
    if interrupted := translate_download_error(error, "TFDS cannot download it", key="data.name", value=name, fix=fix):
        return interrupted
    problem = f"TFDS cannot download and prepare it: {_get_first_line(error)}"
    return DataError(problem, key="data.name", value=name, fix=fix)


def check_download(data: Data) -> None:
    """Check that the server with the first file of the dataset data.name can be reached, without downloading anything.

    Raises:
        Interrupted: the server cannot be reached, so that a run could not download the dataset.
    """
    import tensorflow_datasets as tfds

    assert data.name
    builder = tfds.builder(data.name, data_dir=os.path.expanduser(data.data_dir) if data.data_dir else None)
    for url in list(builder.url_infos or {})[:1]:  # all files of most datasets are on one server
        try:
            request_size(url)
        except Exception as error:
            download_error = _make_download_error(error, data.name)
            if isinstance(download_error, Interrupted):  # a server can refuse HEAD requests only
                raise download_error from error


def _get_class_names(dataset_info: Any, data: Data) -> tuple[str, ...]:
    """Check the types of the image and label features, and return the names of the classes.

    A label feature that is not a `ClassLabel` has no names. It requires data.class_names, which are then returned.
    """
    import tensorflow_datasets as tfds

    features = dict(dataset_info.features) if hasattr(dataset_info.features, "items") else {}
    title = escape_unprintable(dataset_info.name)
    feature_list = ", ".join(
        f"{escape_unprintable(name)} ({type(feature).__name__})" for name, feature in sorted(features.items())
    )
    roles = (("image", data.image_field, tfds.features.Image), ("label", data.label_field, tfds.features.ClassLabel))
    for role, name, expected_type in roles:
        feature = features.get(name)
        nameless_types = {"text": tfds.features.Text, "onehot": tfds.features.Tensor}  # by data.label_kind
        is_expected = isinstance(feature, expected_type) and (role == "image" or data.label_kind == "index")
        is_nameless = role == "label" and isinstance(feature, nameless_types.get(data.label_kind, tfds.features.Scalar))
        if is_expected or (is_nameless and data.class_names):
            continue
        if role == "label" and isinstance(feature, expected_type):
            problem, fix = f"{name} of {title} is a {expected_type.__name__}, which counts from 0", "leave it out"
            raise DataError(problem, key="data.label_kind", value=data.label_kind, fix=fix)
        candidates = [n for n, f in features.items() if isinstance(f, expected_type)]
        type_name = expected_type.__name__
        fix = (
            f"set {escape_unprintable(format_argument(f'data.{role}_field', candidates[0]))}"
            if candidates
            else f"use a dataset with a feature {type_name}"
        )
        if role == "label" and isinstance(feature, tfds.features.Text):
            fix = f"{fix}, or set data.class_names, and data.label_kind=text to read the text as label"
        elif role == "label" and isinstance(feature, tfds.features.Tensor) and not isinstance(feature, expected_type):
            kind = "data.label_kind=onehot" if feature.shape else "data.label_kind=index (index1 if they begin with 1)"
            fix = f"{fix}, or set data.class_names, and {kind} to read its numbers as labels"
        problem = f"{title} has no {type_name} of this name; it has {feature_list}"
        raise DataError(problem, key=f"data.{role}_field", value=name, fix=fix)
    names = getattr(features[data.label_field], "names", None)
    return tuple(names or data.class_names or ())


def _get_group_names(dataset_info: Any, data: Data) -> tuple[str, ...] | None:
    """Return the names of the values 0, 1, ... of data.group_field.

    Return None if the field has no such names, or if data.group_field is not set.
    """
    if not data.group_field:
        return None
    features = dict(dataset_info.features)
    if data.group_field not in features:
        matches = difflib.get_close_matches(data.group_field, list(features), 1)
        fix = "set another field, or prepare the data again with data.group_field (python -m trainer.prepare)"
        fix = f"set {escape_unprintable(format_argument('data.group_field', matches[0]))}" if matches else fix
        feature_list = ", ".join(map(escape_unprintable, sorted(features)))
        problem = f"{escape_unprintable(dataset_info.name)} has no such feature; it has {feature_list}"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=fix)
    return tuple(map(escape_unprintable, getattr(features[data.group_field], "names", None) or ())) or None


def resolve_split_string(dataset_info: Any, spec: str, name: str) -> list[Shard]:
    """Resolve a TFDS split string to record ranges in shards.

    Args:
        dataset_info: the `tfds.core.DatasetInfo` of the dataset.
        spec: the split string, such as "train[:80%]".
        name: train, validation or test: which split string `spec` is in the configuration, for error messages.

    Raises:
        DataError: the split does not exist, is empty, or has a shard outside the dataset's folder.
    """
    split_list = ", ".join(
        f"{escape_unprintable(split)} ({split_info.num_examples})" for split, split_info in dataset_info.splits.items()
    )
    key, fix = f"data.{name}_split", f"set a split string over {split_list}"
    try:
        instructions = dataset_info.splits[spec].file_instructions
    except Exception as error:  # KeyError, ValueError or AssertionError, depending on the mistake
        raise DataError(
            f"{escape_unprintable(dataset_info.name)} has no such split ({_get_first_line(error)})",
            key=key,
            value=spec,
            fix=fix,
        ) from None
    shards = [Shard(str(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions if i.take]
    folder = str(dataset_info.data_dir)
    for file in (os.path.relpath(shard.path, folder) for shard in shards):
        if reason := find_path_error(file):
            problem = (
                f"dataset_info.json lists the shard {escape_unprintable(file)}, which is not below {folder} ({reason})"
            )
            raise DataError(problem, key=key, value=spec, fix="prepare the dataset again")
    if not shards:
        raise DataError(f"is empty in {escape_unprintable(dataset_info.name)}", key=key, value=spec, fix=fix)
    return shards


def _check_overlaps(splits: dict[str, Split], specs: dict[str, str]) -> list[str]:
    """Raise a DataError if train overlaps another split. Return a list with one note if validation and test overlap."""
    for name in ("validation", "test"):
        if name in splits and (count := count_overlap(splits["train"], splits[name])):
            problem = f"has {format_count(count, 'example')} in common with data.train_split={specs['train']}"
            fix = "set a split without training examples"
            raise DataError(problem, key=f"data.{name}_split", value=specs[name], fix=fix)
    if "validation" in splits and "test" in splits and (count := count_overlap(splits["validation"], splits["test"])):
        examples = format_count(count, "example")
        return [f"validation and test have {examples} in common: the checkpoint is selected on test examples"]
    return []


def hold_out_splits(train: Split, fractions: dict[str, float], seed: int) -> tuple[dict[str, Split], list[str]]:
    """Move fractions of the training records to new splits.

    The new splits consist of the last records, so that each split is one range of records. If the train split would
    then lack a class, or a new split would lack a frequent class, because the records are sorted by class, the new
    splits are a stratified random sample instead.

    Args:
        train: the split with all training records.
        fractions: name of each new split -> its fraction of the records.
        seed: seed of the random sample.

    Returns:
        All splits by name, including train; and a list with one note if the new splits are a random sample.
    """
    count = train.count
    sizes = compute_split_sizes(train.count, fractions)
    class_counts = np.bincount(train.labels)

    def cut(order: np.ndarray) -> dict[str, np.ndarray]:
        """Cut the new splits off the end of `order`, a permutation of all indices. Return sorted indices by split."""
        names = [*reversed(fractions), "train"]
        sections = np.split(order[::-1], np.cumsum([sizes[name] for name in names[:-1]]))
        return {name: np.sort(section) for name, section in zip(names, sections, strict=True)}

    def lacks_class(name: str, indices: np.ndarray) -> bool:
        """Return whether a split lacks a class that 95 % of random samples of its size have; for train, any class."""
        is_absent = np.bincount(train.labels[indices], minlength=len(class_counts)) == 0
        expected_counts = class_counts * len(indices) / count  # P(a sample lacks a class) = exp(-expected_count)
        return bool((is_absent & ((expected_counts >= 3) | ((name == "train") & (class_counts > 0)))).any())

    cuts = cut(np.arange(count))
    notes = []
    if any(lacks_class(name, indices) for name, indices in cuts.items()):
        # Relative rank in the class, between 0 and 1. In this order, any tail has the same fraction of each class.
        relative_rank = (rank_within_classes(train.labels, seed) + 0.5) / class_counts[train.labels]
        cuts = cut(np.argsort(relative_rank, kind="stable"))
        sampling = f"{' and '.join(fractions)} {'was' if len(fractions) == 1 else 'were'} drawn record by record"
        notes.append(
            f"the tail of the training records lacks classes (they are sorted), so {sampling} with data.split_seed="
            f"{seed}; shards written by python -m trainer.prepare read faster, or set data.validation_split"
        )
    return {name: replace(select_examples(train, indices), name=name) for name, indices in cuts.items()}, notes
