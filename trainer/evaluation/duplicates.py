"""Duplicate images: across splits they inflate the scores, with two labels one of the labels is wrong.

Each image becomes a 16 x 16 thumbnail and a perceptual hash (Zauner 2010, "Implementation and benchmarking of
perceptual image hash functions": its low frequencies, each above or below their median). Hashes that differ in few bits
are candidates, which the correlation of the thumbnails accepts or rejects. This detects copies that were rescaled,
recompressed or slightly brightened, but not crops and mirror images.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 16  # pixels, of a thumbnail
BITS = 6  # Hamming distance of candidate hashes at most
SAME = 0.99  # correlation from which two thumbnails count as one image
_FLAT = 3.0  # standard deviation of the grey levels below which an image is blank
_CACHED = 8  # images shrunk per batch: in a processor's cache a batch takes a ninth of the time of one of 256
_BLOCK = 2_000_000  # pairs of hashes compared per batch: 16 MB
MAX_PAIRS = 2_000_000  # the search ends there: frames of a film yield far more
LISTED = 100  # groups in a report
MEMBERS = 20  # members of a group in a report


def shrink(images: np.ndarray) -> np.ndarray:
    """Average uint8 [b, S, S, 3] over areas -> uint8 [b, 16, 16, 3]."""
    side = images.shape[1]
    edges = np.linspace(0, side, SIDE + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(side)[None, :]
    weights = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, None)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    small = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(images), _CACHED):
        batch = images[start : start + _CACHED]
        rows = np.matmul(weights, batch.reshape(len(batch), side, side * 3).astype(np.float32))
        columns = rows.reshape(len(batch), SIDE, side, 3).transpose(0, 1, 3, 2)  # [b, 16, 3, S]
        small[start : start + _CACHED] = np.rint(np.matmul(columns, weights.T)).transpose(0, 1, 3, 2)
    return small


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hash uint8 [n, 16, 16, 3] -> uint64 [n]: bit k is set where low frequency k exceeds the median of 64."""
    grey = thumbnails.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grey), 64)
    low[:, 0] = np.inf  # the mean carries no structure: the same bit for all
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _close(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of pairs of positions whose hashes differ in at most `BITS` bits; `hashes` are distinct.

    Of 7 segments at least one is then equal (pigeonhole principle), so only hashes with an equal segment are compared.
    """
    for start, stop in pairwise(np.linspace(0, 64, BITS + 2).astype(int)):
        segment = (hashes >> np.uint64(start)) & np.uint64((1 << int(stop - start)) - 1)
        order = np.argsort(segment, kind="stable")
        bounds = np.flatnonzero(np.diff(segment[order])) + 1
        for run in np.split(order, bounds):
            step = max(_BLOCK // len(run), 1)
            for first in range(0, len(run) - 1, step):
                rows = run[first : first + step]
                differing = np.bitwise_count(hashes[rows][:, None] ^ hashes[run][None, :])
                later = np.arange(len(run))[None, :] > np.arange(first, first + len(rows))[:, None]
                one, other = np.nonzero((differing <= BITS) & later)
                if len(one):
                    yield rows[one], run[other]


def _edges(thumbnails: np.ndarray) -> np.ndarray:
    """Return int64 [2, k]: pairs of positions of equal images, enough of them to connect each group."""
    if len(thumbnails) < 2:
        return np.zeros((2, 0), np.int64)
    unique, first, inverse = np.unique(perceptual_hashes(thumbnails), return_index=True, return_inverse=True)
    vectors = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    equal = np.flatnonzero(first[inverse] != np.arange(len(inverse)))  # their hash occurred before
    close = (first[np.stack(pair)] for pair in _close(unique))
    edges, count = [np.zeros((2, 0), np.int64)], 0
    for pairs in chain([np.stack([first[inverse][equal], equal])], close):
        for start in range(0, pairs.shape[1], 50_000):
            one, other = batch = pairs[:, start : start + 50_000]
            same = np.einsum("ij,ij->i", vectors[one], vectors[other]) >= SAME
            edges.append(batch[:, same])
            count += int(same.sum())
        if count >= MAX_PAIRS:
            break
    return np.concatenate(edges, axis=1)


def find_duplicates(
    thumbnails: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    describe: Callable[[str, int], dict[str, Any]],
) -> dict[str, Any]:
    """Find the images that occur more than once.

    Args:
        thumbnails: by split, indices int64 [n] and images uint8 [n, 16, 16, 3] (`shrink`). Blank images (of about one
            grey level) are left out.
        labels: by split, int [count] by index.
        describe: (split, index) -> split, index, file and label of a member.

    Returns:
        `duplicates` of report.json, the most severe groups first; groups within one split and class are only counted.
    """
    splits = list(thumbnails)
    rows = [(np.full(len(i), k), i, labels[s][i], p) for k, (s, (i, p)) in enumerate(thumbnails.items())]
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    structured = columns[-1].reshape(len(columns[-1]), -1).std(axis=1) >= _FLAT
    of_split, indices, truths, images = (column[structured] for column in columns)
    one, other = _edges(images)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(images),) * 2)
    _, group = connected_components(graph, directed=False)
    order = np.argsort(group, kind="stable")
    runs = [run for run in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(run) > 1]
    across = [len(np.unique(of_split[run])) > 1 for run in runs]
    differ = [len(np.unique(truths[run])) > 1 for run in runs]
    severe = [k for k in range(len(runs)) if across[k] or differ[k]]
    severe.sort(key=lambda k: (not (across[k] and differ[k]), not differ[k], int(runs[k][0])))
    groups = []
    for k in severe[:LISTED]:
        members = [describe(splits[of_split[i]], int(indices[i])) for i in runs[k][:MEMBERS]]
        named = sorted({member["label"] for member in members})
        groups.append({"count": len(runs[k]), "across_splits": across[k], "labels": named, "members": members})
    return {
        "compared": {name: len(chosen) for name, (chosen, _) in thumbnails.items()},
        "across_splits": sum(across),
        "different_labels": sum(differ),
        "within_one_split_and_class": len(runs) - len(severe),
        "groups": groups,
    }
