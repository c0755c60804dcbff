"""Validation scores of an epoch against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score

from trainer.evaluation.metrics import compute_macro_f1, count_top_k
from trainer.evaluation.scoring import compute_validation_scores


def test_the_loss_and_accuracy_of_an_epoch() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float32)
    losses = np.array([0.7, 0.3, 460_583.0], np.float32)  # of the logits; used where the probability has underflowed
    scores = compute_validation_scores(probabilities, np.array([0, 1, 1]), losses)
    assert scores["val_loss"] == pytest.approx((-np.log(0.5) - np.log(0.75) + 460_583) / 3)
    assert (scores["val_accuracy"], scores["val_n"]) == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
def test_top_5_and_macro_f1_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), 300).astype(np.float32)
    labels = rng.integers(0, classes - 1, 300)  # the last class never occurs
    scores = compute_validation_scores(probabilities, labels, np.zeros(300, np.float32))
    assert scores["val_macro_f1"] == pytest.approx(f1_score(labels, probabilities.argmax(-1), average="macro"))
    if classes > 5:
        assert scores["val_top_5"] == top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
    else:
        assert "val_top_5" not in scores


def test_ties_and_classes_that_are_only_predicted() -> None:
    assert count_top_k(np.full((7, 7), 1 / 7, np.float32), np.arange(7)) == 5
    assert compute_macro_f1(np.array([0, 2]), np.array([0, 1])) == pytest.approx(1 / 3)
