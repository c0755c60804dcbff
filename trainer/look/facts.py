"""The facts about a dataset that the page and the suggestions state: counts, sizes, formats, duplicates, faults."""

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
from trainer.data.remote import with_addresses
from trainer.evaluation.duplicates import find_duplicates
from trainer.look.headers import Header, Headers, add_digests, group_copies, read_headers
from trainer.look.sample import choose_sample, concatenate
from trainer.models.backbones import find_backbone
from trainer.monitoring.health import health
from trainer.names import escape_unprintable
from trainer.report.build import allocate_comparisons, read_thumbnails
from trainer.types import Orientation, Split

COMPARED_SIDE = 32  # pixels of the images that are compared; a JPEG of 256 or more is decoded at an eighth of its size
MAX_SIZES = 8  # most frequent sizes that are listed
_MAX_GROUPS, _MAX_FIELDS = 50, 20  # distinct values of a field that may name groups; such fields that are listed
# Aspect ratios, width / height: name -> lower bound.
ASPECTS = {
    "narrower than 1:2": 0.0, "1:2 to 3:4": 0.5, "3:4 to square": 0.75, "square": 0.98, "square to 4:3": 1.02,
    "4:3 to 16:9": 1.334, "16:9 to 2:1": 1.778, "wider than 2:1": 2.0001,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of a run on which the suggestions depend."""

    source: str
    image_size: int  # pixels
    sizes: tuple[int, ...]  # image sides with weights of their own; () if all sizes have the same
    min_size: int  # pixels, of the backbone
    resize: str
    orientation: Orientation
    on_error: str
    class_weights: bool  # whether there are any
    augmented: bool
    validation_fraction: float
    test_fraction: float
    group_field: str | None
    is_trial: bool  # debug.* limits the examples


@dataclass(frozen=True)
class Facts:
    """What is known about a dataset: `look.json`. Counts are of all examples, all else is of the examined ones."""

    name: str
    settings: Settings
    class_names: tuple[str, ...]
    counts: dict[str, list[int]]  # split -> examples per class
    from_train: tuple[str, ...]  # splits that are a fraction of the training examples
    files: int  # record files of all splits; 0 for image files
    examined: dict[str, int]  # split -> number of examined images
    formats: dict[str, int]
    modes: dict[str, int]
    orientations: dict[int, int]  # EXIF orientation -> images
    width: dict[str, float]  # upright; min, p5, median, p95 and max, {} if nothing is known
    height: dict[str, float]
    shorter_side: dict[str, float]
    elongation: dict[str, float]  # longer / shorter side
    aspects: dict[str, int]  # name in `ASPECTS` -> images
    frequent_sizes: list[tuple[int, int, int]]  # width, height, images
    copies: dict[str, int]  # images that are equal byte for byte: images, groups, across_splits, different_labels
    duplicates: dict[str, Any]  # as in report.json, with all groups
    skipped: tuple[str, ...]  # files and records that are detected as unreadable when the data is opened, with reasons
    undecodable: tuple[str, ...]  # examined images that cannot be decoded, with reasons
    notes: tuple[str, ...]
    group_fields: dict[str, int]  # field of the records -> distinct values, if these may be groups


def summarize(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return min, p5, median, p95 and max of values, {} if there are none."""
    names = ("min", "p5", "median", "p95", "max")
    return dict(zip(names, np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).tolist(), strict=True)) if len(values) else {}


def count_aspects(ratios: np.ndarray) -> dict[str, int]:
    """Count the aspect ratios, width / height, in each of `ASPECTS`."""
    indices = np.searchsorted(list(ASPECTS.values()), ratios, side="right") - 1
    return dict(zip(ASPECTS, np.bincount(indices, minlength=len(ASPECTS)).tolist(), strict=True))


def find_splits_from_train(data: Data, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return the splits whose sizes follow data.validation_fraction and data.test_fraction.

    Their files are in the folders, or their records in the shards, of the training split; data.pattern is always
    divided.
    """

    def sources(split: Split) -> set[str]:
        return {os.path.dirname(path) for path in split.files} or {shard.path for shard in split.shards}

    if data.source == "digits":
        return ()
    named = {"validation": data.validation_split, "test": data.test_split}
    others = (name for name in splits if name != "train" and named[name] in (None, "none"))
    train = sources(splits["train"])
    return tuple(name for name in others if data.source == "tfrecords" or sources(splits[name]) & train)


def measure_sizes(headers: Iterable[Header], orientation: Orientation) -> dict[str, Any]:
    """Summarize the sizes of images as training sees them; return these fields of `Facts`."""
    sides = [
        (h.height, h.width) if orientation == "exif" and h.orientation >= 5 else (h.width, h.height)
        for h in headers
        if h.format and min(h.width, h.height) > 0
    ]
    width, height = np.array(sides, np.int64).reshape(-1, 2).T
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    return {
        "width": summarize(width),
        "height": summarize(height),
        "shorter_side": summarize(shorter),
        "elongation": summarize(longer / np.maximum(shorter, 1)),
        "aspects": count_aspects(width / np.maximum(height, 1)),
        "frequent_sizes": [(w, h, count) for (w, h), count in Counter(sides).most_common(MAX_SIZES)],
    }


def find_group_fields(headers: Iterable[Headers], used: Sequence[str]) -> dict[str, int]:
    """Return the fields of records, other than `used`, whose values may be groups, with the number of distinct values.

    Of at most `_MAX_GROUPS` values each occurs at least twice, on average ten times. An unprintable name of a field
    cannot be typed.
    """
    totals: dict[str, Counter[bytes | int]] = {}
    for each in headers:
        for name, values in each.fields.items():
            totals.setdefault(name, Counter()).update(values)
    fields = {
        name: len(values)
        for name, values in sorted(totals.items())
        if name not in used and escape_unprintable(name) == name and 2 <= len(values) <= _MAX_GROUPS
        if min(values.values()) > 1 and sum(values.values()) >= 10 * len(values)
    }
    return dict(list(fields.items())[:_MAX_FIELDS])


def read_settings(config: RunConfig) -> Settings:
    """Return the settings on which the suggestions depend."""
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


def open_pixels(config: RunConfig, data: OpenedData, side: int, whole: bool = False) -> tuple[Pixels, dict[str, int]]:
    """Open the images of all splits at `side` pixels, not cached; also return the index at which each split begins.

    Unreadable images are skipped; `whole` ones are not cropped. One pipeline takes less time to build than several.
    """
    split, starts = concatenate(data.dataset.splits)
    resize: Resize = "stretch" if whole else config.model.resize
    return Pixels(split, side, resize, "skip", config.runtime.data_threads, shards=data.shards), starts


def _find_duplicates(
    config: RunConfig, data: OpenedData, sample: Mapping[str, np.ndarray], headers: Mapping[str, Headers]
) -> tuple[dict[str, Any], list[str]]:
    """Compare the examined images; return `Facts.duplicates` and `Facts.undecodable`."""
    dataset = data.dataset
    pixels, starts = open_pixels(config, data, COMPARED_SIDE, whole=True)
    positions = np.concatenate([indices + starts[name] for name, indices in sample.items()])
    small = read_thumbnails(pixels, positions, health.record_progress)
    bad = pixels.bad
    faults = (f"{describe_example(pixels, position)}: {bad[position]}" for position in sorted(bad))
    undecodable = [with_addresses(fault, data.addresses) for fault in faults]
    thumbnails: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (name, indices), start in zip(sample.items(), accumulate(map(len, sample.values()), initial=0), strict=False):
        readable = ~np.isin(indices + starts[name], list(bad))
        thumbnails[name] = indices[readable], small[start : start + len(indices)][readable]
    labels = {name: split.labels for name, split in dataset.splits.items()}

    def describe(split: str, index: int) -> dict[str, Any]:
        header = headers[split].by_index.get(index)
        file = with_addresses(dataset.splits[split].name_of(index), data.addresses)
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
    across = [len({name for name, _ in group}) > 1 for group in groups]
    several = [len({int(splits[name].labels[index]) for name, index in group}) > 1 for group in groups]
    images = sum(map(len, groups))
    return {"images": images, "groups": len(groups), "across_splits": sum(across), "different_labels": sum(several)}


def gather_facts(config: RunConfig, data: OpenedData, limit: int) -> tuple[Facts, dict[str, np.ndarray]]:
    """Examine at most `limit` images of a dataset; return the facts, and the indices of the examined images by split.

    `config.data.on_error` is that of the run; `data` was opened with "skip".

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
    flat = list(chain.from_iterable(each.by_index.values() for each in headers.values()))
    used = (config.data.image_field, config.data.label_field, config.data.group_field or "")
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
        formats=dict(Counter(escape_unprintable(h.format or "unknown") for h in flat).most_common()),
        modes=dict(Counter(h.mode or "unknown" for h in flat).most_common()),
        orientations=dict(sorted(Counter(h.orientation for h in flat).items())),
        **measure_sizes(flat, settings.orientation),
        copies=_count_copies(group_copies(headers), splits),
        duplicates=duplicates,
        skipped=dataset.skipped,
        undecodable=tuple(undecodable),
        # What is skipped is listed anyway, and in a run only with data.on_error=skip.
        notes=tuple(n for n in dataset.notes if "skipped (data.on_error" not in n and "left after skipping" not in n),
        group_fields=find_group_fields(headers.values(), used) if dataset.splits["train"].shards else {},
    )
    return facts, sample
