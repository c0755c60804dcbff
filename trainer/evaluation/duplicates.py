"""Pictures that occur more than once: across splits they flatter the scores, with two labels one of them is wrong.

Each picture becomes a thumbnail of 16 x 16 and a perceptual hash (Zauner 2010, "Implementation and benchmarking of
perceptual image hash functions": the signs of its low frequencies around their median). Hashes that differ in few bits
make candidates; what decides is the correlation of the thumbnails. So copies that were scaled, stored again with
another quality or slightly brightened are found, crops and mirror images are not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 16  # of a thumbnail, pixels
BITS = 6  # that the hashes of candidates may differ in
ALIKE = 0.99  # correlation of two thumbnails from which on they count as one picture
_FLAT = 3.0  # standard deviation of the grey levels of a picture that shows nothing
_CACHED = 8  # images made small at once: what fits a processor's cache takes a ninth of the time of 256
_BLOCK = 2_000_000  # pairs of hashes compared at once: 16 MB
MOST_PAIRS = 2_000_000  # found; a set of frames of one film has no end of them
LISTED = 100  # groups in a report
MEMBERS = 20  # of a group that are named


@dataclass(frozen=True)
class Member:
    """A picture of a group of duplicates."""

    split: str
    index: int
    file: str
    label: str


@dataclass(frozen=True)
class Duplicates:
    """Groups of pictures that are the same; those inside one split and class are only counted."""

    compared: Mapping[str, int]  # pictures of each split that were compared
    groups: Sequence[Sequence[tuple[str, int]]]  # of (split, index), the gravest first
    across: int  # groups with members in more than one split
    relabelled: int  # groups with members of more than one class
    harmless: int  # groups inside one split and class


def shrink(images: np.ndarray) -> np.ndarray:
    """uint8 [b, S, S, 3] -> uint8 [b, 16, 16, 3]; each pixel is the mean of the area below it."""
    side = images.shape[1]
    edges = np.linspace(0, side, SIDE + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(side)[None, :]
    weights = np.clip(np.minimum(right, pixel + 1) - np.maximum(left, pixel), 0, None)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    small = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for start in range(0, len(images), _CACHED):
        part = images[start : start + _CACHED]
        rows = np.matmul(weights, part.reshape(len(part), side, side * 3).astype(np.float32))
        columns = rows.reshape(len(part), SIDE, side, 3).transpose(0, 1, 3, 2)  # [b, 16, 3, S]
        small[start : start + _CACHED] = np.rint(np.matmul(columns, weights.T)).transpose(0, 1, 3, 2)
    return small


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [n, 16, 16, 3] -> uint64 [n]: the signs of 64 low frequencies of the grey picture around their median."""
    grey = thumbnails.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grey), 64)
    low[:, 0] = np.inf  # the mean says nothing of the picture: the same bit for all
    signs = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(signs, axis=1).view(np.uint64)[:, 0]


def _close(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions whose hashes differ in at most `BITS` bits, in parts; `hashes` are all different.

    Of 7 pieces at least one is then the same in both (the pigeonhole principle), so only hashes that share a piece are
    compared.
    """
    for start, stop in pairwise(np.linspace(0, 64, BITS + 2).astype(int)):
        piece = (hashes >> np.uint64(start)) & np.uint64((1 << int(stop - start)) - 1)
        order = np.argsort(piece, kind="stable")
        bounds = np.flatnonzero(np.diff(piece[order])) + 1
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
    """int64 [2, k]: pairs of positions that show the same picture, enough of them to join each group."""
    unique, first, inverse = np.unique(perceptual_hashes(thumbnails), return_index=True, return_inverse=True)
    pictures = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    pictures -= pictures.mean(axis=1, keepdims=True)
    pictures /= np.maximum(np.linalg.norm(pictures, axis=1, keepdims=True), 1e-6)
    again = np.flatnonzero(first[inverse] != np.arange(len(inverse)))  # whose hash occurred before
    close = (first[np.stack(pair)] for pair in _close(unique))
    edges, count = [np.zeros((2, 0), np.int64)], 0
    for pairs in chain([np.stack([first[inverse][again], again])], close):
        for start in range(0, pairs.shape[1], 50_000):
            one, other = part = pairs[:, start : start + 50_000]
            alike = np.einsum("ij,ij->i", pictures[one], pictures[other]) >= ALIKE
            edges.append(part[:, alike])
            count += int(alike.sum())
        if count >= MOST_PAIRS:
            break
    return np.concatenate(edges, axis=1)


def find_duplicates(
    thumbnails: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Mapping[str, np.ndarray]
) -> Duplicates:
    """Find the pictures that occur more than once.

    Args:
        thumbnails: of each split, indices int64 [n] and pictures uint8 [n, 16, 16, 3] (`shrink`). Pictures that show
            nothing (all of about one grey) are left out.
        labels: of each split, int [count] by index.
    """
    splits, compared = list(thumbnails), {name: len(chosen) for name, (chosen, _) in thumbnails.items()}
    rows = [(np.full(len(i), k), i, labels[s][i], p) for k, (s, (i, p)) in enumerate(thumbnails.items())]
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    shows = columns[-1].reshape(len(columns[-1]), -1).std(axis=1) >= _FLAT
    of_split, indices, truths, pictures = (column[shows] for column in columns)
    if len(pictures) < 2:
        return Duplicates(compared, [], 0, 0, 0)
    one, other = _edges(pictures)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(pictures),) * 2)
    _, group = connected_components(graph, directed=False)
    order = np.argsort(group, kind="stable")
    runs = [run for run in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(run) > 1]
    across = [len(np.unique(of_split[run])) > 1 for run in runs]
    relabelled = [len(np.unique(truths[run])) > 1 for run in runs]
    grave = [k for k in range(len(runs)) if across[k] or relabelled[k]]
    grave.sort(key=lambda k: (not (across[k] and relabelled[k]), not relabelled[k], int(runs[k][0])))
    listed = [[(splits[of_split[i]], int(indices[i])) for i in runs[k]] for k in grave[:LISTED]]
    return Duplicates(compared, listed, sum(across), sum(relabelled), len(runs) - len(grave))


def described(duplicates: Duplicates, groups: Sequence[Sequence[Member]]) -> dict[str, Any]:
    """`duplicates` of report.json; `groups` are those of `duplicates` with files and labels, each cut to `MEMBERS`."""
    rows = [
        {
            "count": len(whole),
            "across_splits": len({split for split, _ in whole}) > 1,
            "labels": sorted({member.label for member in named}),
            "members": [asdict(member) for member in named],
        }
        for whole, named in zip(duplicates.groups, groups, strict=True)
    ]
    return {
        "compared": dict(duplicates.compared),
        "across_splits": duplicates.across,
        "different_labels": duplicates.relabelled,
        "within_one_split_and_class": duplicates.harmless,
        "groups": rows,
    }
