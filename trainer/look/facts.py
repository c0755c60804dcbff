"""Examine a dataset: counts per class and split, sizes and formats of images, duplicates, unreadable files."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from trainer.config.schema import Data, RunConfig
from trainer.data.decoding import Resize
from trainer.data.images import Pixels, describe_example
from trainer.data.open import OpenedData
from trainer.data.remote import replace_local_paths
from trainer.evaluation.duplicates import find_duplicates
from trainer.look.headers import Header, Headers, add_digests, group_copies, read_headers
from trainer.look.sample import choose_sample, concatenate_splits
from trainer.models.backbones import find_backbone
from trainer.monitoring.health import health
from trainer.names import escape_unprintable
from trainer.report.build import allocate_comparisons, read_thumbnails
from trainer.types import Orientation, Split

# Height and width, in pixels, at which images are compared. At this size, a JPEG of 256 pixels or more is decoded at an
# eighth of its size, which is fast.
COMPARED_SIDE = 32
MAX_SIZES = 8  # number of the most frequent sizes that are listed
_MAX_GROUPS = 50  # maximum number of values of a group field
_MAX_FIELDS = 20  # maximum number of group fields
# Ranges of aspect ratios, width / height: name -> lower bound. The upper bound is the next lower bound.
ASPECTS = {
    "narrower than 1:2": 0.0, "1:2 to 3:4": 0.5, "3:4 to square": 0.75, "square": 0.98, "square to 4:3": 1.02,
    "4:3 to 16:9": 1.334, "16:9 to 2:1": 1.778, "wider than 2:1": 2.0001,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of a run that the suggestions depend on."""

    source: str
    image_size: int  # pixels
    sizes: tuple[int, ...]  # image sizes for which there are weights, pixels; () if all sizes have the same weights
    min_size: int  # smallest image size of the backbone, pixels
    resize: str
    orientation: Orientation
    on_error: str
    class_weights: bool  # whether the classes have weights
    augmented: bool  # whether training images are augmented
    validation_fraction: float
    test_fraction: float
    group_field: str | None
    is_trial: bool  # whether debug.* or data.labels_per_class limits the examples


@dataclass(frozen=True)
class Facts:
    """The content of look.json, except for the suggestions.

    `counts`, `files` and `skipped` describe the whole dataset. All other statistics describe only the examined images.
    """

    name: str  # name of the dataset
    settings: Settings
    class_names: tuple[str, ...]
    counts: dict[str, list[int]]  # split -> number of examples per class
    from_train: tuple[str, ...]  # splits that are set aside from the training examples
    files: int  # number of record files of all splits; 0 for image files
    examined: dict[str, int]  # split -> number of examined images
    formats: dict[str, int]  # format, such as JPEG -> number of images
    modes: dict[str, int]  # color mode -> number of images
    orientations: dict[int, int]  # EXIF orientation -> number of images
    width: dict[str, float]  # min, p5, median, p95 and max of the upright images, pixels; {} if no size is known
    height: dict[str, float]
    shorter_side: dict[str, float]
    elongation: dict[str, float]  # min, p5, ... of longer / shorter side
    aspects: dict[str, int]  # name in `ASPECTS` -> number of images
    frequent_sizes: list[tuple[int, int, int]]  # width, height, number of images
    copies: dict[str, int]  # number of exact copies, and of their groups in total, across splits, with several labels
    duplicates: dict[str, Any]  # as in report.json, but with all groups; "exact": equal byte for byte
    skipped: tuple[str, ...]  # files and records that could not be read when the data was opened, each with the reason
    undecodable: tuple[str, ...]  # examined images that cannot be decoded, each with the reason
    notes: tuple[str, ...]  # `Dataset.notes` except for those about skipped files
    group_fields: dict[str, int]  # field of the records whose values may be groups -> number of distinct values


def summarize(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return min, p5, median, p95 and max of the values, or {} if there are no values."""
    names = ("min", "p5", "median", "p95", "max")
    return dict(zip(names, np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).tolist(), strict=True)) if len(values) else {}


def count_aspects(ratios: np.ndarray) -> dict[str, int]:
    """Count the images in each range of `ASPECTS`. `ratios`: width / height, float [n]."""
    indices = np.searchsorted(list(ASPECTS.values()), ratios, side="right") - 1
    return dict(zip(ASPECTS, np.bincount(indices, minlength=len(ASPECTS)).tolist(), strict=True))


def find_splits_from_train(data: Data, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return the splits other than train whose sizes depend on data.validation_fraction or data.test_fraction.

    Such a split has files in the training split's folders, or records in its shards. With data.source=tfrecords, it is
    every split for which data.validation_split or data.test_split is not set.
    """

    def sources(split: Split) -> set[str]:
        return {os.path.dirname(path) for path in split.files} or {shard.path for shard in split.shards}

    if data.source == "digits":
        return ()
    explicit_splits = {"validation": data.validation_split, "test": data.test_split}
    candidates = (name for name in splits if name != "train" and explicit_splits[name] in (None, "none"))
    train = sources(splits["train"])
    return tuple(name for name in candidates if data.source == "tfrecords" or sources(splits[name]) & train)


def measure_sizes(headers: Iterable[Header], orientation: Orientation) -> dict[str, Any]:
    """Summarize the sizes of images, after turning them upright if `orientation` is "exif".

    Returns:
        The fields `width`, `height`, `shorter_side`, `elongation`, `aspects` and `frequent_sizes` of `Facts`.
    """
    sizes = [
        (header.height, header.width)
        if orientation == "exif" and header.orientation >= 5
        else (header.width, header.height)
        for header in headers
        if header.format and min(header.width, header.height) > 0
    ]
    width, height = np.array(sizes, np.int64).reshape(-1, 2).T
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    return {
        "width": summarize(width),
        "height": summarize(height),
        "shorter_side": summarize(shorter),
        "elongation": summarize(longer / np.maximum(shorter, 1)),
        "aspects": count_aspects(width / np.maximum(height, 1)),
        "frequent_sizes": [(w, h, count) for (w, h), count in Counter(sizes).most_common(MAX_SIZES)],
    }


def find_group_fields(headers: Iterable[Headers], used: Sequence[str]) -> dict[str, int]:
    """Return the fields of records that may be suitable as data.group_field, with their numbers of distinct values.

    Such a field has 2 to `_MAX_GROUPS` distinct values. Each value occurs at least twice, and on average at least ten
    times. The field's name is printable, so that it can be typed. At most `_MAX_FIELDS` fields are returned.

    Args:
        headers: the headers of each split.
        used: names of the fields that contain the image, the label and the configured group.
    """
    value_counts: dict[str, Counter[bytes | int]] = {}
    for split_headers in headers:
        for name, values in split_headers.fields.items():
            value_counts.setdefault(name, Counter()).update(values)
    num_values_by_field = {
        name: len(values)
        for name, values in sorted(value_counts.items())
        if name not in used and escape_unprintable(name) == name and 2 <= len(values) <= _MAX_GROUPS
        if min(values.values()) > 1 and sum(values.values()) >= 10 * len(values)
    }
    return dict(list(num_values_by_field.items())[:_MAX_FIELDS])


def read_settings(config: RunConfig) -> Settings:
    """Return the settings that the suggestions depend on."""
    backbone = find_backbone(config.model.backbone)
    return Settings(
        source=config.data.source,
        image_size=config.model.image_size or backbone.default_size,
        sizes=backbone.weight_sizes,
        min_size=backbone.min_size,
        resize=config.model.resize,
        orientation=config.data.orientation,
        on_error=config.data.on_error,
        class_weights=config.training.class_weights != "none",
        augmented=config.augmentation.active,
        validation_fraction=config.data.validation_fraction,
        test_fraction=config.data.test_fraction,
        group_field=config.data.group_field,
        is_trial=bool(config.example_limit or config.data.labels_per_class),
    )


def open_pixels(config: RunConfig, data: OpenedData, side: int, stretch: bool = False) -> tuple[Pixels, dict[str, int]]:
    """Open the images of all splits as one split, because building one pipeline takes less time than several.

    Args:
        side: height and width of the decoded images, pixels. They are not cached, and unreadable images are skipped.
        stretch: stretch the images, so that all of each is visible; the configured resize may crop them.

    Returns:
        The images, and the index of the first image of each split.
    """
    split, starts = concatenate_splits(data.dataset.splits)
    resize: Resize = "stretch" if stretch else config.model.resize
    return Pixels(split, side, resize, "skip", config.runtime.data_threads, shards=data.shards), starts


def _find_duplicates(
    config: RunConfig, data: OpenedData, sample: Mapping[str, np.ndarray], headers: Mapping[str, Headers]
) -> tuple[dict[str, Any], list[str]]:
    """Compare the examined images, and return `Facts.duplicates` and `Facts.undecodable`."""
    dataset = data.dataset
    pixels, starts = open_pixels(config, data, COMPARED_SIDE, stretch=True)
    positions = np.concatenate([indices + starts[name] for name, indices in sample.items()])
    all_thumbnails = read_thumbnails(pixels, positions, health.record_progress)
    unreadable = pixels.unreadable
    reasons = (f"{describe_example(pixels, position)}: {unreadable[position]}" for position in sorted(unreadable))
    undecodable = [replace_local_paths(reason, data.addresses) for reason in reasons]
    thumbnails: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (name, indices), start in zip(sample.items(), accumulate(map(len, sample.values()), initial=0), strict=False):
        readable = ~np.isin(indices + starts[name], list(unreadable))
        thumbnails[name] = indices[readable], all_thumbnails[start : start + len(indices)][readable]
    labels = {name: split.labels for name, split in dataset.splits.items()}

    def describe(split: str, index: int) -> dict[str, Any]:
        header = headers[split].by_index.get(index)
        file = replace_local_paths(dataset.splits[split].name_of(index), data.addresses)
        label = dataset.class_names[labels[split][index]]
        return {
            "split": split, "index": index, "file": file, "label": label, "digest": header.digest if header else "",
        }  # fmt: skip

    duplicates = find_duplicates(thumbnails, labels, describe, list_all=True)
    for group in duplicates["groups"]:
        digests = {member.pop("digest") for member in group["members"]}
        group["exact"] = len(digests) == 1 and digests != {""}
    return duplicates, undecodable


def _count_copies(groups: Sequence[Sequence[tuple[str, int]]], splits: Mapping[str, Split]) -> dict[str, int]:
    """Count the exact copies and their groups. `groups` has the (split, index) of each example in a group."""
    spans_splits = [len({name for name, _ in group}) > 1 for group in groups]
    has_several_labels = [len({int(splits[name].labels[index]) for name, index in group}) > 1 for group in groups]
    num_images = sum(map(len, groups))
    return {
        "images": num_images, "groups": len(groups), "across_splits": sum(spans_splits),
        "different_labels": sum(has_several_labels),
    }  # fmt: skip


def gather_facts(config: RunConfig, data: OpenedData, limit: int) -> tuple[Facts, dict[str, np.ndarray]]:
    """Examine a sample of the images of a dataset.

    Args:
        config: the run's configuration, with its own data.on_error.
        data: the dataset, opened with data.on_error=skip.
        limit: maximum number of images to examine; at least one per split is examined.

    Returns:
        The facts, and the indices of the examined images, int64 [k], by split.

    Raises:
        DataError: a shard is missing.
        Interrupted: a bucket does not respond.
    """
    dataset, splits = data.dataset, data.dataset.splits
    settings = read_settings(config)
    limits = allocate_comparisons({name: split.count for name, split in splits.items()}, max(limit, len(splits)))
    sample = {name: choose_sample(split, limits[name], config.seed) for name, split in splits.items()}
    headers = {name: read_headers(splits[name], indices, data.shards) for name, indices in sample.items()}
    add_digests(headers, splits)
    duplicates, undecodable = _find_duplicates(config, data, sample, headers)
    all_headers = list(chain.from_iterable(split_headers.by_index.values() for split_headers in headers.values()))
    used_fields = (config.data.image_field, config.data.label_field, config.data.group_field or "")
    facts = Facts(
        name=dataset.name,
        settings=settings,
        class_names=dataset.class_names,
        counts={
            name: np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()
            for name, split in splits.items()
        },
        from_train=find_splits_from_train(config.data, splits),
        files=len({shard.path for split in splits.values() for shard in split.shards}),
        examined={name: len(indices) for name, indices in sample.items()},
        formats=dict(Counter(escape_unprintable(h.format or "unknown") for h in all_headers).most_common()),
        modes=dict(Counter(h.mode or "unknown" for h in all_headers).most_common()),
        orientations=dict(sorted(Counter(h.orientation for h in all_headers).items())),
        **measure_sizes(all_headers, settings.orientation),
        copies=_count_copies(group_copies(headers), splits),
        duplicates=duplicates,
        skipped=dataset.skipped,
        undecodable=tuple(undecodable),
        # Without the notes about skipped files: `skipped` lists them, and the run may have data.on_error=fail.
        notes=tuple(n for n in dataset.notes if "skipped (data.on_error" not in n and "left after skipping" not in n),
        group_fields=find_group_fields(headers.values(), used_fields) if dataset.splits["train"].shards else {},
    )
    return facts, sample
