"""Scores per group of a run, by a field of its records."""

import json
from pathlib import Path

import pytest

from tests.data.test_subgroups import write_dataset_with_groups
from tests.e2e.running import train


@pytest.mark.slow
def test_a_run_reports_its_scores_per_group(tmp_path: Path) -> None:
    root = write_dataset_with_groups(tmp_path / "clinic", {"train": 30, "test": 24})
    out = tmp_path / "run"
    result = train(
        "data=tfds", f"data.root={root}", "data.group_field=site", "model=glyphs_mobilenet_v2", "model.image_size=32",
        "~phases.fine_tune", "phases.head.epochs=1", "training.batch_size=8", "export.formats=[]", f"output_dir={out}",
    )  # fmt: skip
    report = json.loads((out / "report" / "report.json").read_text())
    test = report["test"]
    assert test["groups"]["field"] == "site"
    assert [(row["name"], row["n"]) for row in test["groups"]["rows"]] == [("north", 12), ("south", 12)]
    assert sum(row["correct"] for row in test["groups"]["rows"]) == test["correct"]
    gap = test["groups"]["gap"]
    accuracy, f1 = f"{gap['accuracy']:.4f}", f"macro F1 {test['macro_f1']:.4f}"
    for text in ("by site", accuracy, gap["highest"], gap["lowest"], f1):
        assert text in result.stdout
    assert "Largest gap" in (out / "report" / "index.html").read_text()
    assert "| site | examples | accuracy |" in (out / "export" / "model_card.md").read_text()
    assert report["phases"]["head"]["val_macro_f1"] >= 0
