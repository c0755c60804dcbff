"""Datasets that TFDS prepared: by name, or as a folder that holds one version."""

import difflib
import os
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Data
from trainer.data.splits import Note, RawData, RecordSource, overlap, part_sizes, read_shards, split_of, take, turns
from trainer.errors import DataError
from trainer.monitoring.health import health
from trainer.types import Shard, Split


def open_tfds(data: Data, cache_dir: Path, note: Note, arriving: bool = False) -> RawData:
    """Resolve split strings to record ranges and read their labels.

    A null validation_split means the dataset's own "validation" where there is one, else the last
    validation_fraction of the training records (one contiguous piece, so that every pass reads only what it needs);
    where that piece lacks a class, as in records sorted by class, a stratified draw by split_seed instead. A null
    test_split means "test" where there is one, else test_fraction of the training records in the same way.

    Raises:
        DataError: the dataset is not there, not in TFRecords, or has no such split, image or label.
    """
    builder = _folder(os.path.expanduser(data.root)) if data.root else _named(data)
    info = builder.info
    kind = info.file_format.value if info.file_format else "tfrecord"
    if kind != "tfrecord":
        advice = "only tfrecord is read: prepare it with file_format=tfrecord"
        raise DataError(f"{info.name} is stored as {kind}, and {advice}")
    class_names, group_names = _class_names(info, data), _group_names(info, data)
    specs = split_specs(data, info.splits)
    ranges = {name: resolve_split(info, spec, name) for name, spec in specs.items()}
    classes = len(class_names)
    source = RecordSource(data.image_field, data.label_field, classes, cache_dir, data.on_error, note, arriving)
    paths = sorted({shard.path for shards in ranges.values() for shard in shards})
    labels, facts, skipped = read_shards(paths, source)
    splits = {name: split_of(name, shards, labels, source) for name, shards in ranges.items()}
    notes = _check_overlaps(splits, specs)
    if fractions := missing_fractions(data, splits):
        carved, how = carve(splits["train"], fractions, data.split_seed)
        splits |= carved
        notes += how
    return RawData(info.name, class_names, splits, facts, skipped, notes, group_names)


def split_specs(data: Data, own: Container[str]) -> dict[str, str]:
    """Split strings by split; a null one means the dataset's own split of that name, where `own` has it."""
    specs = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    return {name: name if spec is None else spec for name, spec in specs.items() if spec is not None or name in own}


def missing_fractions(data: Data, splits: Container[str]) -> dict[str, float]:
    """Fractions of the training records that become the splits which are not in `splits`."""
    fractions = {"validation": data.validation_fraction, "test": data.test_fraction}
    return {name: fraction for name, fraction in fractions.items() if name not in splits and fraction > 0}


def _folder(root: str) -> Any:
    import tensorflow_datasets as tfds

    if not os.path.exists(os.path.join(root, "dataset_info.json")):
        below = sorted(str(path.parent) for path in Path(root).glob("*/dataset_info.json"))
        below += sorted(str(path.parent) for path in Path(root).glob("*/*/dataset_info.json"))
        hint = f"did you mean data.root={below[0]}?" if below else "write one with python -m trainer.prepare"
        raise DataError(f"data.root={root} holds no prepared dataset (no dataset_info.json in it): {hint}")
    try:
        return tfds.builder_from_directory(root)
    except Exception as error:  # TFDS raises what its JSON and protocol readers raise
        raise DataError(f"data.root={root} is no TFDS folder that can be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _named(data: Data) -> Any:
    import tensorflow_datasets as tfds

    assert data.name
    where = os.path.expanduser(data.data_dir) if data.data_dir else None
    try:
        builder = tfds.builder(data.name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)  # the others are asked for over the network
        close = difflib.get_close_matches(data.name.split("/")[0].split(":")[0], known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise DataError(
            f"TFDS knows no dataset {data.name!r}, and none of that name is prepared in "
            f"{where or tfds.core.constants.DATA_DIR}.{hint}"
        ) from None
    except Exception as error:  # a wrong version or config: TFDS raises AssertionError, ValueError and others
        raise DataError(f"TFDS cannot open data.name={data.name}: {_first_line(error)}") from None
    if not builder.info.splits:
        if not data.download:
            raise DataError(
                f"the dataset {data.name} is not prepared in {where or tfds.core.constants.DATA_DIR}: "
                "set data.download=true to download it, or data.data_dir to where it lies"
            )
        try:
            with health.waiting_for(f"TFDS, which downloads and prepares {data.name}"):  # it says nothing for hours
                builder.download_and_prepare(file_format="tfrecord")
        except Exception as error:  # network, checksum, missing extra packages, disk: all end here
            raise DataError(f"TFDS cannot download and prepare {data.name}: {_first_line(error)}") from None
    return builder


def _class_names(info: Any, data: Data) -> tuple[str, ...]:
    """The names of the label.

    Raises:
        DataError: the features of image and label are absent or of other kinds.
    """
    import tensorflow_datasets as tfds

    features = dict(info.features) if hasattr(info.features, "items") else {}
    shown = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
    wanted = (("image", data.image_field, tfds.features.Image), ("label", data.label_field, tfds.features.ClassLabel))
    for kind, name, expected in wanted:
        feature = features.get(name)
        named = kind == "label" and data.class_names and isinstance(feature, tfds.features.Scalar)
        if isinstance(feature, expected) or named:
            continue
        fitting = [n for n, f in features.items() if isinstance(f, expected)]
        advice = f"set data.{kind}_field={fitting[0]}" if fitting else f"no feature of it is a {expected.__name__}"
        what = "has no feature" if feature is None else f"has no {expected.__name__} as"
        raise DataError(f"{info.name} {what} {name!r} (it has {shown}): {advice}")
    return data.class_names or tuple(features[data.label_field].names)


def _group_names(info: Any, data: Data) -> tuple[str, ...] | None:
    """The names of the feature that groups examples, where it has some."""
    if not data.group_field:
        return None
    features = dict(info.features)
    feature = features.get(data.group_field)
    if feature is None:
        close = difflib.get_close_matches(data.group_field, list(features), 1)
        hint = f". Did you mean {close[0]}?" if close else ""
        raise DataError(
            f"{info.name} has no feature {data.group_field!r} for data.group_field (it has "
            f"{', '.join(sorted(features))}; python -m trainer.prepare keeps image and label, and a group field "
            f"that it is told of){hint}"
        )
    return tuple(getattr(feature, "names", None) or ()) or None


def resolve_split(info: Any, spec: str, part: str) -> list[Shard]:
    """ "train[:80%]" -> the ranges of its shards, by TFDS's own rules.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    try:
        instructions = info.splits[spec].file_instructions
    except Exception as error:  # KeyError, ValueError and AssertionError, by the kind of mistake
        known = ", ".join(f"{name} ({split.num_examples})" for name, split in info.splits.items())
        raise DataError(
            f"data.{part}_split={spec}: {info.name} has no such split ({_first_line(error)}); it has {known}"
        ) from None
    shards = [Shard(str(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions if i.take]
    if not shards:
        raise DataError(f"data.{part}_split={spec} of {info.name} is empty")
    return shards


def _check_overlaps(splits: dict[str, Split], specs: dict[str, str]) -> list[str]:
    for name in ("validation", "test"):
        if name in splits and (shared := overlap(splits["train"], splits[name])):
            raise DataError(
                f"data.train_split={specs['train']} and data.{name}_split={specs[name]} share {shared} examples: "
                "what is trained on cannot be scored"
            )
    if "validation" in splits and "test" in splits and (shared := overlap(splits["validation"], splits["test"])):
        return [f"validation and test share {shared} examples: the test score also chose the checkpoint"]
    return []


def carve(train: Split, fractions: dict[str, float], seed: int) -> tuple[dict[str, Split], list[str]]:
    """Take parts out of the training records: the tail where it is a fair sample, else a stratified draw.

    Returns:
        The new splits, `train` among them, and what is worth a note.
    """
    count, sizes = train.count, part_sizes(train.count, fractions)
    classes = np.bincount(train.labels)

    def cut(order: np.ndarray) -> dict[str, np.ndarray]:
        """The parts from the end of an order of the records on, each as ascending positions."""
        stop, parts = count, {}
        for name in reversed(fractions):
            parts[name] = np.sort(order[stop - sizes[name] : stop])
            stop -= sizes[name]
        return parts | {"train": np.sort(order[:stop])}

    parts = cut(np.arange(count))
    # A fair sample that would hold three of a class lacks all of them once in twenty draws.
    expected = {name: classes * len(positions) / count for name, positions in parts.items()}
    unfair = [
        name
        for name, positions in parts.items()
        if ((np.bincount(train.labels[positions], minlength=len(classes)) == 0) & (expected[name] >= 3)).any()
        or (name == "train" and set(train.labels.tolist()) - set(train.labels[positions].tolist()))
    ]
    notes = []
    if unfair:
        turn = (turns(train.labels, seed) + 0.5) / classes[train.labels]  # in 0..1 within each class
        parts = cut(np.argsort(turn, kind="stable"))
        notes.append(
            f"the tail of the training records lacks classes (they lie sorted), so {' and '.join(fractions)} "
            f"{'was' if len(fractions) == 1 else 'were'} drawn record by record with data.split_seed={seed}; shards "
            "written by python -m trainer.prepare read faster, or set data.validation_split"
        )
    return {name: replace(take(train, positions), name=name) for name, positions in parts.items()}, notes
