"""Write the page of a prediction: one self-contained HTML file with the images that are most worth a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.predict.images import ImageFile, read_image
from trainer.predict.model import Pixels
from trainer.predict.results import Overview
from trainer.report.page import GALLERY_SIDE, LIST_SIDE, embed_thumbnail, render
from trainer.storage.local import write_atomically

MAX_CLASSES = 24  # with images, the most frequently predicted ones
PER_CLASS, PER_CLASS_OF_MANY = 6, 3  # most, and least, confident images; the second with more than `MANY` classes
MANY = 8
MAX_FARTHEST = 24
MAX_ERRORS = 500  # unreadable images that are listed


def select_by_class(overview: Overview, classes: Sequence[int]) -> dict[int, tuple[list[int], list[int]]]:
    """Select the most and the least confident images of each class, by class; no image is in both lists."""
    count = PER_CLASS if len(classes) <= MANY else PER_CLASS_OF_MANY
    selected = {}
    for index in classes:
        members = np.flatnonzero(overview.predictions == index)
        ordered = members[np.argsort(-overview.confidences[members], kind="stable")].tolist()
        most, rest = ordered[:count], ordered[count:]
        selected[index] = most, rest[::-1][:count]
    return selected


def select_farthest(overview: Overview) -> list[int]:
    """Select the images with the largest distances, the largest first; [] if there are no distances."""
    measured = np.flatnonzero(~np.isnan(overview.distances))
    ordered = measured[np.argsort(-overview.distances[measured], kind="stable")]
    return [int(i) for i in ordered[:MAX_FARTHEST]]


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    images: Sequence[ImageFile],
    class_names: Sequence[str],
    overview: Overview,
    decode: Callable[[bytes], Pixels | str],
) -> None:
    """Write the page; only the selected images are read again, and those that have vanished are left out."""
    counts = np.bincount(overview.predictions[overview.predictions >= 0], minlength=len(class_names))
    frequent = [int(i) for i in np.argsort(-counts, kind="stable")[:MAX_CLASSES] if counts[i]]
    by_class, farthest = select_by_class(overview, frequent), select_farthest(overview)
    side = GALLERY_SIDE if len(frequent) <= MANY else LIST_SIDE

    def make_shot(index: int) -> dict[str, Any] | None:
        content = read_image(images[index])
        pixels = content if isinstance(content, str) else decode(content)
        if isinstance(pixels, str):
            return None
        prediction = class_names[overview.predictions[index]]
        distance = float(overview.distances[index])
        return {
            "image": embed_thumbnail(pixels, side, prediction),
            "prediction": prediction,
            "confidence": float(overview.confidences[index]),
            "distance": None if np.isnan(distance) else distance,
            "file": images[index].name,
        }

    def make_shots(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [shot for shot in map(make_shot, indices) if shot]

    rows = [
        {"name": class_names[i], "count": int(counts[i]), "most": make_shots(most), "least": make_shots(least)}
        for i, (most, least) in by_class.items()
    ]
    errors = [f"{images[i].name}: {error}" for i, error in overview.errors.items()]
    write_atomically(
        path,
        render(
            "predict.html.j2",
            summary=summary,
            rows=rows,
            farthest=make_shots(farthest),
            errors=errors,
            max_errors=MAX_ERRORS,
            largest=max(int(counts.max()), 1),
        ),
    )
