"""Open datasets in TFDS's format, by name or from the folder of one version."""

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
    rank_within_classes,
    read_shards,
    take,
    unused_fractions,
)
from trainer.errors import DataError, Interrupted
from trainer.monitoring.health import health
from trainer.names import escape_unprintable, find_path_fault
from trainer.storage.disk import translate_disk_error
from trainer.storage.download import request_size, translate_download_error
from trainer.types import LogMessage, Shard, Split


def open_tfds(data: Data, cache_dir: Path, log_message: LogMessage, streamed: bool = False) -> RawData:
    """Open the dataset of data.root or data.name, and read the labels of its splits.

    If data.validation_split is null, the dataset's own split "validation" is used. Without one, the last
    data.validation_fraction of the training records becomes the validation split. If a class is absent there, because
    the records are sorted by class, a stratified random sample is used instead. The same applies to the test split,
    and to a split whose examples are not labelled. A `streamed` folder has only manifest and labels. Its shards are
    fetched later.

    Raises:
        DataError: the dataset is missing, corrupt or not stored as TFRecords, has no such split or field, or train and
            another split overlap.
    """
    info = (_open_folder(os.path.expanduser(data.root)) if data.root else _open_by_name(data)).info
    file_format = info.file_format.value if info.file_format else "tfrecord"
    if file_format != "tfrecord":
        raise DataError(
            f"{escape_unprintable(info.name)} is stored as {file_format}", fix="prepare it with file_format=tfrecord"
        )
    class_names, group_names = _get_class_names(info, data), _get_group_names(info, data)
    specs, ranges, split_notes = resolve_splits(info, data)
    for name in [n for n in ("validation", "test") if n in ranges and getattr(data, f"{n}_split") is None]:
        if not streamed and has_no_labels(ranges[name], data.label_field):
            del ranges[name], specs[name]
            split_notes.append(f"the split {name} of the dataset is not used: its examples have no label (-1)")
    source = RecordSource(data, len(class_names), cache_dir, log_message, streamed)
    paths = sorted({shard.path for shards in ranges.values() for shard in shards})
    labels, identities, skipped = read_shards(paths, source)
    splits = {name: build_split(name, shards, labels, source, skipped) for name, shards in ranges.items()}
    notes = split_notes + _check_overlaps(splits, specs) + unused_fractions(data, splits)
    if fractions := select_missing_fractions(data, splits):
        new_splits, new_notes = carve_splits(splits["train"], fractions, data.split_seed)
        splits |= new_splits
        notes += new_notes
    return RawData(info.name, class_names, splits, identities, skipped, notes, group_names=group_names)


def list_split_specs(data: Data, existing: Container[str]) -> dict[str, str]:
    """Return the TFDS split string of each split. Null means the split of that name, if it is in `existing`.

    A validation or test split that is configured as "none" is not returned.
    """
    specs = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    return {
        name: name if spec is None else spec
        for name, spec in specs.items()
        if (name in existing if spec is None else name == "train" or spec != "none")
    }


def resolve_splits(info: Any, data: Data) -> tuple[dict[str, str], dict[str, list[Shard]], list[str]]:
    """Return the split string and the shard ranges of each split, and notes.

    A validation or test split that is not configured (null) is the dataset's split of that name without the records of
    data.train_split. If none are left, there is no such split.
    """
    specs, notes = list_split_specs(data, info.splits), []
    ranges = {name: resolve_split(info, spec, name) for name, spec in specs.items()}
    for name in [n for n in ("validation", "test") if n in specs and getattr(data, f"{n}_split") is None]:
        rest = _subtract_ranges(ranges[name], ranges["train"])
        if rest != ranges[name]:
            all_records, left = (sum(s.stop - s.start for s in shards) for shards in (ranges[name], rest))
            used = f"{all_records - left} of the {all_records} examples of {name} are in data.train_split"
            outcome = f"the others are the {name} split" if left else f"they are not the {name} split"
            notes.append(f"{used}={specs['train']}: {outcome}")
            ranges[name] = rest
            if not rest:
                del ranges[name], specs[name]
    return specs, ranges, notes


def _subtract_ranges(ranges: list[Shard], removed: list[Shard]) -> list[Shard]:
    """Return the records of `ranges` that are not in `removed`."""
    for other in removed:
        pieces = [
            (shard, ((shard.start, min(shard.stop, other.start)), (max(shard.start, other.stop), shard.stop)))
            if shard.path == other.path and max(shard.start, other.start) < min(shard.stop, other.stop)
            else (shard, ((shard.start, shard.stop),))
            for shard in ranges
        ]
        ranges = [replace(shard, start=a, stop=b) for shard, bounds in pieces for a, b in bounds if a < b]
    return ranges


def select_missing_fractions(data: Data, splits: Container[str]) -> dict[str, float]:
    """Return the nonzero fractions of the training records that become the splits missing from `splits`."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    return {name: fraction for name, fraction in fractions.items() if name not in splits and fraction > 0}


def _open_folder(root: str) -> Any:
    import tensorflow_datasets as tfds

    if not os.path.exists(os.path.join(root, "dataset_info.json")):
        nested: list[Path] = []
        with suppress(OSError, ValueError):  # a name that no folder can have: there is none
            nested = sorted(Path(root).glob("*/dataset_info.json")) + sorted(Path(root).glob("*/*/dataset_info.json"))
        fix = (
            f"set {format_argument('data.root', nested[0].parent)}"
            if nested
            else "write one with python -m trainer.prepare"
        )
        raise DataError("has no prepared dataset (dataset_info.json)", key="data.root", value=root, fix=fix)
    try:
        return tfds.builder_from_directory(root)
    except Exception as error:  # including those of TFDS's JSON and protobuf parsers
        if full := translate_disk_error(error, [root]):
            raise full from error
        problem = f"TFDS cannot read this folder: {_get_first_line(error)}"
        raise DataError(problem, key="data.root", value=root, fix="prepare the dataset again") from None


def _get_first_line(error: Exception) -> str:
    return escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])


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
        if full := translate_disk_error(error, [prepared_in]):
            raise full from error
        problem, fix = f"TFDS cannot open it: {_get_first_line(error)}", "set a version and config that TFDS lists"
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
        if full := translate_disk_error(error, [prepared_in]):
            raise full from error
        raise _make_download_error(error, data.name) from error
    return builder


def _make_download_error(error: Exception, name: str) -> DataError | Interrupted:
    """Make the error for a dataset that could not be downloaded (`Interrupted`) or prepared."""
    fix = "prepare it with TFDS on another machine, and set data.data_dir to its folder"
    if failed := translate_download_error(error, "TFDS cannot download it", key="data.name", value=name, fix=fix):
        return failed
    problem = f"TFDS cannot download and prepare it: {_get_first_line(error)}"
    return DataError(problem, key="data.name", value=name, fix=fix)


def check_download(data: Data) -> None:
    """Raise the error of a run if the server of data.name cannot be reached. Nothing is downloaded."""
    import tensorflow_datasets as tfds

    assert data.name
    builder = tfds.builder(data.name, data_dir=os.path.expanduser(data.data_dir) if data.data_dir else None)
    for url in list(builder.url_infos or {})[:1]:  # most datasets have one server
        try:
            request_size(url)
        except Exception as error:
            failed = _make_download_error(error, data.name)
            if isinstance(failed, Interrupted):  # a server that refuses HEAD alone can still be downloaded from
                raise failed from error


def _get_class_names(info: Any, data: Data) -> tuple[str, ...]:
    """Return the class names. Check first that the image and label fields have suitable types."""
    import tensorflow_datasets as tfds

    features = dict(info.features) if hasattr(info.features, "items") else {}
    title = escape_unprintable(info.name)
    listed = ", ".join(
        f"{escape_unprintable(name)} ({type(feature).__name__})" for name, feature in sorted(features.items())
    )
    required = (("image", data.image_field, tfds.features.Image), ("label", data.label_field, tfds.features.ClassLabel))
    for kind, name, expected in required:
        feature = features.get(name)
        kinds = {"text": tfds.features.Text, "onehot": tfds.features.Tensor}
        numbered = isinstance(feature, expected) and (kind == "image" or data.label_kind == "index")
        named = kind == "label" and isinstance(feature, kinds.get(data.label_kind, tfds.features.Scalar))
        if numbered or (named and data.class_names):
            continue
        if kind == "label" and isinstance(feature, expected):
            problem, fix = f"{name} of {title} is a {expected.__name__}, which counts from 0", "leave it out"
            raise DataError(problem, key="data.label_kind", value=data.label_kind, fix=fix)
        suitable = [n for n, f in features.items() if isinstance(f, expected)]
        required_type = expected.__name__
        fix = (
            f"set {escape_unprintable(format_argument(f'data.{kind}_field', suitable[0]))}"
            if suitable
            else f"use a dataset with a feature {required_type}"
        )
        if kind == "label" and isinstance(feature, tfds.features.Text):
            fix = f"{fix}, or set data.class_names, and data.label_kind=text to read the text as label"
        elif kind == "label" and isinstance(feature, tfds.features.Tensor) and not isinstance(feature, expected):
            read = "data.label_kind=onehot" if feature.shape else "data.label_kind=index (index1 if they begin with 1)"
            fix = f"{fix}, or set data.class_names, and {read} to read its numbers as labels"
        problem = f"{title} has no {required_type} of this name; it has {listed}"
        raise DataError(problem, key=f"data.{kind}_field", value=name, fix=fix)
    own = getattr(features[data.label_field], "names", None)
    return tuple(own or data.class_names or ())


def _get_group_names(info: Any, data: Data) -> tuple[str, ...] | None:
    """Return the names of the values 0, 1, ... of data.group_field. None if they have no names."""
    if not data.group_field:
        return None
    features = dict(info.features)
    if data.group_field not in features:
        close = difflib.get_close_matches(data.group_field, list(features), 1)
        fix = "set another field, or prepare the data again with data.group_field (python -m trainer.prepare)"
        fix = f"set {escape_unprintable(format_argument('data.group_field', close[0]))}" if close else fix
        listed = ", ".join(map(escape_unprintable, sorted(features)))
        problem = f"{escape_unprintable(info.name)} has no such feature; it has {listed}"
        raise DataError(problem, key="data.group_field", value=data.group_field, fix=fix)
    return tuple(map(escape_unprintable, getattr(features[data.group_field], "names", None) or ())) or None


def resolve_split(info: Any, spec: str, name: str) -> list[Shard]:
    """Resolve the split string of split `name` to shard ranges. Raise a DataError if it is unknown or empty."""
    existing = ", ".join(
        f"{escape_unprintable(split)} ({split_info.num_examples})" for split, split_info in info.splits.items()
    )
    key, fix = f"data.{name}_split", f"set a split string over {existing}"
    try:
        instructions = info.splits[spec].file_instructions
    except Exception as error:  # KeyError, ValueError or AssertionError, depending on the mistake
        raise DataError(
            f"{escape_unprintable(info.name)} has no such split ({_get_first_line(error)})",
            key=key,
            value=spec,
            fix=fix,
        ) from None
    shards = [Shard(str(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions if i.take]
    folder = str(info.data_dir)
    for file in (os.path.relpath(shard.path, folder) for shard in shards):
        if fault := find_path_fault(file):
            problem = (
                f"dataset_info.json lists the shard {escape_unprintable(file)}, which is not below {folder} ({fault})"
            )
            raise DataError(problem, key=key, value=spec, fix="prepare the dataset again")
    if not shards:
        raise DataError(f"is empty in {escape_unprintable(info.name)}", key=key, value=spec, fix=fix)
    return shards


def _check_overlaps(splits: dict[str, Split], specs: dict[str, str]) -> list[str]:
    """Raise a DataError if train overlaps another split. Return a note if validation and test overlap."""
    for name in ("validation", "test"):
        if name in splits and (common := count_overlap(splits["train"], splits[name])):
            problem = f"has {common} examples in common with data.train_split={specs['train']}"
            fix = "set a split without training examples"
            raise DataError(problem, key=f"data.{name}_split", value=specs[name], fix=fix)
    if "validation" in splits and "test" in splits and (common := count_overlap(splits["validation"], splits["test"])):
        return [f"validation and test have {common} examples in common: the checkpoint is selected on test examples"]
    return []


def carve_splits(train: Split, fractions: dict[str, float], seed: int) -> tuple[dict[str, Split], list[str]]:
    """Move fractions of the training records to new splits. Return all splits, and notes.

    The new splits are the last records, so that each split is one range of records. If a class is then absent from one
    of the splits, they are a stratified random sample instead.
    """
    count, sizes = train.count, compute_split_sizes(train.count, fractions)
    classes = np.bincount(train.labels)

    def cut(order: np.ndarray) -> dict[str, np.ndarray]:
        """Cut the new splits off the end of `order`, indices of all records. Return increasing indices per split."""
        names = [*reversed(fractions), "train"]
        sections = np.split(order[::-1], np.cumsum([sizes[name] for name in names[:-1]]))
        return {name: np.sort(section) for name, section in zip(names, sections, strict=True)}

    def lacks_a_class(name: str, indices: np.ndarray) -> bool:
        """Return whether train lacks a class, or a new split one that 95 % of random samples of its size have."""
        absent = np.bincount(train.labels[indices], minlength=len(classes)) == 0
        expected = classes * len(indices) / count  # a sample lacks a class with probability exp(-expected)
        return bool((absent & ((expected >= 3) | ((name == "train") & (classes > 0)))).any())

    cuts, notes = cut(np.arange(count)), []
    if any(lacks_a_class(name, indices) for name, indices in cuts.items()):
        rank = (rank_within_classes(train.labels, seed) + 0.5) / classes[train.labels]  # between 0 and 1 in each class
        cuts = cut(np.argsort(rank, kind="stable"))
        drawn = f"{' and '.join(fractions)} {'was' if len(fractions) == 1 else 'were'} drawn record by record"
        notes.append(
            f"the tail of the training records lacks classes (they are sorted), so {drawn} with data.split_seed="
            f"{seed}; shards written by python -m trainer.prepare read faster, or set data.validation_split"
        )
    return {name: replace(take(train, indices), name=name) for name, indices in cuts.items()}, notes
