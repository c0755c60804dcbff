"""Scores of one pass over a split: accuracy, F1, calibration, and the gap between groups of examples. NumPy alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import DataError
from trainer.evaluation.intervals import of_macro_f1, of_mean, wilson
from trainer.types import EvaluationResult

TOP = 5  # what top-k counts; shown only where there are more classes
BINS = 15  # of the calibration error, as in Guo et al. 2017
_SMALLEST = 1e-7  # probabilities are clipped here before the logarithm, as Keras does


def top_k(probabilities: np.ndarray, labels: np.ndarray, k: int = TOP) -> int:
    """Count the labels among the k most probable classes; of equal ones the first counts, as argmax has it.

    So top-k is never below accuracy (scikit-learn's may be).
    """
    of_truth = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    ahead = (probabilities > of_truth) | ((probabilities == of_truth) & earlier)
    return int((ahead.sum(axis=1) < k).sum())


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 of the classes that occur or are predicted (as scikit-learn has it); int [n], n >= 1, each."""
    size = int(max(predictions.max(), labels.max())) + 1
    hits = np.bincount(labels[predictions == labels], minlength=size)
    both = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    return float((2.0 * hits[both > 0] / both[both > 0]).mean())


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """Expected calibration error and its bins (Guo et al. 2017, "On calibration of modern neural networks").

    Args:
        confidence: float [n], the probability of each prediction.
        correct: bool [n].

    Returns:
        The error, and for each of the 15 bins (low, high]: low, high, count, confidence and accuracy (means; None where
        the bin is empty).
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
    """Every score of one pass over one split, ready for JSON.

    Args:
        labels: int32 [n].
        probabilities: float32 [n, c], rows that sum to 1.
        class_names: c names.

    Returns:
        n, correct, accuracy and its 95 % Wilson `interval`; top_5 and top_5_interval where there are more than 5
        classes; `majority` (the accuracy of always answering the most frequent class); loss (mean cross entropy,
        nats) and loss_interval; macro_f1 (over the classes that occur or are predicted) and macro_f1_interval;
        per_class (name, precision, recall, f1, support, and as `undefined` which of them are 0 only because nothing was
        there to divide by); confusion (rows: truth, columns: prediction); mean_confidence; calibration_error and
        calibration_bins.

    Raises:
        DataError: no example, shapes that do not fit together, a label without a class, probabilities not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    n, classes = len(labels), len(class_names)
    _check(labels, probabilities, classes)
    predictions = probabilities.argmax(axis=1)
    right = predictions == labels
    confidence = probabilities.max(axis=1).astype(np.float64)
    hits = int(right.sum())
    scores: dict[str, Any] = {"n": n, "correct": hits, "accuracy": hits / n, "interval": list(wilson(hits, n))}
    if classes > TOP:
        among = top_k(probabilities, labels)
        scores |= {"top_5": among / n, "top_5_interval": list(wilson(among, n))}
    of_truth = probabilities[np.arange(n), labels].astype(np.float64)
    losses = 0.0 - np.log(np.clip(of_truth, _SMALLEST, 1.0))
    error, bins = calibration(confidence, right)
    cells = np.bincount(labels.astype(np.int64) * classes + predictions, minlength=classes**2)
    confusion = cells.reshape(classes, classes)
    return scores | {
        "majority": int(np.bincount(labels).max()) / n,
        "loss": float(losses.mean()),
        "loss_interval": [max(bound, 0.0) for bound in of_mean(losses)],
        "macro_f1": macro_f1(predictions, labels),
        "macro_f1_interval": list(of_macro_f1(confusion)),
        "per_class": _per_class(confusion, class_names),
        "confusion": confusion.tolist(),
        "mean_confidence": float(confidence.mean()),
        "calibration_error": error,
        "calibration_bins": bins,
    }


def _check(labels: np.ndarray, probabilities: np.ndarray, classes: int) -> None:
    n = len(labels)
    if n == 0:
        raise DataError("there is no example to evaluate: the split is empty; give it examples or name another split")
    if probabilities.shape != (n, classes):
        raise DataError(
            f"{n} labels and {classes} class names need probabilities of shape ({n}, {classes}), "
            f"not {probabilities.shape}; evaluate with the model and the data of the same run"
        )
    invalid = np.flatnonzero((labels < 0) | (labels >= classes))
    if invalid.size:
        raise DataError(
            f"the label {labels[invalid[0]]} of example {invalid[0]} has no class: there are {classes} class names, "
            f"so labels go from 0 to {classes - 1}; correct the label or the class names"
        )
    broken = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if broken.size:
        raise DataError(
            f"the model's probabilities are not finite for {broken.size} of {n} examples (the first is example "
            f"{broken[0]}): its weights have diverged; take an earlier checkpoint or a lower learning rate"
        )


def score_groups(labels: np.ndarray, predictions: np.ndarray, groups: Sequence[str], field: str) -> dict[str, Any]:
    """The scores of each group of examples, and how far they lie apart.

    Args:
        labels: int [n].
        predictions: int [n].
        groups: n names.
        field: what the names are values of.

    Returns:
        `field`; `rows`, one a group in alphabetical order: name, n, correct, accuracy and its 95 % Wilson `interval`,
        macro_f1 (over the classes that occur or are predicted in the group); and with more than one group `gap`: the
        names of the `highest` and the `lowest` accuracy, their difference `accuracy`, and whether the two intervals
        `overlap` (where they do not, the groups differ).

    Raises:
        DataError: there is not one group for each example.
    """
    if len(groups) != len(labels):
        raise DataError(f"data.group_field={field}: {len(labels)} examples have {len(groups)} groups")
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names.tolist()):
        truths, answers = labels[group_of == number], predictions[group_of == number]
        n, hits = len(truths), int((truths == answers).sum())
        row = {"name": name, "n": n, "correct": hits, "accuracy": hits / n, "interval": list(wilson(hits, n))}
        rows.append(row | {"macro_f1": macro_f1(answers, truths)})
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
    """Score one pass; the result holds the scores and what they were computed from.

    Args:
        split: test, or validation where the data has no test split.
        class_names: c names.
        labels: int32 [n], ordered by example index.
        probabilities: float32 [n, c].
        names: the file or record of each example.
        groups: the group of each example, a value of `group_field`; adds `groups` to the metrics (`score_groups`).

    Raises:
        DataError: as `score`, or when there is not one name, or one group, for each example.
    """
    labels, probabilities = np.asarray(labels, np.int32), np.asarray(probabilities, np.float32)
    if len(names) != len(labels):
        raise DataError(f"split {split!r} has {len(labels)} labels but {len(names)} file names: read it again whole")
    scores = score(labels, probabilities, class_names)
    if groups is not None:
        scores["groups"] = score_groups(labels, probabilities.argmax(axis=1), groups, group_field)
    return EvaluationResult(split, tuple(class_names), labels, probabilities, tuple(names), scores)
