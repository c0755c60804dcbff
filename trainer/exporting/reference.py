"""Compute and write reference.json: the distribution of predictions with which `trainer.drift` compares later ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import CONFIDENCE_BINS, Window
from trainer.names import normalize_class_name
from trainer.storage.local import write_atomically

# Wider embeddings are projected to this width: a 64 x 64 covariance needs more examples than most splits have.
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
        split: test or validation.
        probabilities: of the n examples, float32 [n, classes].
        embeddings: of all or some of these examples, float32 [m, C].
        image_size: side of the model's input in pixels.
        resize: how images become square.

    Returns:
        `classes`: class names.
        `n`, `split`, `image_size`, `resize`: as above.
        `class_frequencies`: fraction of the predictions per class, [classes].
        `confidence_histogram`: `edges` [21] and `counts` [20] of the largest probability.
        `embedding`: `n` (m above), `mean` [C'] and `covariance` [C', C']. If C > 16, C' is 16, and `projection`
            [C, C'] is the matrix by which an embedding is multiplied before the comparison; otherwise C' is C.
    """
    window = Window(len(class_names))
    for row in probabilities:
        window.add(int(row.argmax()), float(row.max()))
    vectors, projection = embeddings.astype(np.float64), draw_projection(embeddings.shape[1])
    projection_entry = {}
    if projection is not None:
        vectors, projection_entry = vectors @ projection, {"projection": projection.tolist()}
    covariance = np.atleast_2d(np.cov(vectors, rowvar=False))
    embedding = {"n": len(vectors), "mean": _round(vectors.mean(0)), "covariance": _round(covariance)}
    edges, counts = [i / CONFIDENCE_BINS for i in range(CONFIDENCE_BINS + 1)], window.confidences.tolist()
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
    """Round to six significant digits, which halves the size of the file; return a (nested) list."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[np.float64])(values).tolist()


def write_reference(path: Path, reference: Mapping[str, Any]) -> None:
    """Write reference.json atomically."""
    write_atomically(path, json.dumps(reference, ensure_ascii=False, allow_nan=False) + "\n")
