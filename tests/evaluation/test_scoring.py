"""The scores of an epoch against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score

from trainer.evaluation.metrics import macro_f1, score, top_k
from trainer.evaluation.scoring import validation_scores


def drawn(classes: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), n).astype(np.float32)
    return probabilities, rng.integers(0, classes - 1, n)  # the last class never occurs


def test_the_loss_and_accuracy_of_an_epoch() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float32)
    scores = validation_scores(probabilities, np.array([0, 1, 1]))
    assert scores["val_loss"] == pytest.approx(-(np.log(0.5) + np.log(0.75) + np.log(1e-7)) / 3)
    assert scores["val_accuracy"] == pytest.approx(2 / 3)
    assert scores["val_n"] == 3


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
def test_top_5_and_macro_f1_are_those_of_scikit_learn(classes: int) -> None:
    probabilities, labels = drawn(classes)
    scores = validation_scores(probabilities, labels)
    answers = probabilities.argmax(-1)
    assert scores["val_macro_f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    if classes > 5:
        assert scores["val_top_5"] == top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
    else:
        assert "val_top_5" not in scores


def test_equal_probabilities_count_as_the_report_counts_them() -> None:
    alike, labels = np.full((7, 7), 1 / 7, np.float32), np.arange(7)
    assert top_k(alike, labels) == 5
    assert score(labels, alike, [str(k) for k in range(7)])["top_5"] == pytest.approx(5 / 7)


def test_macro_f1_counts_a_class_that_is_only_predicted() -> None:
    assert macro_f1(np.array([0, 2]), np.array([0, 1])) == pytest.approx(1 / 3)
