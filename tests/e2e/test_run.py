"""Whole runs: output files, log, stop and resume."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, assert_same_run, start_until, story, train, variables_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    (folder.parent / "stdout.txt").write_text(train(*SMALL, f"output_dir={folder}").stdout)
    return folder


def test_the_output_is_complete(undisturbed: Path) -> None:
    for name in (
        "config.yaml", "run.json", "metrics.jsonl", "DONE", "checkpoints/LATEST", "checkpoints/BEST",
        "report/index.html", "report/report.json", "report/predictions.csv", "report/curves.png",
        "export/saved_model/1/saved_model.pb", "export/labels.txt", "export/model_card.md",
    ):  # fmt: skip
        assert (undisturbed / name).stat().st_size > 0, name
    for phase in ("head", "fine_tune"):
        assert list((undisturbed / "logs" / phase).glob("events.out.tfevents.*"))
    report = json.loads((undisturbed / "report" / "report.json").read_text())
    assert report["test"]["n"] == 90
    assert report["test"]["split"] == "test"
    assert set(report["phases"]) == {"head", "fine_tune"}
    assert report["export"]["saved_model"]["largest_difference"] < 1e-5
    rows = list(csv.DictReader((undisturbed / "report" / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(90))
    assert sum(row["truth"] == row["prediction"] for row in rows) / 90 == pytest.approx(report["test"]["accuracy"])


def test_the_log(undisturbed: Path) -> None:
    text = (undisturbed.parent / "stdout.txt").read_text()
    for pattern in (
        "data: digits, 10 classes, 90 train, 90 validation, 90 test",
        "phase head: 12 steps (2 epochs), adam 0.001 constant",
        "the first trainable one is",
        "test accuracy ",
        "tensorboard --logdir",
    ):
        assert pattern in text


def test_every_step_and_epoch_is_logged_once(undisturbed: Path) -> None:
    lines = story(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [6, 12, 18, 24]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [4, 6, 8, 12, 16, 18, 20, 24]


def test_a_finished_run_is_not_repeated(undisturbed: Path) -> None:
    assert "finished" in train(*SMALL, f"output_dir={undisturbed}").stdout


def test_another_configuration_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    error = train(*SMALL, f"output_dir={undisturbed}", "training.batch_size=8", "seed=1", code=2).stderr
    assert "seed: 42 -> 1" in error
    assert "training.batch_size: 16 -> 8" in error
    assert "resume=never" in train(*SMALL, f"output_dir={undisturbed}", "resume=never", code=2).stderr


def test_a_run_resumed_after_sigterm_is_equal_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child, _ = start_until("step 16/", *SMALL, f"output_dir={folder}")
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate()
    assert child.returncode == 75
    assert "SIGTERM at step" in error
    assert f"output_dir={folder}" in error
    assert not (folder / "DONE").exists()
    # In addition, the newest checkpoint is damaged: the run resumes from the one before.
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip() / "variables.npz"
    newest.write_bytes(newest.read_bytes()[:1000])
    output = train(*SMALL, f"output_dir={folder}", "resume=must").stdout
    assert (folder / "checkpoints" / f"damaged-{newest.parent.name}").is_dir()
    assert "weights: this run's checkpoint at step" in output
    assert_same_run(undisturbed, folder)


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(undisturbed: Path, tmp_path: Path) -> None:
    longer = [o for o in SMALL if not o.startswith("phases.fine_tune.epochs")] + ["phases.fine_tune.epochs=3"]
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    train(*longer, f"output_dir={folder}", "phases.fine_tune.schedule.name=cosine")
    assert [line["step"] for line in story(folder) if line["kind"] == "epoch"] == [6, 12, 18, 24, 30]
    assert json.loads((folder / "DONE").read_text())["step"] == 30


@pytest.mark.slow
def test_pointers_that_a_kill_has_left_behind_are_written_again(undisturbed: Path, tmp_path: Path) -> None:
    killed = tmp_path / "run"
    shutil.copytree(undisturbed, killed)
    (killed / "DONE").unlink()
    for pointer in ("LATEST", "BEST"):
        (killed / "checkpoints" / pointer).unlink()
    train(*SMALL, f"output_dir={killed}")
    for pointer in ("LATEST", "BEST"):
        file = Path("checkpoints") / pointer
        assert (killed / file).read_text() == (undisturbed / file).read_text()
    assert_same_run(undisturbed, killed)


@pytest.mark.slow
def test_warm_start_loads_the_weights_of_another_run(undisturbed: Path, tmp_path: Path) -> None:
    result = train(
        *SMALL, f"output_dir={tmp_path / 'run'}", f"warm_start={undisturbed}", "debug.max_steps=1",
        "phases.head.optimizer.learning_rate=1e-12", "phases.fine_tune.optimizer.learning_rate=1e-12",
    )  # fmt: skip
    assert "weights: warm start from" in result.stdout
    # The averages of the best checkpoint, as validated and exported.
    before, after = variables_of(undisturbed, "BEST"), variables_of(tmp_path / "run", "LATEST")
    np.testing.assert_allclose(after["head/output/bias"], before["ema/head/output/bias"], atol=1e-6)


@pytest.mark.slow
def test_a_damaged_best_checkpoint_does_not_lose_the_run(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "DONE").unlink()
    best = (folder / "checkpoints" / "BEST").read_text().strip()
    (folder / "checkpoints" / best / "variables.npz").write_bytes(b"")
    assert best in train(*SMALL, f"output_dir={folder}").stdout
    assert (folder / "DONE").exists()
