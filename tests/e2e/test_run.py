"""Whole runs by the command line: what they leave, how they stop, how they go on."""

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, assert_same_run, run, start, story, variables_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run(*SMALL, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    (folder.parent / "stdout.txt").write_text(result.stdout)
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


def test_the_terminal_says_what_matters(undisturbed: Path) -> None:
    text = (undisturbed.parent / "stdout.txt").read_text()
    for sentence in (
        "data: digits, 10 classes, 90 train, 90 validation, 90 test",
        "phase head: 12 steps (2 epochs), adam 0.001 constant",
        "the first that trains is",
        "test accuracy ",
        "next:  tensorboard --logdir",
    ):
        assert sentence in text


def test_every_step_and_epoch_is_told_once(undisturbed: Path) -> None:
    lines = story(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [6, 12, 18, 24]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [4, 6, 8, 12, 16, 18, 20, 24]


def test_a_finished_run_says_so_and_exits_0(undisturbed: Path) -> None:
    again = run(*SMALL, f"output_dir={undisturbed}")
    assert again.returncode == 0
    assert "is finished already (it holds DONE)" in again.stdout


def test_another_configuration_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    other = run(*SMALL, f"output_dir={undisturbed}", "training.batch_size=8", "seed=1")
    assert other.returncode == 2
    assert "holds a run with another configuration" in other.stderr
    assert "seed: 42 -> 1" in other.stderr
    assert "training.batch_size: 16 -> 8" in other.stderr
    never = run(*SMALL, f"output_dir={undisturbed}", "resume=never")
    assert never.returncode == 2
    assert "resume=never, but" in never.stderr


def test_sigterm_saves_and_the_next_start_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(*SMALL, f"output_dir={folder}")
    assert child.stdout is not None
    for line in child.stdout:
        if "step 16/" in line:
            break
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate()
    assert child.returncode == 75
    assert "SIGTERM at step" in err
    assert f"Start the same command again with output_dir={folder} to go on" in err
    assert not (folder / "DONE").exists()
    # The newest checkpoint is damaged on top of it: the one before must do.
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip() / "variables.npz"
    newest.write_bytes(newest.read_bytes()[:1000])
    again = run(*SMALL, f"output_dir={folder}", "resume=must")
    assert again.returncode == 0, again.stderr
    assert "going back to the one before" in again.stdout
    assert "weights: this run's checkpoint at step" in again.stdout
    assert_same_run(undisturbed, folder)


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(undisturbed: Path, tmp_path: Path) -> None:
    longer = [o for o in SMALL if not o.startswith("phases.fine_tune.epochs")] + ["phases.fine_tune.epochs=3"]
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    result = run(*longer, f"output_dir={folder}", "phases.fine_tune.schedule.name=cosine")
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in story(folder) if line["kind"] == "epoch"] == [6, 12, 18, 24, 30]
    assert json.loads((folder / "DONE").read_text())["step"] == 30


@pytest.mark.slow
def test_warm_start_takes_another_runs_weights(undisturbed: Path, tmp_path: Path) -> None:
    result = run(
        *SMALL, f"output_dir={tmp_path / 'run'}", f"warm_start={undisturbed}", "debug.max_steps=1",
        "phases.head.optimizer.learning_rate=1e-12", "phases.fine_tune.optimizer.learning_rate=1e-12",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "weights: warm start from" in result.stdout
    # The best checkpoint's averages: what that run validated and exported.
    before, after = variables_of(undisturbed, "BEST"), variables_of(tmp_path / "run", "LATEST")
    np.testing.assert_allclose(after["head/output/bias"], before["ema/head/output/bias"], atol=1e-6)


@pytest.mark.slow
def test_a_damaged_best_checkpoint_does_not_lose_the_run(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "DONE").unlink()
    best = (folder / "checkpoints" / "BEST").read_text().strip()
    newest = (folder / "checkpoints" / "LATEST").read_text().strip()
    (folder / "checkpoints" / best / "variables.npz").write_bytes(b"")
    result = run(*SMALL, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    if best == newest:
        assert "going back to the one before" in result.stdout
    else:
        assert "does not match its checksum; the last weights go on instead" in result.stdout
    assert (folder / "DONE").exists()
