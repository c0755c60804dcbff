"""Find possible label errors by confident learning (Northcutt, Jiang, Chuang 2021, JAIR 70, section 3)."""

from typing import Any

import numpy as np

from trainer.types import EvaluationResult

MAX_LISTED_ERRORS = 100  # label errors in report.json


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the examples that the model confidently assigns to a class other than their label.

    A class's threshold is the mean probability of the class over the examples labeled with it. The class suggested for
    an example is the most probable class among those whose probability reaches their threshold. If this class differs
    from the label, the label is a possible error (in the paper: off the diagonal of the confident joint). The model
    must not have been trained on the examples.

    Args:
        labels: class indices, int [n].
        probabilities: float [n, c].

    Returns:
        Indices int64 [m] and suggested classes int64 [m], in ascending order of the margin: the label's probability
        minus the suggested class's probability.
    """
    n, num_classes = probabilities.shape
    counts = np.bincount(labels, minlength=num_classes)
    label_probabilities = probabilities[np.arange(n), labels].astype(np.float64)
    sums = np.bincount(labels, weights=label_probabilities, minlength=num_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # never suggest a class without examples
    # -1 replaces each probability below the threshold of its class.
    confident_probabilities = np.where(probabilities >= thresholds.astype(probabilities.dtype), probabilities, -1.0)
    suggestions = confident_probabilities.argmax(axis=1)
    error_indices = np.flatnonzero((confident_probabilities[np.arange(n), suggestions] >= 0) & (suggestions != labels))
    margins = label_probabilities[error_indices] - probabilities[error_indices, suggestions[error_indices]]
    order = np.argsort(margins, kind="stable")
    return error_indices[order], suggestions[error_indices[order]]


def describe_label_errors(result: EvaluationResult) -> dict[str, Any]:
    """Return `label_errors` of report.json: the count, and in `rows` the `MAX_LISTED_ERRORS` with the smallest margins.

    Each entry's `index` is the example's row in `result` and in predictions.csv.
    """
    indices, suggestions = find_label_errors(result.labels, result.probabilities)
    rows = [
        {
            "index": int(i),
            "file": result.names[i],
            "label": result.class_names[result.labels[i]],
            "suggestion": result.class_names[suggestion],
            "label_probability": float(result.probabilities[i, result.labels[i]]),
            "suggestion_probability": float(result.probabilities[i, suggestion]),
        }
        for i, suggestion in zip(indices[:MAX_LISTED_ERRORS], suggestions[:MAX_LISTED_ERRORS], strict=True)
    ]
    return {"count": len(indices), "rows": rows}
