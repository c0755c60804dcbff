"""Compute the scores of a split from its predictions with NumPy: accuracy, F1, calibration, and scores per group."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.intervals import compute_macro_f1_interval, compute_mean_interval, compute_wilson_interval
from trainer.types import EvaluationResult

TOP_K = 5  # k of top-k accuracy, which is computed only for more than k classes
CALIBRATION_BINS = 15  # bins of equal width for the confidence, as in Guo et al. 2017
MIN_PROBABILITY = 1e-7  # lower bound of the argument of the logarithm, as in Keras


def count_top_k(probabilities: np.ndarray, labels: np.ndarray, k: int = TOP_K) -> int:
    """Count the examples whose label is among the k most probable classes.

    Ties are broken by class index, as in argmax, so top-k accuracy is never below accuracy (in scikit-learn it can be).
    `probabilities` is float [n, c], and `labels` has the class indices, int [n].
    """
    label_probabilities = probabilities[np.arange(len(labels)), labels][:, None]
    precedes_label = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    ranked_higher = (probabilities > label_probabilities) | ((probabilities == label_probabilities) & precedes_label)
    return int((ranked_higher.sum(axis=1) < k).sum())


def compute_macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as a label or prediction, as scikit-learn's macro `f1_score` does.

    `predictions` and `labels` are class indices, int [n] with n >= 1.
    """
    size = int(max(predictions.max(), labels.max())) + 1
    hits = np.bincount(labels[predictions == labels], minlength=size)
    denominators = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    return float((2.0 * hits[denominators > 0] / denominators[denominators > 0]).mean())


def measure_calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Compute the expected calibration error (Guo et al. 2017, "On calibration of modern neural networks").

    Args:
        confidence: probability of the predicted class, float [n].
        correct: whether the prediction is correct, bool [n].

    Returns:
        The error, and a dictionary for each of the `CALIBRATION_BINS` bins (low, high], with the keys `low`, `high`,
        `count`, `confidence` (the mean) and `accuracy`. The last two are None if the bin is empty.
    """
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)
    bin_indices = np.digitize(confidence, edges[1:-1], right=True)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for bin_index, (low, high) in enumerate(pairwise(edges.tolist())):
        in_bin = bin_indices == bin_index
        count = int(in_bin.sum())
        mean_confidence = None
        accuracy = None
        if count:
            mean_confidence, accuracy = float(confidence[in_bin].mean(dtype=np.float64)), float(correct[in_bin].mean())
            error += count / len(confidence) * abs(accuracy - mean_confidence)
        bins.append({"low": low, "high": high, "count": count, "confidence": mean_confidence, "accuracy": accuracy})
    return error, bins


def _score_accuracy(correct: np.ndarray) -> dict[str, Any]:
    """Return `n`, `correct` (a count), `accuracy` and its `interval`, given which of n >= 1 predictions are correct."""
    n, hits = len(correct), int(correct.sum())
    return {"n": n, "correct": hits, "accuracy": hits / n, "interval": list(compute_wilson_interval(hits, n))}


def _score_classes(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return `per_class` of report.json (`trainer.report.schema.ClassScores`). Rows of `confusion` are the truth."""
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    ratios = {"precision": (hits, predicted), "recall": (hits, support), "f1": (2 * hits, predicted + support)}
    return [
        {
            "name": name,
            **{key: float(numerator[k] / max(denominator[k], 1)) for key, (numerator, denominator) in ratios.items()},
            "support": int(support[k]),
            "undefined": [key for key, (_, denominator) in ratios.items() if denominator[k] == 0],
        }
        for k, name in enumerate(class_names)
    ]


def compute_scores(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Return `test` of report.json (`trainer.report.schema.Scores`) without `split`, `note` and `groups`.

    Args:
        labels: class indices, int32 [n].
        probabilities: float32 [n, c]; each row sums to 1.
        class_names: the c class names, by index.

    Raises:
        DataError: there is no example, a shape is wrong, a label is out of range, or a probability is not finite.
    """
    n, num_classes = len(labels), len(class_names)
    _require_valid_predictions(labels, probabilities, num_classes)
    predictions = probabilities.argmax(axis=1)
    correct = predictions == labels
    confidence = probabilities.max(axis=1).astype(np.float64)
    scores: dict[str, Any] = _score_accuracy(correct)
    if num_classes > TOP_K:
        top_k_hits = count_top_k(probabilities, labels)
        scores |= {"top_5": top_k_hits / n, "top_5_interval": list(compute_wilson_interval(top_k_hits, n))}
    label_probabilities = probabilities[np.arange(n), labels].astype(np.float64)
    losses = 0.0 - np.log(np.clip(label_probabilities, MIN_PROBABILITY, 1.0))  # -log(1) would be -0.0
    calibration_error, calibration_bins = measure_calibration(confidence, correct)
    counts = np.bincount(labels.astype(np.int64) * num_classes + predictions, minlength=num_classes**2)
    confusion = counts.reshape(num_classes, num_classes)
    return scores | {
        "majority": int(np.bincount(labels).max()) / n,
        "loss": float(losses.mean()),
        "loss_interval": [max(bound, 0.0) for bound in compute_mean_interval(losses)],
        "macro_f1": compute_macro_f1(predictions, labels),
        "macro_f1_interval": list(compute_macro_f1_interval(confusion)),
        "per_class": _score_classes(confusion, class_names),
        "confusion": confusion.tolist(),
        "mean_confidence": float(confidence.mean()),
        "calibration_error": calibration_error,
        "calibration_bins": calibration_bins,
    }


def _require_valid_predictions(labels: np.ndarray, probabilities: np.ndarray, num_classes: int) -> None:
    """Raise the DataErrors of `compute_scores`."""
    n = len(labels)
    if n == 0:
        raise DataError("the split has no examples to evaluate", fix="add examples to it or choose another split")
    if probabilities.shape != (n, num_classes):
        raise DataError(
            f"the probabilities have shape {probabilities.shape} instead of (labels, classes) = ({n}, {num_classes})",
            fix="evaluate with the model and the data of the same run",
        )
    invalid_rows = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if invalid_rows.size:
        raise DataError(
            f"the label {labels[invalid_rows[0]]} of example {invalid_rows[0]} is out of range: "
            f"the labels of {num_classes} classes are 0 to {num_classes - 1}",
            fix="correct the label or the class names",
        )
    bad_rows = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if bad_rows.size:
        raise DataError(
            f"the probabilities of {bad_rows.size} of {n} examples (the first is example {bad_rows[0]}) are not "
            "finite: the weights of the model have diverged",
            fix="use an earlier checkpoint or a lower learning rate",
        )


def score_groups(labels: np.ndarray, predictions: np.ndarray, groups: Sequence[str], field: str) -> dict[str, Any]:
    """Return `test.groups` of report.json (`trainer.report.schema.Groups`), with the groups in alphabetical order.

    Two groups differ significantly if their intervals do not overlap.

    Args:
        labels: class indices, int [n].
        predictions: class indices, int [n].
        groups: name of each example's group.
        field: value of the configuration key data.group_field, which defines the groups.

    Raises:
        DataError: the numbers of groups and examples differ.
    """
    if len(groups) != len(labels):
        raise DataError(
            f"{len(labels)} examples have {len(groups)} groups",
            key="data.group_field",
            value=field,
            fix="assign one group to each example",
        )
    names, group_indices = np.unique(np.asarray(groups), return_inverse=True)
    rows: list[dict[str, Any]] = []
    for group_index, name in enumerate(names.tolist()):
        truth, predicted = labels[group_indices == group_index], predictions[group_indices == group_index]
        rows.append(
            {"name": name, **_score_accuracy(truth == predicted), "macro_f1": compute_macro_f1(predicted, truth)}
        )
    scores: dict[str, Any] = {"field": field, "rows": rows}
    if len(rows) > 1:
        best_row, worst_row = max(rows, key=lambda row: row["accuracy"]), min(rows, key=lambda row: row["accuracy"])
        scores["gap"] = {
            "accuracy": best_row["accuracy"] - worst_row["accuracy"],
            "highest": best_row["name"],
            "lowest": worst_row["name"],
            "overlap": worst_row["interval"][1] >= best_row["interval"][0],
        }
    return scores


def score_predictions(
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    group_field: str = "",
) -> EvaluationResult:
    """Score the predictions for a split. Return the predictions together with their scores.

    Args:
        split: name of the split.
        class_names: the c class names, by index.
        labels: class indices, int32 [n], ordered by example index.
        probabilities: float32 [n, c].
        names: file or record of each example.
        groups: name of each example's group; None omits the scores per group.
        group_field: value of the configuration key data.group_field, which defines the groups.

    Raises:
        DataError: the lengths or shapes do not match, there is no example, a label is out of range, or a probability
            is not finite.
    """
    labels, probabilities = np.asarray(labels, np.int32), np.asarray(probabilities, np.float32)
    if len(names) != len(labels):
        raise DataError(
            f"split {split!r} has {len(labels)} labels but {len(names)} file names", fix="read the whole split again"
        )
    scores = compute_scores(labels, probabilities, class_names)
    if groups is not None:
        scores["groups"] = score_groups(labels, probabilities.argmax(axis=1), groups, group_field)
    return EvaluationResult(split, tuple(class_names), labels, probabilities, tuple(names), scores)
