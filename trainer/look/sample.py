"""Choose the images of a dataset to examine, and those to show. The choice depends only on the labels and the seed."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np

from trainer.data.splits import rank_within_classes
from trainer.types import Split

PER_CLASS, MAX_SHOWN = 6, 400  # maximum number of images on the page, per class and in total
MAX_CLASSES = 1_000  # maximum number of classes with images on the page; the rarest ones if there are more


def choose_sample(split: Split, limit: int, seed: int) -> np.ndarray:
    """Return the indices of at most `limit` examples, int64 [k], increasing.

    Files are chosen at even spacing in the split's order. Records are chosen at even spacing in as few random shards as
    possible, because a whole shard is fetched from a bucket, or indexed, to read one record.
    """
    if split.count <= limit:
        return np.arange(split.count)
    candidates = np.arange(split.count)
    if split.shards:
        counts = [shard.stop - shard.start for shard in split.shards]
        ranges = np.split(candidates, np.cumsum(counts)[:-1])
        selected_ranges: list[np.ndarray] = []
        for shard in np.random.default_rng([seed, split.count]).permutation(len(ranges)):
            selected_ranges.append(ranges[shard])
            if sum(map(len, selected_ranges)) >= limit:
                break
        candidates = np.sort(np.concatenate(selected_ranges))
    return candidates[np.linspace(0, len(candidates) - 1, limit).astype(np.int64)]


def concatenate(splits: Mapping[str, Split]) -> tuple[Split, dict[str, int]]:
    """Join splits into one split. Return it, and split name -> index in it of the split's first example."""
    members = list(splits.values())
    joined = replace(
        members[0],
        name="all",
        labels=np.concatenate([split.labels for split in members]),
        files=tuple(chain.from_iterable(split.files for split in members)),
        shards=tuple(chain.from_iterable(split.shards for split in members)),
        groups=None,
    )
    return joined, dict(zip(splits, accumulate((split.count for split in members), initial=0), strict=False))


def choose_examples(
    labels: np.ndarray, sample: np.ndarray, seed: int, only_sample: bool = False
) -> dict[int, np.ndarray]:
    """Choose random examples of each class to show.

    At most `PER_CLASS` examples per class and about `MAX_SHOWN` in total are chosen, but at least one for each of the
    `MAX_CLASSES` rarest classes. Examples of `sample` are preferred.

    Args:
        labels: class index of each example, int32 [n].
        sample: indices of the examined examples, int64 [s].
        only_sample: choose examples outside `sample` only for classes without an example in `sample`.

    Returns:
        Class index -> example indices, int64 [k], increasing.
    """
    counts = np.bincount(labels)
    nonempty_classes = np.flatnonzero(counts)
    rarest = nonempty_classes[np.argsort(counts[nonempty_classes], kind="stable")][:MAX_CLASSES]
    per_class = int(np.clip(MAX_SHOWN // max(len(rarest), 1), 1, PER_CLASS))
    not_in_sample = np.ones(len(labels), bool)
    not_in_sample[sample] = False
    order = np.lexsort((rank_within_classes(labels, seed), not_in_sample, labels))
    starts = np.cumsum(counts) - counts
    limits = np.maximum(np.bincount(labels[sample], minlength=len(counts)), 1) if only_sample else counts
    return {int(k): np.sort(order[starts[k] : starts[k] + min(per_class, limits[k])]) for k in sorted(rarest.tolist())}
