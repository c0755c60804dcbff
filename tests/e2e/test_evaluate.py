"""`python -m trainer.evaluate` on a run of the built-in digits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from tests.data.images import fill_folder
from tests.e2e.running import program, train
from trainer.report.compare import compare_runs, read_scored_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    train("experiment=quickstart", "debug.max_examples=90", "phases.head.epochs=2", "phases.fine_tune.epochs=1",
          "training.ema=0.9", "augmentation=none", "export.formats=[saved_model]", f"output_dir={out}")  # fmt: skip
    return out


def error_of(*arguments: str) -> str:
    """The only error line of an evaluation that ends with 2."""
    error = program("evaluate", *arguments, code=2).stderr
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    return line


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_runs_own_checkpoint_and_data_give_its_own_report(trained: Path) -> None:
    done = program("evaluate", f"run={trained}")
    (folder,) = (trained / "evaluations").iterdir()
    assert folder.name == "best-digits-test"
    mine, theirs = report_of(folder), report_of(trained / "report")
    assert mine["test"] == theirs["test"]
    assert mine["phases"] == theirs["phases"]
    assert mine["duplicates"] == theirs["duplicates"]
    for name in ("predictions.csv", "probabilities.npy"):
        assert (folder / name).read_bytes() == (trained / "report" / name).read_bytes()
    assert f"report   {folder}/index.html" in done.stdout
    (pair,) = compare_runs([read_scored_run(str(trained), "run"), read_scored_run(str(folder), "again")]).pairs
    assert (pair.won, pair.lost, pair.p) == (0, 0, 1.0)


def test_another_checkpoint_another_split_and_another_folder(trained: Path, tmp_path: Path) -> None:
    step = min(int(p.name.removeprefix("step-")) for p in (trained / "checkpoints").glob("step-*"))
    program("evaluate", f"run={trained}", f"checkpoint={step}", "split=train", f"output={tmp_path / 'other'}")
    report = report_of(tmp_path / "other")
    assert (report["test"]["split"], report["test"]["n"]) == ("train", 90)
    assert report["test"]["note"]  # scores of training examples are no measure of quality
    assert report["label_errors"] == {}
    assert report["timing"]["checkpoint_step"] == step
    assert not (trained / "evaluations" / f"step-{step}-digits-train").exists()


def test_other_data_with_the_same_classes(trained: Path, tmp_path: Path) -> None:
    names = report_of(trained / "report")["data"]["class_names"]
    photos = fill_folder(tmp_path / "photos", dict.fromkeys(names, 3))
    arguments = ("data=image_folder", f"data.root={photos}", "data.validation_fraction=0")
    done = program("evaluate", f"run={trained}", *arguments)
    report = report_of(trained / "evaluations" / "best-photos-train")
    assert (report["test"]["n"], report["data"]["name"]) == (30, "photos")
    assert "splits" in report["test"]["note"]
    assert "count" in report["label_errors"]
    assert "30 examples" in done.stdout
    assert "\naccuracy " in done.stdout
    assert report["duplicates"]["compared"] == {"train": 30}

    one = fill_folder(tmp_path / "one", {names[3]: 4})
    done = program("evaluate", f"run={trained}", "data=image_folder", f"data.root={one}")
    report = report_of(trained / "evaluations" / "best-one-train")
    assert (report["test"]["n"], len(report["data"]["class_names"])) == (4, len(names))
    assert "their rows in the report are empty" in done.stdout

    fill_folder(photos, {"zebra": 1}, 30)
    assert re.search("run=.*zebra", error_of(f"run={trained}", *arguments))


@pytest.mark.parametrize(
    ("argument", "pattern"),
    [
        ("checkpoint=7777", "7777.*[0-9]"),  # lists the steps
        ("checkpoint=newest", "checkpoint=newest.*best.*last"),
        ("model.dropout=0.5", "model.dropout"),
        ("split=holdout", "split=holdout.*train, validation.*test"),
        ("data=nonsense", "data.*nonsense|nonsense.*data"),
        ("run=elsewhere", "run"),
    ],
)
def test_mistakes_are_one_line(trained: Path, argument: str, pattern: str) -> None:
    assert re.search(pattern, error_of(f"run={trained}", argument))


def test_a_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    assert str(tmp_path) in error_of(f"run={tmp_path}")


def test_the_figures_are_in_tensorboard(trained: Path) -> None:
    (file,) = (trained / "logs" / "report").iterdir()
    events = [Event.FromString(record) for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()]
    tags = {value.tag for event in events for value in event.summary.value}
    assert tags == {f"report/{name}" for name in report_of(trained / "report")["figures"]}
    assert {"report/curves", "report/confusion", "report/least_sure"} <= tags


def test_the_page_has_the_command_and_the_heatmaps(trained: Path) -> None:
    page = (trained / "report" / "index.html").read_text()
    assert "python -m trainer experiment=quickstart" in page
    assert page.count('class="heat"') >= 24


def test_an_overfitted_run_is_evaluated_on_the_batch_that_it_trained_on(tmp_path: Path) -> None:
    out = tmp_path / "overfitted"
    train("experiment=quickstart", "debug.overfit=true", "training.batch_size=16", "~phases.fine_tune", "phases.head.epochs=30",
          "export.formats=[]", f"runtime.cache_dir={tmp_path / 'cache'}", f"output_dir={out}")  # fmt: skip
    program("evaluate", f"run={out}")
    (folder,) = (out / "evaluations").iterdir()
    mine, theirs = report_of(folder), report_of(out / "report")
    assert mine["data"]["fingerprint"] == theirs["data"]["fingerprint"]
    assert mine["data"]["counts"] == theirs["data"]["counts"] == {"train": 16}
    assert mine["test"] == theirs["test"] | {"note": mine["test"]["note"]}
    assert mine["label_errors"] == theirs["label_errors"] == {}
    program("evaluate", f"run={out}", "data=digits", "split=validation", f"output={tmp_path / 'all'}")
    assert report_of(tmp_path / "all")["test"]["n"] > 16
