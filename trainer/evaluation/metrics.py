"""Scores of one pass over a split, in NumPy: accuracy, F1, calibration, and scores by group of examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.intervals import macro_f1_interval, mean_interval, wilson
from trainer.types import EvaluationResult

TOP = 5  # k of top-k accuracy, which is computed only with more classes
BINS = 15  # of the calibration error, as in Guo et al. 2017
_SMALLEST = 1e-7  # lower bound of a probability before the logarithm, as in Keras


def top_k(probabilities: np.ndarray, labels: np.ndarray, k: int = TOP) -> int:
    """Count the labels among the k most probable classes.

    Ties are ordered by class index, as in argmax, so top-k is never below accuracy (in scikit-learn it may be).
    """
    of_truth = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    ranked_higher = (probabilities > of_truth) | ((probabilities == of_truth) & earlier)
    return int((ranked_higher.sum(axis=1) < k).sum())


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur or are predicted (as scikit-learn); both int [n], n >= 1."""
    size = int(max(predictions.max(), labels.max())) + 1
    hits = np.bincount(labels[predictions == labels], minlength=size)
    both = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    return float((2.0 * hits[both > 0] / both[both > 0]).mean())


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Return the expected calibration error and its bins (Guo et al. 2017, "On calibration of modern neural networks").

    Args:
        confidence: float [n], the probability of each prediction.
        correct: bool [n].

    Returns:
        The error, and for each bin (low, high]: low, high, count, and means confidence and accuracy (None if empty).
    """
    edges = np.linspace(0.0, 1.0, BINS + 1)
    bin_of = np.digitize(confidence, edges[1:-1], right=True)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for b in range(BINS):
        inside = bin_of == b
        count, mean, accuracy = int(inside.sum()), None, None
        if count:
            mean, accuracy = float(confidence[inside].mean(dtype=np.float64)), float(correct[inside].mean())
            error += count / len(confidence) * abs(accuracy - mean)
        low, high = float(edges[b]), float(edges[b + 1])
        bins.append({"low": low, "high": high, "count": count, "confidence": mean, "accuracy": accuracy})
    return error, bins


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    n, hits = len(correct), int(correct.sum())
    return {"n": n, "correct": hits, "accuracy": hits / n, "interval": list(wilson(hits, n))}


def _per_class(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    ratios = {"precision": (hits, predicted), "recall": (hits, support), "f1": (2 * hits, predicted + support)}
    return [
        {
            "name": name,
            **{key: float(above[k] / max(below[k], 1)) for key, (above, below) in ratios.items()},
            "support": int(support[k]),
            "undefined": [key for key, (_, below) in ratios.items() if below[k] == 0],
        }
        for k, name in enumerate(class_names)
    ]


def score(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Return every score of one pass over one split, in JSON types.

    Args:
        labels: int32 [n].
        probabilities: float32 [n, c], rows that sum to 1.
        class_names: c names.

    Returns:
        `test` of report.json (`trainer.report.schema.Scores`) without `split`, `note` and `groups`.

    Raises:
        DataError: no example, shapes that do not match, a label without a class, or probabilities that are not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n, classes = len(labels), len(class_names)
    _check(labels, probabilities, classes)
    predictions = probabilities.argmax(axis=1)
    correct = predictions == labels
    confidence = probabilities.max(axis=1).astype(np.float64)
    scores: dict[str, Any] = _accuracy(correct)
    if classes > TOP:
        hits = top_k(probabilities, labels)
        scores |= {"top_5": hits / n, "top_5_interval": list(wilson(hits, n))}
    of_truth = probabilities[np.arange(n), labels].astype(np.float64)
    losses = 0.0 - np.log(np.clip(of_truth, _SMALLEST, 1.0))
    error, bins = calibration(confidence, correct)
    cells = np.bincount(labels.astype(np.int64) * classes + predictions, minlength=classes**2)
    confusion = cells.reshape(classes, classes)
    return scores | {
        "majority": int(np.bincount(labels).max()) / n,
        "loss": float(losses.mean()),
        "loss_interval": [max(bound, 0.0) for bound in mean_interval(losses)],
        "macro_f1": macro_f1(predictions, labels),
        "macro_f1_interval": list(macro_f1_interval(confusion)),
        "per_class": _per_class(confusion, class_names),
        "confusion": confusion.tolist(),
        "mean_confidence": float(confidence.mean()),
        "calibration_error": error,
        "calibration_bins": bins,
    }


def _check(labels: np.ndarray, probabilities: np.ndarray, classes: int) -> None:
    n = len(labels)
    if n == 0:
        raise DataError("the split has no examples to evaluate", fix="add examples to it or choose another split")
    if probabilities.shape != (n, classes):
        raise DataError(
            f"the probabilities have shape {probabilities.shape}, not [labels, class names] = ({n}, {classes})",
            fix="evaluate with the model and the data of the same run",
        )
    invalid = np.flatnonzero((labels < 0) | (labels >= classes))
    if invalid.size:
        raise DataError(
            f"the label {labels[invalid[0]]} of example {invalid[0]} has no class: the labels of {classes} class names "
            f"are 0 to {classes - 1}",
            fix="correct the label or the class names",
        )
    broken = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if broken.size:
        raise DataError(
            f"the model's probabilities are not finite for {broken.size} of {n} examples (the first is example "
            f"{broken[0]}): its weights have diverged",
            fix="use an earlier checkpoint or a lower learning rate",
        )


def score_groups(labels: np.ndarray, predictions: np.ndarray, groups: Sequence[str], field: str) -> dict[str, Any]:
    """Return the scores of each group of examples, and the gap between the best and the worst group.

    Args:
        labels: int [n].
        predictions: int [n].
        groups: n names, values of `field` (data.group_field).

    Returns:
        `test.groups` of report.json (`trainer.report.schema.Groups`), rows in alphabetical order; groups whose
        intervals do not overlap differ.

    Raises:
        DataError: the number of groups is not that of the examples.
    """
    if len(groups) != len(labels):
        raise DataError(
            f"{len(labels)} examples have {len(groups)} groups",
            key="data.group_field",
            value=field,
            fix="assign one group to each example",
        )
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names.tolist()):
        truths, predicted = labels[group_of == number], predictions[group_of == number]
        rows.append({"name": name, **_accuracy(truths == predicted), "macro_f1": macro_f1(predicted, truths)})
    scores: dict[str, Any] = {"field": field, "rows": rows}
    if len(rows) > 1:
        high, low = max(rows, key=lambda row: row["accuracy"]), min(rows, key=lambda row: row["accuracy"])
        scores["gap"] = {
            "accuracy": high["accuracy"] - low["accuracy"],
            "highest": high["name"],
            "lowest": low["name"],
            "overlap": low["interval"][1] >= high["interval"][0],
        }
    return scores


def evaluate_arrays(
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    group_field: str = "",
) -> EvaluationResult:
    """Score one pass over `split`; the result holds the scores and the arrays they were computed from.

    Args:
        class_names: c names.
        labels: int32 [n], ordered by example index.
        probabilities: float32 [n, c].
        names: the file or record of each example.
        groups: the group of each example, a value of `group_field`; adds `groups` to the metrics (`score_groups`).

    Raises:
        DataError: as `score`, or the number of names or groups is not that of the examples.
    """
    labels, probabilities = np.asarray(labels, np.int32), np.asarray(probabilities, np.float32)
    if len(names) != len(labels):
        raise DataError(
            f"split {split!r} has {len(labels)} labels but {len(names)} file names", fix="read the whole split again"
        )
    scores = score(labels, probabilities, class_names)
    if groups is not None:
        scores["groups"] = score_groups(labels, probabilities.argmax(axis=1), groups, group_field)
    return EvaluationResult(split, tuple(class_names), labels, probabilities, tuple(names), scores)
