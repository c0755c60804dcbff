"""Scores against numbers worked out by hand and against scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import classification_report, log_loss

from tests.evaluation.examples import make_result
from trainer.errors import DataError
from trainer.evaluation.intervals import wilson
from trainer.evaluation.metrics import calibration, evaluate_arrays, score

NAMES = ("a", "b", "c")
# Predictions a, b, b, a for truths a, a, b, b: two of four are right; c never occurs and is never predicted.
LABELS = np.array([0, 0, 1, 1], np.int32)
PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2], [0.6, 0.4, 0.0]], np.float32)


def test_scores_worked_out_by_hand() -> None:
    scores = score(LABELS, PROBABILITIES, NAMES)
    assert (scores["n"], scores["correct"], scores["accuracy"], scores["majority"]) == (4, 2, 0.5, 0.5)
    assert scores["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.2, 0.5, 0.4]).mean(), rel=1e-6)
    assert scores["macro_f1"] == 0.5  # of a and b; nothing is known of c
    assert scores["mean_confidence"] == pytest.approx(0.675)
    assert "top_5" not in scores
    row_of_a = {"name": "a", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "undefined": []}
    assert scores["per_class"][0] == row_of_a
    assert scores["per_class"][2]["undefined"] == ["precision", "recall", "f1"]
    assert scores["per_class"][2]["f1"] == 0.0


def test_a_class_never_predicted_and_a_class_without_examples_are_told_apart() -> None:
    scores = score(np.array([0, 1]), np.array([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]), NAMES)
    assert [row["undefined"] for row in scores["per_class"]] == [[], ["precision"], ["recall"]]
    assert scores["macro_f1"] == pytest.approx(1 / 3)  # b was missed and c made up: both count as 0


def test_scores_agree_with_scikit_learn() -> None:
    result = make_result(12, 400)
    answers = result.probabilities.argmax(axis=1)
    expected = classification_report(result.labels, answers, output_dict=True)
    assert result.metrics["accuracy"] == pytest.approx(expected["accuracy"])
    assert result.metrics["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    per_class = result.metrics["per_class"]
    assert isinstance(per_class, list)
    for k, row in enumerate(per_class):
        theirs = expected[str(k)]
        assert row["precision"] == pytest.approx(theirs["precision"])
        assert row["recall"] == pytest.approx(theirs["recall"])
        assert row["support"] == theirs["support"]
    exact = result.probabilities.astype(np.float64)
    loss = log_loss(result.labels, exact / exact.sum(axis=1, keepdims=True), labels=range(12))
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_top_5_counts_ties_in_the_order_of_the_classes() -> None:
    names = [str(k) for k in range(6)]
    alike = np.full((6, 6), 1 / 6, np.float32)
    scores = score(np.arange(6), alike, names)
    assert scores["top_5"] == pytest.approx(5 / 6)
    assert scores["accuracy"] == pytest.approx(1 / 6)
    assert scores["top_5_interval"] == list(wilson(5, 6))


def test_everything_is_ready_for_json() -> None:
    result = make_result(7, 50, empty=(3,))
    assert json.loads(json.dumps(result.metrics, allow_nan=False)) == result.metrics


def test_a_certain_and_right_model_has_a_loss_of_zero_and_a_certain_and_wrong_one_a_finite_loss() -> None:
    certain = np.eye(3, dtype=np.float32)
    assert str(score(np.arange(3), certain, NAMES)["loss"]) == "0.0"
    assert score(np.array([1, 2, 0]), certain, NAMES)["loss"] == pytest.approx(-np.log(1e-7))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # the first four: Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_within_0_and_1_and_knows_nothing_of_no_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 1000):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0


def test_calibration_by_hand() -> None:
    # Bins of 1/15. Two predictions at 0.95 (one right), in the last bin; one at 0.5 (right) in (7/15, 8/15].
    error, bins = calibration(np.array([0.95, 0.95, 0.5]), np.array([True, False, True]))
    assert error == pytest.approx(2 / 3 * abs(0.5 - 0.95) + 1 / 3 * abs(1.0 - 0.5))
    assert len(bins) == 15
    assert [b["count"] for b in bins] == [0] * 7 + [1] + [0] * 6 + [2]
    assert bins[14] == {"low": 14 / 15, "high": 1.0, "count": 2, "confidence": pytest.approx(0.95), "accuracy": 0.5}
    assert bins[0]["confidence"] is None


def test_calibration_bins_are_closed_above() -> None:
    _, bins = calibration(np.array([1 / 15, 1.0]), np.array([True, True]))
    assert bins[0]["count"] == 1
    assert bins[14]["count"] == 1


def test_a_perfectly_calibrated_answer_has_no_error() -> None:
    error, _ = calibration(np.full(4, 0.75), np.array([True, True, True, False]))
    assert error == pytest.approx(0.0)


def test_evaluate_arrays_keeps_what_the_scores_came_from() -> None:
    result = evaluate_arrays("validation", NAMES, LABELS, PROBABILITIES, list("wxyz"))
    assert (result.split, result.class_names, result.names) == ("validation", NAMES, ("w", "x", "y", "z"))
    assert result.labels.dtype == np.int32
    assert result.probabilities.dtype == np.float32
    assert result.metrics == score(LABELS, PROBABILITIES, NAMES)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="there is no example to evaluate: the split is empty"):
        score(np.zeros(0, np.int32), np.zeros((0, 3), np.float32), NAMES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_probabilities_that_are_not_finite_are_refused(value: float) -> None:
    broken = PROBABILITIES.copy()
    broken[2, 1] = value
    with pytest.raises(DataError, match=r"not finite for 1 of 4 examples \(the first is example 2\).*have diverged"):
        score(LABELS, broken, NAMES)


def test_a_label_without_a_class_is_refused() -> None:
    with pytest.raises(DataError, match="the label 3 of example 1 has no class: there are 3 class names"):
        score(np.array([0, 3, 0, 0]), PROBABILITIES, NAMES)


def test_probabilities_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"need probabilities of shape \(4, 2\), not \(4, 3\)"):
        score(LABELS, PROBABILITIES, ("a", "b"))


def test_a_missing_file_name_is_refused() -> None:
    with pytest.raises(DataError, match="split 'test' has 4 labels but 3 file names"):
        evaluate_arrays("test", NAMES, LABELS, PROBABILITIES, list("wxy"))
