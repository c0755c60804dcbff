"""Confident learning, by hand and on swapped labels."""

import numpy as np

from trainer.evaluation.label_errors import describe_label_errors, find_label_errors
from trainer.evaluation.metrics import score_predictions


def test_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    of_one = np.array([0.1, 0.2, 0.9, 0.8, 0.7, 0.3])
    # thresholds: class 0 (0.9 + 0.8 + 0.1) / 3 = 0.6; class 1 (0.8 + 0.7 + 0.3) / 3 = 0.6
    indices, suggested = find_label_errors(labels, np.stack([1 - of_one, of_one], axis=1))
    assert (indices.tolist(), suggested.tolist()) == ([2, 5], [1, 0])  # margins 0.1 - 0.9 and 0.3 - 0.7


def test_a_class_of_low_probabilities_has_a_low_threshold() -> None:
    """An argmax would detect nothing: class 0 is the most probable one of every example."""
    labels = np.array([0, 0, 0, 1, 1])
    of_one = np.array([0.05, 0.05, 0.4, 0.4, 0.3])
    # thresholds: class 0 (0.95 + 0.95 + 0.6) / 3 = 0.83; class 1 0.35. Example 2 reaches only that of class 1.
    indices, suggested = find_label_errors(labels, np.stack([1 - of_one, of_one], axis=1))
    assert (indices.tolist(), suggested.tolist()) == ([2], [1])


def test_a_class_without_examples_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    assert len(find_label_errors(np.array([0, 1]), probabilities)[0]) == 0


def test_swapped_labels_come_first() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 1000)
    logits = rng.normal(size=(1000, 5))
    logits[np.arange(1000), truth] += 3.0
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    labels = truth.copy()
    swapped = rng.choice(1000, 50, replace=False)
    labels[swapped] = (truth[swapped] + 1) % 5
    indices, suggested = find_label_errors(labels, probabilities)
    assert len(indices) == 34  # as cleanlab 2.9.0, in this order: filter_by="confident_learning",
    assert indices[:5].tolist() == [661, 572, 541, 827, 796]  # return_indices_ranked_by="normalized_margin"
    assert np.isin(indices, swapped).all()
    assert (suggested == truth[indices]).all()
    assert (np.diff(probabilities[indices, labels[indices]] - probabilities[indices, suggested]) >= 0).all()

    names = [f"{k}.jpg" for k in range(1000)]
    errors = describe_label_errors(score_predictions("test", list("abcde"), labels, probabilities, names))
    row = errors["rows"][0]
    assert (errors["count"], row["file"]) == (len(indices), f"{indices[0]}.jpg")
    assert (row["label"], row["suggestion"]) == ("abcde"[labels[indices[0]]], "abcde"[suggested[0]])
    assert row["label_probability"] < row["suggestion_probability"]
