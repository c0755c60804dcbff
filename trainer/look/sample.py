"""Choose the images of a split that are examined and shown, as a function of the labels and the seed."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np

from trainer.data.splits import rank_within_classes
from trainer.types import Split

PER_CLASS, MAX_SHOWN = 6, 400  # images of a class on the page, and of all classes together
MAX_CLASSES = 1_000  # with images on the page; of more classes, the rarest


def choose_sample(split: Split, limit: int, seed: int) -> np.ndarray:
    """Return the indices of at most `limit` examples, int64 [k], increasing.

    Files are evenly spaced in the order of the split. Records are evenly spaced in random shards, as few as have
    enough, since reading one record reads the headers of its whole shard, or fetches it from a bucket.
    """
    if split.count <= limit:
        return np.arange(split.count)
    available = np.arange(split.count)
    if split.shards:
        counts = [shard.stop - shard.start for shard in split.shards]
        ranges = np.split(available, np.cumsum(counts)[:-1])
        chosen: list[np.ndarray] = []
        for shard in np.random.default_rng([seed, split.count]).permutation(len(ranges)):
            chosen.append(ranges[shard])
            if sum(map(len, chosen)) >= limit:
                break
        available = np.sort(np.concatenate(chosen))
    return available[np.linspace(0, len(available) - 1, limit).astype(np.int64)]


def concatenate(splits: Mapping[str, Split]) -> tuple[Split, dict[str, int]]:
    """Return one split of the examples of all splits, and the index at which each of these begins."""
    parts = list(splits.values())
    whole = replace(
        parts[0],
        name="all",
        labels=np.concatenate([part.labels for part in parts]),
        files=tuple(chain.from_iterable(part.files for part in parts)),
        shards=tuple(chain.from_iterable(part.shards for part in parts)),
        groups=None,
    )
    return whole, dict(zip(splits, accumulate((part.count for part in parts), initial=0), strict=False))


def choose_examples(
    labels: np.ndarray, sample: np.ndarray, seed: int, only_sample: bool = False
) -> dict[int, np.ndarray]:
    """Return the indices of the examples of each class to show, int64 [k], increasing, by class index.

    They are random examples of the class, those of `sample` before others; with `only_sample` others only of a class
    that has none there. There are at most `PER_CLASS` of a class and about `MAX_SHOWN` of all, but at least one of each
    of the `MAX_CLASSES` rarest classes.
    """
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    rarest = present[np.argsort(counts[present], kind="stable")][:MAX_CLASSES]
    per_class = int(np.clip(MAX_SHOWN // max(len(rarest), 1), 1, PER_CLASS))
    outside = np.ones(len(labels), bool)
    outside[sample] = False
    order = np.lexsort((rank_within_classes(labels, seed), outside, labels))
    starts = np.cumsum(counts) - counts
    available = np.maximum(np.bincount(labels[sample], minlength=len(counts)), 1) if only_sample else counts
    return {
        int(k): np.sort(order[starts[k] : starts[k] + min(per_class, available[k])]) for k in sorted(rarest.tolist())
    }
