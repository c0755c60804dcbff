"""Detect duplicate images. Duplicates in two splits inflate the scores; different labels reveal a label error.

Each image is reduced to a 16 x 16 thumbnail and a perceptual hash of its low frequencies (Zauner 2010, "Implementation
and benchmarking of perceptual image hash functions"). Two images whose hashes differ in few bits are candidates. They
are duplicates if their thumbnails are highly correlated. This detects images that were rescaled, recompressed or
slightly brightened, but not crops or mirror images.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

THUMBNAIL_SIDE = 16  # pixels
MAX_HASH_DISTANCE = 6  # bits in which the hashes of two candidates may differ
MIN_CORRELATION = 0.99  # between the thumbnails of two duplicates
# An image is blank if the standard deviation of its thumbnail's values, 0 to 255, is below this. It is computed over
# all pixels and channels together, so that a gray area is blank, but not an area of one color such as red.
_MIN_STD = 3.0
_IMAGES_PER_BATCH = 8  # resized at a time; they fit the CPU cache, so they are resized 9 times as fast as 256 at a time
_HASH_PAIRS_PER_BATCH = 2_000_000  # compared at a time; their differing bits take 16 MB
_THUMBNAIL_PAIRS_PER_BATCH = 50_000  # compared at a time
MAX_DUPLICATE_PAIRS = 2_000_000  # the search stops here and groups are incomplete; video frames can have far more pairs
MAX_LISTED_GROUPS = 100  # in report.json
MAX_LISTED_MEMBERS = 20  # of a group in report.json


def make_thumbnails(images: np.ndarray) -> np.ndarray:
    """Resize images, uint8 [b, S, S, 3], to uint8 [b, 16, 16, 3]. Each pixel is the mean of the area that it covers."""
    side = images.shape[1]
    edges = np.linspace(0, side, THUMBNAIL_SIDE + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(side)[None, :]
    weights = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, None)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    thumbnails = np.empty((len(images), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    for start in range(0, len(images), _IMAGES_PER_BATCH):
        batch = images[start : start + _IMAGES_PER_BATCH]
        rows = np.matmul(weights, batch.reshape(len(batch), side, side * 3).astype(np.float32))
        columns = rows.reshape(len(batch), THUMBNAIL_SIDE, side, 3).transpose(0, 1, 3, 2)  # [b, 16, 3, S]
        thumbnails[start : start + _IMAGES_PER_BATCH] = np.rint(np.matmul(columns, weights.T)).transpose(0, 1, 3, 2)
    return thumbnails


def hash_thumbnails(thumbnails: np.ndarray) -> np.ndarray:
    """Hash thumbnails, uint8 [n, 16, 16, 3], to uint64 [n].

    Each bit belongs to one of the 8 x 8 lowest DCT coefficients of the gray image, and is set if the coefficient
    exceeds their median. The first coefficient, the mean, depends on the brightness, so it is excluded from the median,
    and its bit is always set.
    """
    gray = thumbnails.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    coefficients = dctn(gray, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(gray), 64)
    coefficients[:, 0] = np.inf  # sets the bit of the mean
    bits = coefficients > np.median(coefficients[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _iterate_close_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of pairs of hashes that differ in at most `MAX_HASH_DISTANCE` bits, as two arrays of indices.

    `hashes`, uint64 [n], must be distinct. A hash is divided into `MAX_HASH_DISTANCE` + 1 segments. Two close hashes
    have at least one segment in common (pigeonhole principle), so only hashes with an equal segment are compared. A
    pair with several equal segments is yielded several times.
    """
    for first_bit, end_bit in pairwise(np.linspace(0, 64, MAX_HASH_DISTANCE + 2).astype(int)):
        segment = (hashes >> np.uint64(first_bit)) & np.uint64((1 << int(end_bit - first_bit)) - 1)
        order = np.argsort(segment, kind="stable")
        bounds = np.flatnonzero(np.diff(segment[order])) + 1
        for members in np.split(order, bounds):  # indices of the hashes with the same value of this segment
            step = max(_HASH_PAIRS_PER_BATCH // len(members), 1)
            for start in range(0, len(members) - 1, step):
                rows = members[start : start + step]
                distances = np.bitwise_count(hashes[rows][:, None] ^ hashes[members][None, :])
                is_later = np.arange(len(members))[None, :] > np.arange(start, start + len(rows))[:, None]
                left, right = np.nonzero((distances <= MAX_HASH_DISTANCE) & is_later)
                if len(left):
                    yield rows[left], members[right]


def _find_duplicate_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """Return the pairs of duplicates among thumbnails, uint8 [n, 16, 16, 3], as row indices, int64 [2, pairs].

    Only the first image with each hash is compared: with the other images that have this hash, and with the first
    images of close hashes. The search stops at `MAX_DUPLICATE_PAIRS`.
    """
    if len(thumbnails) < 2:
        return np.zeros((2, 0), np.int64)
    hashes, first_rows, inverse = np.unique(hash_thumbnails(thumbnails), return_index=True, return_inverse=True)
    # Centered and scaled to length 1, so that the dot product of two vectors is the correlation of their thumbnails.
    vectors = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    first_with_hash = first_rows[inverse]  # row of the first image with the same hash
    repeated_rows = np.flatnonzero(first_with_hash != np.arange(len(inverse)))
    close_pairs = (first_rows[np.stack(pair)] for pair in _iterate_close_pairs(hashes))
    accepted_pairs = [np.zeros((2, 0), np.int64)]
    num_accepted = 0
    for candidates in chain([np.stack([first_with_hash[repeated_rows], repeated_rows])], close_pairs):
        for start in range(0, candidates.shape[1], _THUMBNAIL_PAIRS_PER_BATCH):
            left, right = batch = candidates[:, start : start + _THUMBNAIL_PAIRS_PER_BATCH]
            is_duplicate = np.einsum("ij,ij->i", vectors[left], vectors[right]) >= MIN_CORRELATION
            accepted_pairs.append(batch[:, is_duplicate])
            num_accepted += int(is_duplicate.sum())
        if num_accepted >= MAX_DUPLICATE_PAIRS:
            break
    return np.concatenate(accepted_pairs, axis=1)


def find_duplicates(
    thumbnails: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    describe_example: Callable[[str, int], dict[str, Any]],
    list_all: bool = False,
) -> dict[str, Any]:
    """Return `duplicates` of report.json: the groups of images that occur more than once.

    Groups with several labels are listed first, beginning with those in several splits. The other groups in several
    splits follow. At most `MAX_LISTED_GROUPS` are listed. Blank images (`_MIN_STD`) are ignored.

    Args:
        thumbnails: by split, the indices int64 [n] of the compared examples and their thumbnails uint8 [n, 16, 16, 3].
        labels: by split, the class index of each example in the split, int [count].
        describe_example: function from an example's split and index to its `split`, `index`, `file` and `label` (class
            name).
        list_all: whether groups within one split and class, which are otherwise only counted, are also listed, last.

    Returns:
        `compared`: number of compared images by split; `across_splits`, `different_labels`: number of groups with
        images in several splits, with several labels; `within_one_split_and_class`: number of all other groups;
        `groups`: the listed groups. Each of these has the keys `count`, its number of images; `across_splits`, whether
        they are in several splits; `labels`, the names of their classes; and `members`, the descriptions of the first
        `MAX_LISTED_MEMBERS` images.
    """
    split_names = list(thumbnails)
    # One row per compared image: its index in `split_names`, its example index in the split, its class, its thumbnail.
    row_splits = np.concatenate([np.full(len(indices), i) for i, (indices, _) in enumerate(thumbnails.values())])
    row_indices = np.concatenate([indices for indices, _ in thumbnails.values()])
    row_labels = np.concatenate([labels[name][indices] for name, (indices, _) in thumbnails.items()])
    row_images = np.concatenate([images for _, images in thumbnails.values()])
    is_not_blank = row_images.reshape(len(row_images), -1).std(axis=1) >= _MIN_STD
    row_splits, row_indices, row_labels = (column[is_not_blank] for column in (row_splits, row_indices, row_labels))
    left, right = _find_duplicate_pairs(row_images[is_not_blank])
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(row_indices),) * 2)
    _, components = connected_components(graph, directed=False)
    order = np.argsort(components, kind="stable")
    groups = [group for group in np.split(order, np.flatnonzero(np.diff(components[order])) + 1) if len(group) > 1]
    spans_splits = [len(np.unique(row_splits[group])) > 1 for group in groups]
    has_several_labels = [len(np.unique(row_labels[group])) > 1 for group in groups]
    ranks = [
        2 * labels_differ + splits_differ
        for labels_differ, splits_differ in zip(has_several_labels, spans_splits, strict=True)
    ]
    ranked_groups = sorted(range(len(groups)), key=lambda group_index: (-ranks[group_index], groups[group_index][0]))
    notable_groups = [group_index for group_index in ranked_groups if ranks[group_index]]

    def describe_all(rows: np.ndarray) -> list[dict[str, Any]]:
        return [describe_example(split_names[row_splits[i]], int(row_indices[i])) for i in rows]

    entries = []
    for group_index in (ranked_groups if list_all else notable_groups)[:MAX_LISTED_GROUPS]:
        group = groups[group_index]
        _, first_with_label = np.unique(row_labels[group], return_index=True)
        entries.append({
            "count": len(group),
            "across_splits": spans_splits[group_index],
            "labels": sorted({member["label"] for member in describe_all(group[first_with_label])}),
            "members": describe_all(group[:MAX_LISTED_MEMBERS]),
        })  # fmt: skip
    return {
        "compared": {name: len(indices) for name, (indices, _) in thumbnails.items()},
        "across_splits": sum(spans_splits),
        "different_labels": sum(has_several_labels),
        "within_one_split_and_class": len(groups) - len(notable_groups),
        "groups": entries,
    }
