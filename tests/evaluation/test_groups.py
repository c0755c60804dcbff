"""The table of groups against scikit-learn and by hand, and how report and card show it."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from tests.evaluation.examples import HOSTILE, make_result
from tests.report.test_write import Page, write
from trainer.errors import DataError
from trainer.evaluation.intervals import wilson
from trainer.evaluation.metrics import evaluate_arrays, score_groups

LABELS = np.array([0, 1, 0, 1, 2, 0], np.int32)
ANSWERS = np.array([0, 0, 0, 1, 2, 0], np.int32)
GROUPS = ("b", "b", "a", "a", "a", "a")


def test_groups_by_hand() -> None:
    found = score_groups(LABELS, ANSWERS, GROUPS, "site")
    assert found["field"] == "site"
    first, second = found["rows"]
    assert first == {
        "name": "a",
        "n": 4,
        "correct": 4,
        "accuracy": 1.0,
        "interval": list(wilson(4, 4)),
        "macro_f1": 1.0,
    }
    assert (second["n"], second["correct"], second["accuracy"]) == (2, 1, 0.5)
    assert second["macro_f1"] == pytest.approx(1 / 3)  # class 0: 2/3; class 1: 0
    assert found["gap"] == {"accuracy": 0.5, "highest": "a", "lowest": "b", "overlap": True}


def test_each_group_is_scored_as_a_split_of_its_own() -> None:
    result = make_result(7, 400)
    groups = np.random.default_rng(1).choice(["x", "y", "z"], 400, p=[0.7, 0.2, 0.1])
    answers = result.probabilities.argmax(-1)
    rows = score_groups(result.labels, answers, groups.tolist(), "camera")["rows"]
    assert sum(row["n"] for row in rows) == 400
    for row in rows:
        mine = groups == row["name"]
        assert row["accuracy"] == pytest.approx((answers[mine] == result.labels[mine]).mean())
        assert row["macro_f1"] == pytest.approx(f1_score(result.labels[mine], answers[mine], average="macro"))


def test_groups_that_differ_are_told_from_groups_that_may_not() -> None:
    labels = np.zeros(200, np.int32)
    answers = np.r_[np.zeros(100, np.int32), np.zeros(50, np.int32), np.ones(50, np.int32)]
    groups = ["all right"] * 100 + ["half right"] * 100
    assert score_groups(labels, answers, groups, "g")["gap"]["overlap"] is False
    assert "gap" not in score_groups(labels, answers, ["one"] * 200, "g")


def test_one_group_for_each_example() -> None:
    with pytest.raises(DataError, match=r"data\.group_field=site: 6 examples have 2 groups"):
        score_groups(LABELS, ANSWERS, ("a", "b"), "site")


def test_the_report_shows_groups(tmp_path: Path) -> None:
    plain = make_result(3, 60)
    groups = [HOSTILE if k % 3 else "others" for k in range(60)]
    result = evaluate_arrays(
        "test", plain.class_names, plain.labels, plain.probabilities, plain.names, groups, "who & how"
    )
    report = write(tmp_path / "with", result)
    assert [row["name"] for row in report["test"]["groups"]["rows"]] == [HOSTILE, "others"]
    assert json.loads((tmp_path / "with" / "report.json").read_text()) == report
    page = Page((tmp_path / "with" / "index.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert "Groups" in page.text
    assert "who & how" in page.text
    gap = report["test"]["groups"]["gap"]
    assert f"Largest gap: {100 * gap['accuracy']:.1f} points of accuracy, between" in page.text
    write(tmp_path / "without", plain)
    assert "Groups" not in Page((tmp_path / "without" / "index.html").read_text(encoding="utf-8")).text
