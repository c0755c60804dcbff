"""reference.json: the distribution of predictions on held-out examples, the reference of the drift check."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import BINS, Window
from trainer.storage.local import write_whole

MAX_ASPECT = 16  # dimensions of a stored embedding: a covariance of 64 needs more examples than most splits have
SEED = 8


def reference_distribution(
    split: str,
    class_names: tuple[str, ...],
    probabilities: np.ndarray,
    embeddings: np.ndarray,
    image_size: int,
    resize: str,
) -> dict[str, Any]:
    """Return the content of reference.json.

    Args:
        split: test or validation.
        probabilities: float32 [n, classes].
        embeddings: float32 [m, C] of (some of) these examples.

    Returns:
        `classes`, `n`, `split`, `image_size`, `resize`; `class_frequencies` [classes], the fraction of each predicted
        class; `confidence_histogram`: `edges` [21] and `counts` [20] of the largest probability; `embedding`: `n`,
        `mean` [C'], `covariance` [C', C'] and, if C > 16, `projection` [C, C'], orthonormal columns from a fixed seed,
        to multiply an embedding by first.
    """
    window = Window(len(class_names))
    for row in probabilities:
        window.add(int(row.argmax()), float(row.max()))
    vectors, projection = embeddings.astype(np.float64), projection_of(embeddings.shape[1])
    if projection is not None:
        vectors = vectors @ projection
    covariance = np.atleast_2d(np.cov(vectors, rowvar=False))
    embedding = {"n": len(vectors), "mean": _rounded(vectors.mean(0)), "covariance": _rounded(covariance)}
    if projection is not None:
        embedding["projection"] = projection.tolist()
    edges, counts = [i / BINS for i in range(BINS + 1)], window.confidences.tolist()
    return {
        "classes": list(class_names),
        "n": len(probabilities),
        "split": split,
        "class_frequencies": (window.classes / max(window.n, 1)).tolist(),
        "confidence_histogram": {"edges": edges, "counts": counts},
        "embedding": embedding,
        "image_size": image_size,
        "resize": resize,
    }


def projection_of(width: int) -> np.ndarray | None:
    """Draw float64 [width, 16] with orthonormal columns, equal for all models of that width; None up to width 16."""
    if width <= MAX_ASPECT:
        return None
    drawn = np.random.default_rng([SEED, width]).standard_normal((width, MAX_ASPECT))
    return np.array(_rounded(np.linalg.qr(drawn)[0]))


def _rounded(values: np.ndarray) -> Any:
    """Round to six digits, which halves the file."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[np.float64])(values).tolist()


def write_reference(path: Path, reference: Mapping[str, Any]) -> None:
    """Write reference.json atomically."""
    write_whole(path, json.dumps(reference, ensure_ascii=False, allow_nan=False) + "\n")
