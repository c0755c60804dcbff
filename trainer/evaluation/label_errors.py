"""Possible label errors by confident learning (Northcutt, Jiang, Chuang 2021, JAIR 70, section 3)."""

from typing import Any

import numpy as np

from trainer.types import EvaluationResult

LISTED = 100  # examples in a report


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples that the model confidently assigns to another class than their label.

    The threshold of a class is the mean probability of that class over the examples with its label. An example counts
    for the most probable of the classes whose threshold it reaches; if this is not its label (off the diagonal of the
    confident joint), it is a candidate. The model must not have been trained on the examples.

    Args:
        labels: int [n].
        probabilities: float [n, c].

    Returns:
        indices int64 [m] and suggested classes int64 [m], in ascending order of the margin: the probability of the
        label minus that of the suggestion.
    """
    n, classes = probabilities.shape
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(n), labels].astype(np.float64)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # never a class without examples
    confident = np.where(probabilities >= thresholds.astype(probabilities.dtype), probabilities, -1.0)
    best = confident.argmax(axis=1)
    candidates = np.flatnonzero((confident[np.arange(n), best] >= 0) & (best != labels))
    margin = own[candidates] - probabilities[candidates, best[candidates]]
    order = np.argsort(margin, kind="stable")
    return candidates[order], best[candidates[order]]


def describe_label_errors(result: EvaluationResult) -> dict[str, Any]:
    """Return `label_errors` of report.json: their count, and the first `LISTED` as rows."""
    indices, suggested = find_label_errors(result.labels, result.probabilities)
    rows = [
        {
            "index": int(i),
            "file": result.names[i],
            "label": result.class_names[result.labels[i]],
            "suggestion": result.class_names[k],
            "label_probability": float(result.probabilities[i, result.labels[i]]),
            "suggestion_probability": float(result.probabilities[i, k]),
        }
        for i, k in zip(indices[:LISTED], suggested[:LISTED], strict=True)
    ]
    return {"count": len(indices), "rows": rows}
