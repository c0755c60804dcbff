"""A whole run whose scores are told apart by a field of its records."""

import json
from pathlib import Path

import pytest

from tests.data.test_subgroups import write_dataset_with_groups
from tests.e2e.running import run


@pytest.mark.slow
def test_a_run_tells_its_scores_apart_by_group(tmp_path: Path) -> None:
    root = write_dataset_with_groups(tmp_path / "clinic", {"train": 30, "test": 24})
    out = tmp_path / "run"
    result = run(
        "data=tfds", f"data.root={root}", "data.group_field=site", "model=glyphs_mobilenet_v2", "model.image_size=32",
        "~phases.fine_tune", "phases.head.epochs=1", "training.batch_size=8", "export.formats=[]", f"output_dir={out}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report" / "report.json").read_text())
    test = report["test"]
    assert test["groups"]["field"] == "site"
    assert [(row["name"], row["n"]) for row in test["groups"]["rows"]] == [("north", 12), ("south", 12)]
    assert sum(row["correct"] for row in test["groups"]["rows"]) == test["correct"]
    gap = test["groups"]["gap"]
    assert (
        f"  by site: at most {gap['accuracy']:.4f} apart, between {gap['highest']} and {gap['lowest']}" in result.stdout
    )
    assert f"; macro F1 {test['macro_f1']:.4f}" in result.stdout
    assert "Largest gap" in (out / "report" / "index.html").read_text()
    assert "| site | examples | accuracy |" in (out / "export" / "model_card.md").read_text()
    assert report["phases"]["head"]["val_macro_f1"] >= 0
