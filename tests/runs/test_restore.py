"""A warm start reads the checkpoint that is configured, and changes nothing of the other run."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer.errors import DataError
from trainer.runs import publisher
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.restore import match_warm_start, read_warm_start
from trainer.storage.path import storage_path
from trainer.training.state import RunState


def run_with_steps(home: Path, *steps: int, best: int) -> Path:
    folder = CheckpointFolder(home / "checkpoints", len(steps), print)
    for step in steps:
        folder.save(RunState(step=step, best={"step": best}).to_json(), {"w": np.array(step)}, best)
    return home / "checkpoints"


def test_the_best_checkpoint_of_a_run_or_the_configured_one_is_read(tmp_path: Path) -> None:
    checkpoints = run_with_steps(tmp_path, 1, 2, 3, best=2)
    for source, step in ((tmp_path, 2), (checkpoints / "step-00000001", 1)):
        path, values = read_warm_start(str(source), tmp_path / "cache")
        assert (path, values["w"]) == (str(checkpoints / f"step-0000000{step}"), step)
    (checkpoints / "BEST").unlink()
    assert read_warm_start(str(tmp_path), tmp_path / "cache")[1]["w"] == 3


def test_a_missing_checkpoint_is_not_replaced_by_another_one(tmp_path: Path) -> None:
    source = str(run_with_steps(tmp_path, 1, best=1) / "step-00000002")
    with raises(DataError, "warm_start", source, problem="there is no checkpoint"):
        read_warm_start(source, tmp_path / "cache")


def test_a_run_in_a_bucket_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "PUBLISH_SECONDS", 0.05)
    checkpoints = run_with_steps(tmp_path / "run", 1, best=1)
    with running(tmp_path / "buckets"):
        home = storage_path(f"gs://{BUCKET}/run")
        (home / "metrics.jsonl").write("{}\n")
        (home / "checkpoints" / "LATEST").write("step-00000001-1a2b3c4d\n")
        for file in (checkpoints / "step-00000001").iterdir():
            (home / "checkpoints" / "step-00000001-1a2b3c4d" / file.name).upload(file)
        before = home.list()
        assert read_warm_start(str(home), tmp_path / "cache")[1]["w"] == 1
        time.sleep(0.5)
        assert home.list() == before


MODEL = {"backbone/conv/kernel": (3, 3, 3, 16), "backbone/bn/gamma": (16,), "backbone/top/kernel": (1, 1, 16, 64),
         "head/output/kernel": (64, 5), "head/output/bias": (5,)}  # fmt: skip


def test_a_head_of_other_classes_keeps_its_initial_values() -> None:
    other = MODEL | {"head/output/kernel": (64, 3), "head/output/bias": (3,)}
    assert match_warm_start(MODEL, other, "outputs/a") == (list(MODEL)[:3], "")
    assert match_warm_start(MODEL, MODEL, "outputs/a") == (list(MODEL), "")


def test_another_width_is_rejected_with_counts_and_shapes() -> None:
    other = MODEL | {"backbone/conv/kernel": (3, 3, 3, 32), "backbone/bn/gamma": (32,)}
    problem = r"2 of 3 variables .*conv/kernel \[3, 3, 3, 32\], here \[3, 3, 3, 16\]"
    with raises(DataError, "warm_start", "outputs/a", fix="model.alpha", problem=problem):
        match_warm_start(MODEL, other, "outputs/a")


def test_another_network_is_rejected_even_if_its_head_fits() -> None:
    other = {"backbone/stem/kernel": (7, 7, 3, 64), "head/output/bias": (5,)}
    with raises(DataError, "warm_start", "outputs/a", fix="model.backbone", problem="none of the backbone's"):
        match_warm_start(MODEL, other, "outputs/a")


def test_what_the_checkpoint_lacks_of_the_backbone_is_warned_of() -> None:
    other = {name: shape for name, shape in MODEL.items() if "top" not in name}
    names, warning = match_warm_start(MODEL, other, "outputs/a")
    assert names == list(other)
    assert warning.startswith("warm_start=outputs/a has only 2 of the backbone's 3 variables: backbone/top/kernel")
