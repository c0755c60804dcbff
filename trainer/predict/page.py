"""Write the page of a prediction, an HTML file that loads no other file, with a selection of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.predict.images import ImageFile, read_image
from trainer.predict.model import PixelArray
from trainer.predict.results import Overview
from trainer.report.page import GALLERY_SIDE, THUMBNAIL_PIXELS, embed_thumbnail, render
from trainer.storage.local import write_atomically

MAX_CLASSES = 24  # maximum number of classes with images; the most frequently predicted ones are shown
# Number of most confident and of least confident images per class, for up to `MANY` classes and for more classes.
PER_CLASS, PER_CLASS_OF_MANY = 6, 3
MANY = 8
MAX_FARTHEST = 24  # maximum number of images that are shown for their large distances
MAX_ERRORS = 500  # maximum number of unreadable images that are listed


def select_by_class(overview: Overview, classes: Sequence[int]) -> dict[int, tuple[list[int], list[int]]]:
    """Select the images with the most and the least confident predictions of each class.

    Args:
        classes: indices of the classes to show.

    Returns:
        Class index -> image indices of its most confident and of its least confident predictions, the extreme ones
        first. No image is in both lists.
    """
    count = PER_CLASS if len(classes) <= MANY else PER_CLASS_OF_MANY
    selected = {}
    for index in classes:
        members = np.flatnonzero(overview.predictions == index)
        ordered = members[np.argsort(-overview.confidences[members], kind="stable")].tolist()
        most_confident, others = ordered[:count], ordered[count:]
        selected[index] = most_confident, others[::-1][:count]
    return selected


def select_farthest(overview: Overview) -> list[int]:
    """Return the indices of the images with the largest distances, largest first; [] if no image has a distance."""
    with_distance = np.flatnonzero(~np.isnan(overview.distances))
    ordered = with_distance[np.argsort(-overview.distances[with_distance], kind="stable")]
    return [int(i) for i in ordered[:MAX_FARTHEST]]


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    images: Sequence[ImageFile],
    class_names: Sequence[str],
    overview: Overview,
    decode: Callable[[bytes], PixelArray | str],
) -> None:
    """Write the page to `path`. The selected images are read again; images that can no longer be read are left out.

    Args:
        summary: content of predictions.json.
        decode: decodes an image to uint8 [S, S, 3], or returns the reason (a str) why it cannot be decoded.
    """
    counts = np.bincount(overview.predictions[overview.predictions >= 0], minlength=len(class_names))
    frequent_classes = [int(i) for i in np.argsort(-counts, kind="stable")[:MAX_CLASSES] if counts[i]]
    by_class, farthest = select_by_class(overview, frequent_classes), select_farthest(overview)
    side = GALLERY_SIDE if len(frequent_classes) <= MANY else THUMBNAIL_PIXELS

    def make_item(index: int) -> dict[str, Any] | None:
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

    def make_items(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [item for item in map(make_item, indices) if item]

    rows = [
        {"name": class_names[i], "count": int(counts[i]), "most": make_items(most), "least": make_items(least)}
        for i, (most, least) in by_class.items()
    ]
    errors = [f"{images[i].name}: {error}" for i, error in overview.errors.items()]
    write_atomically(
        path,
        render(
            "predict.html.j2",
            summary=summary,
            rows=rows,
            farthest=make_items(farthest),
            errors=errors,
            max_errors=MAX_ERRORS,
            largest=max(int(counts.max()), 1),
        ),
    )
