"""The table, the page and backbones.json, of given predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from trainer.backbones.folds import FoldPlan
from trainer.backbones.results import (
    FoldResult,
    Measurements,
    ResultFolder,
    make_folder_name,
    require_comparison_folder,
)
from trainer.backbones.table import (
    ComparisonFacts,
    EvaluatedBackbone,
    describe,
    explain_columns,
    find_fastest,
    format_table,
    rank,
    write_results,
)  # fmt: skip
from trainer.config.phases import Phase
from trainer.errors import ConfigError
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.paired import compare_paired
from trainer.storage.path import storage_path
from trainer.types import Dataset, Split

N = 200
LABELS = np.tile([0, 1], N // 2).astype(np.int32)
HOSTILE = "<script>alert(1)</script>\n' \"é"


def make_network(
    label: str, wrong: range, *, single_ms: float = 10.0, parameters: int = 1_000_000
) -> EvaluatedBackbone:
    """A network that predicts all examples correctly except those at `wrong`, in two folds."""
    predictions = LABELS.astype(np.int64)
    predictions[list(wrong)] = 1 - predictions[list(wrong)]
    halves = np.arange(N)[: N // 2], np.arange(N)[N // 2 :]
    folds = [FoldResult(half, predictions[half], 3.0) for half in halves]
    measured = Measurements(224, parameters, 4 * parameters, single_ms, 5.0, 32, "one CPU, 2 cores")
    return EvaluatedBackbone(label, folds, measured)


def make_facts(*networks: EvaluatedBackbone, random: str = "") -> ComparisonFacts:
    dataset = Dataset(HOSTILE, ("a", HOSTILE), {"train": Split("train", LABELS)}, "1")
    folds = FoldPlan(np.repeat([0, 1], N // 2), 2, "as given")
    weights = {each.label: "none" if each.label == random else "imagenet" for each in networks}
    phase = Phase.model_validate({"thaw": "none", "epochs": 5})
    return ComparisonFacts(dataset, folds, "one CPU, 2 cores", "head", phase, weights)


NETWORKS = (
    make_network("large", range(20), single_ms=50.0),
    make_network("small", range(5, 27), single_ms=8.0),
    make_network("bad", range(100), single_ms=1.0),
    make_network("equal", range(180, 200), parameters=2_000_000),
)


def test_accuracy_intervals_and_tests_are_over_all_out_of_fold_predictions() -> None:
    rows = rank(NETWORKS, make_facts(*NETWORKS))
    assert [row.label for row in rows] == ["large", "equal", "small", "bad"]  # of two equal ones, the smaller first
    assert [row.accuracy for row in rows] == [0.9, 0.9, 0.89, 0.5]
    assert rows[2].interval == compute_wilson_interval(178, N)
    assert rows[0].fold_accuracies == [0.8, 1.0]
    correct = {each.label: np.concatenate([f.predictions for f in each.fold_results]) == LABELS for each in NETWORKS}
    raw = [compare_paired(correct["large"], correct[name]).p for name in ("equal", "small", "bad")]
    assert rows[0].p is None
    assert rows[3].p == pytest.approx(min(3 * raw[2], 1))  # Holm: the smallest one times their number
    assert [row.is_worse for row in rows] == [False, False, False, True]
    assert find_fastest(rows).label == "small"
    assert rows[0].train_seconds == pytest.approx(3.0 + 100 * 5.0 / 1e3)


def test_an_example_that_one_network_could_not_read_counts_for_none() -> None:
    short = NETWORKS[0].fold_results[1]
    partial = EvaluatedBackbone("partial", [NETWORKS[0].fold_results[0], FoldResult(short.indices[1:], short.predictions[1:], 1.0)],
                              NETWORKS[0].measurements)  # fmt: skip
    assert {row.num_examples for row in rank([partial, NETWORKS[1]], make_facts(partial, NETWORKS[1]))} == {N - 1}


def test_the_table_has_80_columns_and_marks_random_weights() -> None:
    long = make_network(
        "InceptionResNetV2 (a very long path of weights)", range(3), parameters=134_000_000, single_ms=12345.6
    )
    facts = make_facts(*NETWORKS, long, random="bad")
    rows = rank([*NETWORKS, long], facts)
    lines = format_table(rows)
    assert len(lines) == 6
    assert all(len(line) <= 80 for line in lines), lines
    assert lines[0].split() == ["backbone", "acc.", "95", "%", "params", "MB", "ms/1", "ms/32", "train", "p"]
    (bad,) = [line for line in lines if line.startswith("bad *")]
    assert bad.split()[2:5] == ["50.0%", "43.1-56.9", "1.00M"]
    assert bad.endswith("<.001")
    sentences = describe(rows, facts)
    assert any("random weights" in line for line in explain_columns(rows))
    assert sentences[0] == "n = 200 out-of-fold predictions, 2 folds (as given)"


def test_the_files_state_the_same_and_escape_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = make_network(HOSTILE, range(3))
    facts = make_facts(*NETWORKS, hostile)
    rows = rank([*NETWORKS, hostile], facts)
    write_results(storage_path(str(tmp_path)), rows, facts)
    printed = capsys.readouterr().out
    assert "acc." in printed
    summary = json.loads((tmp_path / "backbones.json").read_text())
    assert [each["accuracy"] for each in summary["networks"]] == [row.accuracy for row in rows]
    assert summary["networks"][0] | {"p": None, "difference": None} == summary["networks"][0]
    assert summary["folds"] == {"count": 2, "reason": "as given", "examples": N}
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "<svg" in page
    require_comparison_folder(storage_path(str(tmp_path)))  # it can continue there


def test_a_folder_of_something_else_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with raises(ConfigError, key="output", value=str(tmp_path), problem=r"index\.html"):
        require_comparison_folder(storage_path(str(tmp_path)))
    require_comparison_folder(storage_path(str(tmp_path / "new")))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"indices": [1, 0], "predictions": [0, 0], "seconds": 1}', "\x00",
     '{"indices": [0, 9], "predictions": [0, 0], "seconds": 1}', '{"indices": [0], "predictions": [2], "seconds": 1}',
     '{"indices": [0], "predictions": [0.5], "seconds": 1}', '{"indices": [0], "predictions": [0], "seconds": -1}'],
)  # fmt: skip
def test_a_corrupt_result_is_computed_again(tmp_path: Path, content: str) -> None:
    stored = ResultFolder(storage_path(str(tmp_path)), num_examples=9, num_classes=2)
    result = FoldResult(np.array([2, 5]), np.array([0, 1]), 1.5)
    stored.write_fold(0, result)
    again: Any = stored.read_fold(0)
    np.testing.assert_array_equal(again.indices, result.indices)
    (tmp_path / "fold-1.json").write_text(content)
    assert stored.read_fold(0) is None
    (tmp_path / "measurements.json").write_text(content)
    assert stored.read_measurements() is None
    stored.write_measurements(NETWORKS[0].measurements)
    assert stored.read_measurements() == NETWORKS[0].measurements


def test_the_name_of_a_folder_is_that_of_what_its_results_depend_on() -> None:
    first = make_folder_name("VGG16 (a/../b)", {"seed": 1})
    assert "/" not in first
    assert first == make_folder_name("VGG16 (a/../b)", {"seed": 1})
    assert first != make_folder_name("VGG16 (a/../b)", {"seed": 2})
