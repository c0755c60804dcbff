"""Choose the images of a dataset to examine, and those to show. The same data, limit and seed give the same choice."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np

from trainer.data.splits import rank_within_classes
from trainer.types import Split

# Maximum number of examples on the page, per class and in total. If there are more than `MAX_SHOWN` classes, the page
# has one example of each of the rarest ones.
PER_CLASS, MAX_SHOWN = 6, 400


def choose_sample(split: Split, limit: int, seed: int) -> np.ndarray:
    """Return the indices of at most `limit` examples, int64 [k], increasing.

    Image files are chosen at even spacing in the split's order. Records are chosen at even spacing in a few shards,
    because a whole shard is fetched from a bucket, or indexed, to read one record. These shards are drawn in random
    order until they have at least `limit` records. `seed` has no other effect.
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


def concatenate_splits(splits: Mapping[str, Split]) -> tuple[Split, dict[str, int]]:
    """Join splits of one dataset into one split, without `groups`.

    Returns:
        The joined split, and a dict from split name to the index of that split's first example in the joined split.
    """
    parts = list(splits.values())
    joined = replace(
        parts[0],
        name="all",
        labels=np.concatenate([split.labels for split in parts]),
        files=tuple(chain.from_iterable(split.files for split in parts)),
        shards=tuple(chain.from_iterable(split.shards for split in parts)),
        groups=None,
    )
    # Not strict, because the last item of `accumulate` is the total.
    return joined, dict(zip(splits, accumulate((split.count for split in parts), initial=0), strict=False))


def choose_examples(
    labels: np.ndarray, sample: np.ndarray, seed: int, only_sample: bool = False
) -> dict[int, np.ndarray]:
    """Choose random examples to show of each class that has examples, but only of the `MAX_SHOWN` rarest ones.

    The number per class is at most `PER_CLASS`, and smaller if the total would exceed `MAX_SHOWN`, but at least one.
    Examples of `sample` are preferred.

    Args:
        labels: class index of each example, int32 [n].
        sample: indices of the examined examples, int64 [s].
        only_sample: choose an example outside `sample` only for a class without one in `sample`, and then just one.

    Returns:
        A dict from class index to example indices, int64 [k], increasing.
    """
    counts = np.bincount(labels)
    nonempty_classes = np.flatnonzero(counts)
    rarest = nonempty_classes[np.argsort(counts[nonempty_classes], kind="stable")][:MAX_SHOWN]
    per_class = int(np.clip(MAX_SHOWN // max(len(rarest), 1), 1, PER_CLASS))
    not_in_sample = np.ones(len(labels), bool)
    not_in_sample[sample] = False
    order = np.lexsort((rank_within_classes(labels, seed), not_in_sample, labels))
    starts = np.cumsum(counts) - counts
    limits = np.maximum(np.bincount(labels[sample], minlength=len(counts)), 1) if only_sample else counts
    return {int(k): np.sort(order[starts[k] : starts[k] + min(per_class, limits[k])]) for k in sorted(rarest.tolist())}
