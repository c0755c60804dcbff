"""Compute and write reference.json, the distribution of predictions that `trainer.drift` compares with later ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import CONFIDENCE_BINS, PredictionWindow
from trainer.names import normalize_class_name
from trainer.storage.local import write_atomically

# Wider embeddings are projected to this width, because a 64 x 64 covariance needs more examples than most splits have.
MAX_EMBEDDING_WIDTH = 16
PROJECTION_SEED = 8  # arbitrary


def compute_reference(
    split: str,
    class_names: tuple[str, ...],
    probabilities: np.ndarray,
    embeddings: np.ndarray,
    image_size: int,
    resize: str,
) -> dict[str, Any]:
    """Compute the content of reference.json from the predictions for a split.

    Args:
        split: "test" or "validation".
        probabilities: class probabilities of n examples, float32 [n, classes].
        embeddings: pooled backbone features of m of these examples, float32 [m, C].
        image_size: side of the model's input in pixels.
        resize: how images become square, "stretch" or "crop".

    Returns:
        `classes`: class names.
        `n`, the number of examples; `split`, `image_size` and `resize`, the arguments.
        `class_frequencies`: fraction of the predictions per class, [classes].
        `confidence_histogram`: histogram of the largest probability per example, `edges` [21] and `counts` [20].
        `embedding`: `n` (m above), `mean` [C'] and `covariance` [C', C']. If C > 16, C' is 16, and embeddings must be
            multiplied by the matrix `projection` [C, C'] before the comparison; otherwise C' is C.
    """
    window = PredictionWindow(len(class_names))
    for row in probabilities:
        window.add(int(row.argmax()), float(row.max()))
    vectors, projection = embeddings.astype(np.float64), draw_projection(embeddings.shape[1])
    projection_entry = {}
    if projection is not None:
        vectors, projection_entry = vectors @ projection, {"projection": projection.tolist()}
    covariance = np.atleast_2d(np.cov(vectors, rowvar=False))
    embedding = {"n": len(vectors), "mean": _round(vectors.mean(0)), "covariance": _round(covariance)}
    edges = [i / CONFIDENCE_BINS for i in range(CONFIDENCE_BINS + 1)]
    counts = window.confidences.tolist()
    return {
        "classes": [normalize_class_name(name) for name in class_names],
        "n": len(probabilities),
        "split": split,
        "class_frequencies": (window.classes / max(window.n, 1)).tolist(),
        "confidence_histogram": {"edges": edges, "counts": counts},
        "embedding": embedding | projection_entry,
        "image_size": image_size,
        "resize": resize,
    }


def draw_projection(width: int) -> np.ndarray | None:
    """Draw a random projection with orthonormal columns, float64 [width, 16]; None if `width` is at most 16.

    The seed is fixed, so all models with the same embedding width have the same projection.
    """
    if width <= MAX_EMBEDDING_WIDTH:
        return None
    gaussian = np.random.default_rng([PROJECTION_SEED, width]).standard_normal((width, MAX_EMBEDDING_WIDTH))
    return np.array(_round(np.linalg.qr(gaussian)[0]))


def _round(values: np.ndarray) -> Any:
    """Round to six significant digits, to halve the file size, and return a (nested) list."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[np.float64])(values).tolist()


def write_reference(path: Path, reference: Mapping[str, Any]) -> None:
    """Write reference.json atomically."""
    write_atomically(path, json.dumps(reference, ensure_ascii=False, allow_nan=False) + "\n")
