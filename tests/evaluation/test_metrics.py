"""Scores against numbers computed by hand and against scikit-learn."""

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import classification_report, log_loss

from tests.errors import raises
from tests.evaluation.examples import make_result
from trainer.errors import DataError
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.metrics import compute_scores, measure_calibration, score_predictions

NAMES = ("a", "b", "c")
# Predictions a, b, b, a for truths a, a, b, b: two of four are right; c never occurs and is never predicted.
LABELS = np.array([0, 0, 1, 1], np.int32)
PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2], [0.6, 0.4, 0.0]], np.float32)


def test_scores_by_hand() -> None:
    scores = compute_scores(LABELS, PROBABILITIES, NAMES)
    assert (scores["n"], scores["correct"], scores["accuracy"], scores["majority"]) == (4, 2, 0.5, 0.5)
    assert scores["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert scores["loss"] == pytest.approx(-np.log([0.9, 0.2, 0.5, 0.4]).mean(), rel=1e-6)
    assert scores["macro_f1"] == 0.5  # of a and b
    assert scores["mean_confidence"] == pytest.approx(0.675)
    assert "top_5" not in scores
    row_of_a = {"name": "a", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "undefined": []}
    assert scores["per_class"][0] == row_of_a
    assert scores["per_class"][2]["undefined"] == ["precision", "recall", "f1"]
    assert scores["per_class"][2]["f1"] == 0.0


def test_a_class_never_predicted_differs_from_a_class_without_examples() -> None:
    scores = compute_scores(np.array([0, 1]), np.array([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]), NAMES)
    assert [row["undefined"] for row in scores["per_class"]] == [[], ["precision"], ["recall"]]
    assert scores["macro_f1"] == pytest.approx(1 / 3)  # b is never predicted and c never occurs: both count as 0


def test_scores_agree_with_scikit_learn() -> None:
    result = make_result(12, 400)
    expected = classification_report(result.labels, result.probabilities.argmax(axis=1), output_dict=True)
    assert result.metrics["accuracy"] == pytest.approx(expected["accuracy"])
    assert result.metrics["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    metrics: dict[str, Any] = result.metrics
    for k, row in enumerate(metrics["per_class"]):
        theirs = {key: expected[str(k)][key] for key in ("precision", "recall", "support")}
        assert {key: row[key] for key in theirs} == pytest.approx(theirs)
    exact = result.probabilities.astype(np.float64)
    loss = log_loss(result.labels, exact / exact.sum(axis=1, keepdims=True), labels=range(12))
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_top_5_counts_ties_in_the_order_of_the_classes() -> None:
    scores = compute_scores(np.arange(6), np.full((6, 6), 1 / 6, np.float32), [str(k) for k in range(6)])
    assert (scores["top_5"], scores["accuracy"]) == pytest.approx((5 / 6, 1 / 6))
    assert scores["top_5_interval"] == list(compute_wilson_interval(5, 6))


def test_everything_is_ready_for_json() -> None:
    result = make_result(7, 50, empty=(3,))
    assert json.loads(json.dumps(result.metrics, allow_nan=False)) == result.metrics


def test_a_certain_and_right_model_has_a_loss_of_zero_and_a_certain_and_wrong_one_a_finite_loss() -> None:
    certain = np.eye(3, dtype=np.float32)
    assert str(compute_scores(np.arange(3), certain, NAMES)["loss"]) == "0.0"
    assert compute_scores(np.array([1, 2, 0]), certain, NAMES)["loss"] == pytest.approx(-np.log(1e-7))


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
def test_wilson_matches_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert compute_wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_within_0_and_1() -> None:
    assert compute_wilson_interval(0, 0) == (0.0, 1.0)
    for n in (1, 7, 1000):
        assert (compute_wilson_interval(0, n)[0], compute_wilson_interval(n, n)[1]) == (0.0, 1.0)


def test_calibration_by_hand() -> None:
    # Bins of 1/15. Two predictions at 0.95 (one right), in the last bin; one at 0.5 (right) in (7/15, 8/15].
    error, bins = measure_calibration(np.array([0.95, 0.95, 0.5]), np.array([True, False, True]))
    assert error == pytest.approx(2 / 3 * abs(0.5 - 0.95) + 1 / 3 * abs(1.0 - 0.5))
    assert len(bins) == 15
    assert [b["count"] for b in bins] == [0] * 7 + [1] + [0] * 6 + [2]
    assert bins[14] == {"low": 14 / 15, "high": 1.0, "count": 2, "confidence": pytest.approx(0.95), "accuracy": 0.5}
    assert bins[0]["confidence"] is None


def test_calibration_bins_are_closed_above() -> None:
    _, bins = measure_calibration(np.array([1 / 15, 1.0]), np.array([True, True]))
    assert (bins[0]["count"], bins[14]["count"]) == (1, 1)


def test_perfect_calibration_has_no_error() -> None:
    error, _ = measure_calibration(np.full(4, 0.75), np.array([True, True, True, False]))
    assert error == pytest.approx(0.0)


def test_the_result_has_the_arrays_of_the_scores() -> None:
    result = score_predictions("validation", NAMES, LABELS, PROBABILITIES, list("wxyz"))
    assert (result.split, result.class_names, result.names) == ("validation", NAMES, ("w", "x", "y", "z"))
    assert (result.labels.dtype, result.probabilities.dtype) == (np.int32, np.float32)
    assert result.metrics == compute_scores(LABELS, PROBABILITIES, NAMES)


NOT_FINITE = np.where([[False] * 3, [False] * 3, [False, True, False], [False] * 3], np.nan, PROBABILITIES)
INFINITE, OUT_OF_RANGE = np.where(np.isnan(NOT_FINITE), np.inf, NOT_FINITE), np.array([0, 3, 0, 0])
WRONG: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "no examples": ((np.zeros(0), np.zeros((0, 3)), NAMES, ()), "has no examples", "add examples"),
    "NaN": ((LABELS, NOT_FINITE, NAMES, "wxyz"), r"1 of 4 .*first is example 2\) are not finite: .*diverged", "lower learning rate"),
    "infinite": ((LABELS, INFINITE, NAMES, "wxyz"), "1 of 4 .* are not finite", ""),
    "label": ((OUT_OF_RANGE, PROBABILITIES, NAMES, "wxyz"), "label 3 of example 1 is out of range: .* 0 to 2", "correct"),
    "shape": ((LABELS, PROBABILITIES, ("a", "b"), "wxyz"), r"shape \(4, 3\) instead of .* \(4, 2\)", "same run"),
    "file names": ((LABELS, PROBABILITIES, NAMES, "wxy"), "'test' has 4 labels but 3 file names", "read"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_match_are_rejected(name: str) -> None:
    (labels, probabilities, classes, files), problem, fix = WRONG[name]
    with raises(DataError, problem=problem, fix=fix):
        score_predictions("test", classes, labels, probabilities, files)
