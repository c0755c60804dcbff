"""Confident learning, by hand and on labels that were made wrong on purpose."""

import numpy as np

from trainer.evaluation.label_errors import describe_label_errors, find_label_errors
from trainer.evaluation.metrics import evaluate_arrays


def test_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    of_one = np.array([0.1, 0.2, 0.9, 0.8, 0.7, 0.3])
    probabilities = np.stack([1 - of_one, of_one], axis=1)
    # thresholds: class 0 (0.9 + 0.8 + 0.1) / 3 = 0.6; class 1 (0.8 + 0.7 + 0.3) / 3 = 0.6
    found, rather = find_label_errors(labels, probabilities)
    assert found.tolist() == [2, 5]  # margins 0.1 - 0.9 and 0.3 - 0.7
    assert rather.tolist() == [1, 0]


def test_a_class_the_model_is_never_sure_of_has_a_low_threshold() -> None:
    """Where an argmax would see nothing: every example is most probably of class 0."""
    labels = np.array([0, 0, 0, 1, 1])
    of_one = np.array([0.05, 0.05, 0.4, 0.4, 0.3])
    probabilities = np.stack([1 - of_one, of_one], axis=1)
    # thresholds: class 0 (0.95 + 0.95 + 0.6) / 3 = 0.83; class 1 0.35. Example 2 reaches only that of class 1.
    found, rather = find_label_errors(labels, probabilities)
    assert (found.tolist(), rather.tolist()) == ([2], [1])


def test_a_class_without_examples_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    found, _ = find_label_errors(np.array([0, 1]), probabilities)
    assert len(found) == 0


def test_swapped_labels_come_first() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 1000)
    logits = rng.normal(size=(1000, 5))
    logits[np.arange(1000), truth] += 3.0
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    labels = truth.copy()
    swapped = rng.choice(1000, 50, replace=False)
    labels[swapped] = (truth[swapped] + 1) % 5
    found, rather = find_label_errors(labels, probabilities)
    assert len(found) == 34  # cleanlab 2.9.0 finds these, and in this order: filter_by="confident_learning",
    assert found[:5].tolist() == [661, 572, 541, 827, 796]  # return_indices_ranked_by="normalized_margin"
    assert np.isin(found, swapped).all()
    assert (rather == truth[found]).all()
    margins = probabilities[found, labels[found]] - probabilities[found, rather]
    assert (np.diff(margins) >= 0).all()

    names = [f"{k}.jpg" for k in range(1000)]
    told = describe_label_errors(evaluate_arrays("test", list("abcde"), labels, probabilities, names))
    assert told["count"] == len(found)
    row = told["rows"][0]
    assert row["file"] == f"{found[0]}.jpg"
    assert (row["label"], row["suggestion"]) == ("abcde"[labels[found[0]]], "abcde"[rather[0]])
    assert row["label_probability"] < row["suggestion_probability"]
