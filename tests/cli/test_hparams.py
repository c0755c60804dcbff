"""The event files of a sweep, read back by TensorBoard's own HParams page."""

from pathlib import Path
from typing import Any

import pytest

from tests.tensorboard import post
from trainer.cli import sweep as hparams


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two jobs with two hyperparameters; the second one failed."""
    names = ["phases.head.optimizer.learning_rate", "augmentation"]
    (tmp_path / hparams.EVENT_FILE).write_bytes(hparams.serialize_columns(names))
    jobs: list[tuple[list[Any], dict[str, float]]] = [
        ([0.01, "light"], {"val_accuracy": 0.75, "test_accuracy": 0.5}),
        ([1e38, "none"], {}),
    ]
    for number, (values, scores) in enumerate(jobs):
        folder = tmp_path / str(number)
        folder.mkdir()
        row = hparams.serialize_job(str(number), dict(zip(names, values, strict=True)), scores, bool(scores))
        (folder / hparams.EVENT_FILE).write_bytes(row)
    return tmp_path


def test_the_page_names_the_columns(sweep: Path) -> None:
    page = post(sweep, "hparams/experiment", {"experimentName": ""})
    assert {h["name"] for h in page["hparamInfos"]} == {"phases.head.optimizer.learning_rate", "augmentation"}
    assert [m["name"]["tag"] for m in page["metricInfos"]] == ["val_accuracy", "test_accuracy"]


def test_the_page_has_a_row_for_each_job(sweep: Path) -> None:
    statuses = ["STATUS_SUCCESS", "STATUS_FAILURE"]
    query = {"experimentName": "", "startIndex": 0, "sliceSize": 9, "allowedStatuses": statuses, "colParams": []}
    page = post(sweep, "hparams/session_groups", query)
    first, second = sorted(page["sessionGroups"], key=lambda group: group["name"])
    assert first["name"] == "0"
    assert first["hparams"] == {"phases.head.optimizer.learning_rate": 0.01, "augmentation": "light"}
    assert {m["name"]["tag"]: m["value"] for m in first["metricValues"]} == {"val_accuracy": 0.75, "test_accuracy": 0.5}
    assert second["hparams"]["phases.head.optimizer.learning_rate"] == 1e38
    assert "metricValues" not in second or second["metricValues"] == []
    assert [group["sessions"][0]["status"] for group in (first, second)] == statuses
