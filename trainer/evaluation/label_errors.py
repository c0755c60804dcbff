"""Find possible label errors by confident learning (Northcutt, Jiang, Chuang 2021, JAIR 70, section 3)."""

from typing import Any

import numpy as np

from trainer.types import EvaluationResult

MAX_LISTED = 100  # examples in report.json


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples that the model confidently assigns to a class other than their label.

    The threshold of a class is the mean probability of the class over the examples labeled with it. The class suggested
    for an example is the most probable of those whose threshold its probability reaches. If this class differs from the
    label, the label is a possible error (in the paper: off the diagonal of the confident joint). The model must not
    have been trained on the examples.

    Args:
        labels: class indices, int [n].
        probabilities: float [n, c].

    Returns:
        Indices int64 [m] and suggested classes int64 [m], in ascending order of the margin: the probability of the
        label minus that of the suggestion.
    """
    n, classes = probabilities.shape
    counts = np.bincount(labels, minlength=classes)
    label_probabilities = probabilities[np.arange(n), labels].astype(np.float64)
    sums = np.bincount(labels, weights=label_probabilities, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # never suggest a class without examples
    # -1 replaces each probability below the threshold of its class.
    confident = np.where(probabilities >= thresholds.astype(probabilities.dtype), probabilities, -1.0)
    suggestions = confident.argmax(axis=1)
    candidates = np.flatnonzero((confident[np.arange(n), suggestions] >= 0) & (suggestions != labels))
    margin = label_probabilities[candidates] - probabilities[candidates, suggestions[candidates]]
    order = np.argsort(margin, kind="stable")
    return candidates[order], suggestions[candidates[order]]


def describe_label_errors(result: EvaluationResult) -> dict[str, Any]:
    """Return `label_errors` of report.json: the count, and in `rows` the `MAX_LISTED` errors with the smallest margins.

    `index` of a row is the row of the example in the result and in predictions.csv.
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
        for i, suggestion in zip(indices[:MAX_LISTED], suggestions[:MAX_LISTED], strict=True)
    ]
    return {"count": len(indices), "rows": rows}
