"""`python -m trainer.evaluate` on a run of the built-in digits: the same scores as the run's own, and what else it can."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event

from tests.e2e.running import ROOT, run
from trainer.report.compare import compare_runs
from trainer.report.compare_runs import read_scored

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    done = run("experiment=quickstart", "debug.max_examples=90", "phases.head.epochs=2", "phases.fine_tune.epochs=1",
               "training.ema=0.9", "augmentation=none", "export.formats=[saved_model]", f"output_dir={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "trainer.evaluate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_runs_own_checkpoint_and_data_give_its_own_report(trained: Path) -> None:
    done = evaluate(f"run={trained}")
    assert done.returncode == 0, done.stderr
    (folder,) = (trained / "evaluations").iterdir()
    assert folder.name == "best-digits-test"
    mine, theirs = report_of(folder), report_of(trained / "report")
    assert mine["test"] == theirs["test"]
    assert mine["phases"] == theirs["phases"]
    assert mine["duplicates"] == theirs["duplicates"]
    assert (folder / "predictions.csv").read_bytes() == (trained / "report" / "predictions.csv").read_bytes()
    assert f"report   {folder}/index.html" in done.stdout
    found = compare_runs([read_scored(str(trained), "run"), read_scored(str(folder), "again")])
    assert (found.pairs[0].won, found.pairs[0].lost, found.pairs[0].p) == (0, 0, 1.0)


def test_another_checkpoint_another_split_and_another_folder(trained: Path, tmp_path: Path) -> None:
    step = min(int(p.name.removeprefix("step-")) for p in (trained / "checkpoints").glob("step-*"))
    done = evaluate(f"run={trained}", f"checkpoint={step}", "split=train", f"output={tmp_path / 'there'}")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "there")
    assert (report["test"]["split"], report["test"]["n"]) == ("train", 90)
    assert "has learned from these very examples" in report["test"]["note"]
    assert report["timing"]["checkpoint_step"] == step
    assert not (trained / "evaluations" / f"step-{step}-digits-train").exists()


def test_other_data_with_the_same_classes(trained: Path, tmp_path: Path) -> None:
    for k, name in enumerate(report_of(trained / "report")["data"]["class_names"]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    arguments = ("data=image_folder", f"data.root={tmp_path / 'photos'}", "data.validation_fraction=0")
    done = evaluate(f"run={trained}", *arguments)
    assert done.returncode == 0, done.stderr
    report = report_of(trained / "evaluations" / "best-photos-train")
    assert (report["test"]["n"], report["data"]["name"]) == (30, "photos")
    assert report["test"]["note"].startswith("This data is not divided into splits, so all of it was scored")
    assert "evaluating 30 examples of photos" in done.stdout
    assert "\naccuracy " in done.stdout
    assert report["duplicates"]["compared"] == {"train": 30}

    (tmp_path / "photos" / "zebra").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "zebra" / "1.png")
    done = evaluate(f"run={trained}", *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"run={trained} knows 10 classes and the data has 11: 'zebra' is unknown to it; give data" in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("checkpoint=7777",), "has no checkpoint 7777; the steps it has:"),
        (("checkpoint=newest",), "checkpoint=newest: give best, last or a step"),
        (("model.dropout=0.5",), "model.dropout: an evaluation takes the model as it is"),
        (("split=holdout",), "split=holdout: the data has train, validation, test"),
        (("data=nonsense",), "there is no such data"),
        (("run=elsewhere",), "run=elsewhere: is given twice"),
    ],
)
def test_mistakes_are_one_sentence(trained: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = evaluate(f"run={trained}", *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert sentence in line


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = evaluate(f"run={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds no run" in done.stderr


def test_the_figures_are_in_tensorboard(trained: Path) -> None:
    (file,) = (trained / "logs" / "report").iterdir()
    events = [Event.FromString(record) for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    tags = {value.tag for event in events for value in event.summary.value}
    assert tags == {f"report/{name}" for name in report_of(trained / "report")["figures"]}
    assert {"report/curves", "report/confusion", "report/least_sure"} <= tags


def test_the_page_tells_the_command_and_shows_where_the_model_looked(trained: Path) -> None:
    page = (trained / "report" / "index.html").read_text()
    assert "python -m trainer experiment=quickstart" in page
    assert page.count('class="heat"') >= 24
    assert "images a second" in page


def test_an_overfitted_run_is_evaluated_on_the_batch_that_it_trained_on(tmp_path: Path) -> None:
    out = tmp_path / "overfitted"
    told = ("experiment=quickstart", "debug.overfit=true", "training.batch_size=16", "~phases.fine_tune", "phases.head.epochs=30",
            "export.formats=[]", f"runtime.cache_dir={tmp_path / 'cache'}", f"output_dir={out}")  # fmt: skip
    trained = run(*told)
    assert trained.returncode == 0, trained.stderr
    done = evaluate(f"run={out}")
    assert done.returncode == 0, done.stderr
    (folder,) = (out / "evaluations").iterdir()
    mine, theirs = report_of(folder), report_of(out / "report")
    assert mine["data"]["fingerprint"] == theirs["data"]["fingerprint"]
    assert mine["data"]["counts"] == theirs["data"]["counts"] == {"train": 16}
    assert {k: v for k, v in mine["test"].items() if k != "note"} == {
        k: v for k, v in theirs["test"].items() if k != "note"
    }
    assert "has learned from these very examples" in mine["test"]["note"]
    others = evaluate(f"run={out}", "data=digits", "split=validation", f"output={tmp_path / 'all'}")
    assert others.returncode == 0, others.stderr
    assert report_of(tmp_path / "all")["test"]["n"] > 16
