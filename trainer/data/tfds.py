"""Datasets that TFDS prepared: by name, or the folder of one version."""

import difflib
import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Data
from trainer.data.splits import RawData, RecordSource, class_rank, overlap, read_shards, split_of, split_sizes, take
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.storage.shard_cache import Note
from trainer.types import Shard, Split


def open_tfds(data: Data, cache_dir: Path, note: Note, streamed: bool = False) -> RawData:
    """Resolve split strings to record ranges and read their labels.

    If validation_split is null, validation is the dataset's own split, else the last validation_fraction of the
    training records (one range, so that every pass reads only what it needs), else, if a class is missing there as in
    records sorted by class, a stratified draw by split_seed. The same holds for test.

    Raises:
        DataError: the dataset is missing, not in TFRecords, or has no such split, image or label.
    """
    info = (_folder(os.path.expanduser(data.root)) if data.root else _named(data)).info
    kind = info.file_format.value if info.file_format else "tfrecord"
    if kind != "tfrecord":
        raise DataError(f"{info.name} is stored as {kind}", fix="prepare it with file_format=tfrecord")
    class_names, group_names = _class_names(info, data), _group_names(info, data)
    specs = split_specs(data, info.splits)
    ranges = {name: resolve_split(info, spec, name) for name, spec in specs.items()}
    source = RecordSource(data, len(class_names), cache_dir, note, streamed)
    paths = sorted({shard.path for shards in ranges.values() for shard in shards})
    labels, facts, skipped = read_shards(paths, source)
    splits = {name: split_of(name, shards, labels, source) for name, shards in ranges.items()}
    notes = _check_overlaps(splits, specs)
    if fractions := missing_fractions(data, splits):
        carved, reasons = carve(splits["train"], fractions, data.split_seed)
        splits |= carved
        notes += reasons
    return RawData(info.name, class_names, splits, facts, skipped, notes, group_names)


def split_specs(data: Data, own: Container[str]) -> dict[str, str]:
    """Split strings by split; a null one means the dataset's own split of that name, if `own` has it."""
    specs = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    return {name: name if spec is None else spec for name, spec in specs.items() if spec is not None or name in own}


def missing_fractions(data: Data, splits: Container[str]) -> dict[str, float]:
    """Fractions of the training records that become the splits which are not in `splits`."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    return {name: fraction for name, fraction in fractions.items() if name not in splits and fraction > 0}


def _folder(root: str) -> Any:
    import tensorflow_datasets as tfds

    if not os.path.exists(os.path.join(root, "dataset_info.json")):
        below = sorted(Path(root).glob("*/dataset_info.json")) + sorted(Path(root).glob("*/*/dataset_info.json"))
        fix = f"set data.root={below[0].parent}" if below else "write one with python -m trainer.prepare"
        raise DataError("holds no prepared dataset (dataset_info.json)", key="data.root", value=root, fix=fix)
    try:
        return tfds.builder_from_directory(root)
    except Exception as error:  # TFDS raises what its JSON and protocol readers raise
        problem = f"TFDS cannot read this folder: {_first_line(error)}"
        raise DataError(problem, key="data.root", value=root, fix="prepare the dataset again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _named(data: Data) -> Any:
    import tensorflow_datasets as tfds

    assert data.name
    folder = os.path.expanduser(data.data_dir) if data.data_dir else None
    prepared_in = folder or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(data.name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)  # listing the others takes the network
        close = difflib.get_close_matches(data.name.split("/")[0].split(":")[0], known, 1)
        fix = f"set data.name={close[0]}" if close else "set a name that TFDS lists, or data.data_dir to its folder"
        problem = f"no dataset of TFDS has this name, and none is prepared in {prepared_in}"
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
    except Exception as error:  # network, checksum, missing extra packages, disk: all end here
        problem = f"TFDS cannot download and prepare it: {_first_line(error)}"
        fix = "prepare it with TFDS elsewhere, and set data.data_dir to its folder"
        raise DataError(problem, key="data.name", value=data.name, fix=fix) from None
    return builder


def _class_names(info: Any, data: Data) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    features = dict(info.features) if hasattr(info.features, "items") else {}
    shown = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
    required = (("image", data.image_field, tfds.features.Image), ("label", data.label_field, tfds.features.ClassLabel))
    for kind, name, expected in required:
        feature = features.get(name)
        named = kind == "label" and data.class_names and isinstance(feature, tfds.features.Scalar)
        if isinstance(feature, expected) or named:
            continue
        fitting = [n for n, f in features.items() if isinstance(f, expected)]
        fix = f"set data.{kind}_field={fitting[0]}" if fitting else f"use a dataset with a feature {expected.__name__}"
        problem = f"{info.name} has no {expected.__name__} of this name; it has {shown}"
        raise DataError(problem, key=f"data.{kind}_field", value=name, fix=fix)
    return data.class_names or tuple(features[data.label_field].names)


def _group_names(info: Any, data: Data) -> tuple[str, ...] | None:
    """Names of the values of data.group_field, if the feature has some."""
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
    """Resolve "train[:80%]" to the ranges of its shards, by TFDS's own rules.

    Raises:
        DataError: the dataset has no such split, or it is empty.
    """
    known = ", ".join(f"{split} ({facts.num_examples})" for split, facts in info.splits.items())
    key, fix = f"data.{name}_split", f"set a split string over {known}"
    try:
        instructions = info.splits[spec].file_instructions
    except Exception as error:  # KeyError, ValueError and AssertionError, by the kind of mistake
        raise DataError(f"{info.name} has no such split ({_first_line(error)})", key=key, value=spec, fix=fix) from None
    shards = [Shard(str(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions if i.take]
    if not shards:
        raise DataError(f"is empty in {info.name}", key=key, value=spec, fix=fix)
    return shards


def _check_overlaps(splits: dict[str, Split], specs: dict[str, str]) -> list[str]:
    for name in ("validation", "test"):
        if name in splits and (common := overlap(splits["train"], splits[name])):
            problem = f"has {common} examples in common with data.train_split={specs['train']}"
            fix = "set a split that is not trained on"
            raise DataError(problem, key=f"data.{name}_split", value=specs[name], fix=fix)
    if "validation" in splits and "test" in splits and (common := overlap(splits["validation"], splits["test"])):
        return [f"validation and test have {common} examples in common: the test score also chose the checkpoint"]
    return []


def carve(train: Split, fractions: dict[str, float], seed: int) -> tuple[dict[str, Split], list[str]]:
    """Divide the training records: the new splits are their tail, or a stratified draw if the tail is no fair sample.

    Returns:
        The new splits and what is left of `train`; and notes.
    """
    count, sizes = train.count, split_sizes(train.count, fractions)
    classes = np.bincount(train.labels)

    def cut(order: np.ndarray) -> dict[str, np.ndarray]:
        """Cut the splits off the end of an order of the records, each as ascending positions."""
        stop, cuts = count, {}
        for name in reversed(fractions):
            cuts[name] = np.sort(order[stop - sizes[name] : stop])
            stop -= sizes[name]
        return cuts | {"train": np.sort(order[:stop])}

    def is_unfair(name: str, positions: np.ndarray) -> bool:
        """True if a class is absent that a fair sample lacks once in twenty draws (three expected examples or more)."""
        absent = np.bincount(train.labels[positions], minlength=len(classes)) == 0
        expected = classes * len(positions) / count
        return bool((absent & ((expected >= 3) | ((name == "train") & (classes > 0)))).any())

    cuts, notes = cut(np.arange(count)), []
    if any(is_unfair(name, positions) for name, positions in cuts.items()):
        rank = (class_rank(train.labels, seed) + 0.5) / classes[train.labels]  # in 0..1 within each class
        cuts = cut(np.argsort(rank, kind="stable"))
        notes.append(
            f"the tail of the training records lacks classes (they are sorted), so {' and '.join(fractions)} "
            f"{'was' if len(fractions) == 1 else 'were'} drawn record by record with data.split_seed={seed}; shards "
            "written by python -m trainer.prepare read faster, or set data.validation_split"
        )
    return {name: replace(take(train, positions), name=name) for name, positions in cuts.items()}, notes
