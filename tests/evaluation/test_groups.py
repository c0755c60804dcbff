"""Scores by group against scikit-learn and by hand, and in the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from tests.errors import raises
from tests.evaluation.examples import HOSTILE, make_result
from tests.report.test_write import Page, write
from trainer.errors import DataError
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.metrics import score_groups, score_predictions

LABELS = np.array([0, 1, 0, 1, 2, 0], np.int32)
PREDICTIONS = np.array([0, 0, 0, 1, 2, 0], np.int32)
GROUPS = ("b", "b", "a", "a", "a", "a")


def test_groups_by_hand() -> None:
    scores = score_groups(LABELS, PREDICTIONS, GROUPS, "site")
    assert scores["field"] == "site"
    first, second = scores["rows"]
    interval = list(compute_wilson_interval(4, 4))
    assert first == {"name": "a", "n": 4, "correct": 4, "accuracy": 1.0, "interval": interval, "macro_f1": 1.0}
    assert (second["n"], second["correct"], second["accuracy"]) == (2, 1, 0.5)
    assert second["macro_f1"] == pytest.approx(1 / 3)  # class 0: 2/3; class 1: 0
    assert scores["gap"] == {"accuracy": 0.5, "highest": "a", "lowest": "b", "overlap": True}


def test_each_group_is_scored_as_a_split_of_its_own() -> None:
    result = make_result(7, 400)
    groups = np.random.default_rng(1).choice(["x", "y", "z"], 400, p=[0.7, 0.2, 0.1])
    predictions = result.probabilities.argmax(-1)
    rows = score_groups(result.labels, predictions, groups.tolist(), "camera")["rows"]
    assert sum(row["n"] for row in rows) == 400
    for row in rows:
        mine = groups == row["name"]
        assert row["accuracy"] == pytest.approx((predictions[mine] == result.labels[mine]).mean())
        assert row["macro_f1"] == pytest.approx(f1_score(result.labels[mine], predictions[mine], average="macro"))


def test_overlap_of_groups() -> None:
    labels = np.zeros(200, np.int32)
    predictions = np.repeat([0, 1], [150, 50])
    groups = ["all correct"] * 100 + ["half correct"] * 100
    assert score_groups(labels, predictions, groups, "g")["gap"]["overlap"] is False
    assert "gap" not in score_groups(labels, predictions, ["one"] * 200, "g")


def test_one_group_for_each_example() -> None:
    with raises(DataError, "data.group_field", "site", "one group to each example", "6 examples have 2 groups"):
        score_groups(LABELS, PREDICTIONS, ("a", "b"), "site")


def test_the_report_shows_groups(tmp_path: Path) -> None:
    plain = make_result(3, 60)
    groups = [HOSTILE if k % 3 else "others" for k in range(60)]
    arrays = plain.class_names, plain.labels, plain.probabilities, plain.names
    result = score_predictions("test", *arrays, groups, "who & how")
    report = write(tmp_path / "with", result)
    assert [row["name"] for row in report["test"]["groups"]["rows"]] == [HOSTILE, "others"]
    assert json.loads((tmp_path / "with" / "report.json").read_text()) == report
    page = Page((tmp_path / "with" / "index.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    gap = report["test"]["groups"]["gap"]
    texts = ["Groups", "who & how", f"Largest gap: {100 * gap['accuracy']:.1f} points of accuracy, between"]
    assert [text for text in texts if text not in page.text] == []
    write(tmp_path / "without", plain)
    assert "Groups" not in Page((tmp_path / "without" / "index.html").read_text(encoding="utf-8")).text
