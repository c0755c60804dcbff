"""Whole runs: output files, log, monitoring as in a pod, stop and resume."""

import csv
import json
import re
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from scripts.same_bits import free_ports
from tests.e2e.running import SMALL, assert_same_run, start_until, story, train, variables_of
from tests.e2e.test_pod import LABELS, as_pod, entries, message, response
from tests.e2e.workers import start_workers
from tests.monitoring.test_http import parse_metrics

pytestmark = pytest.mark.timeout(900)


@dataclass
class Monitored:
    """A run in a pod, with its log, health and metrics from its start to its end."""

    folder: Path
    pod: list[str]  # the overrides of its pod
    log: str = ""
    healths: list[tuple[int, str]] = field(default_factory=list)  # code and text
    metrics: list[dict[str, float]] = field(default_factory=list)
    phases: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Monitored:
    """The undisturbed run, in a pod whose health and metrics are read ten times a second."""
    home, (port,) = tmp_path_factory.mktemp("undisturbed"), free_ports(1)
    seen = Monitored(home / "run", as_pod(home / "pod", port))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
        run = start_workers(home, 1, *SMALL, *seen.pod, f"output_dir={seen.folder}")
    while run[0].poll() is None:
        if (health := response(port))[0]:
            seen.healths.append(health)
        code, text = response(port, "/metrics")
        if code == 200:  # not before the start, after the end, or while the watchdog responds
            seen.phases |= set(re.findall(r'kubetune_info{phase="(\w+)"', text))
            seen.metrics.append(parse_metrics(text))
        time.sleep(0.1)
    seen.log = run.output(0)
    assert run.wait() == [0], seen.log
    return seen


@pytest.fixture(scope="module")
def undisturbed(monitored: Monitored) -> Path:
    return monitored.folder


@dataclass
class Resumed:
    """A run that SIGTERM has interrupted and whose newest checkpoint is then damaged, after its second start."""

    folder: Path
    exports: bool
    first: str  # the output of the first start
    error: str  # what the first start wrote to stderr
    second: str  # the output of the second start
    damaged: str  # the name of the checkpoint


# An export is a function of the weights, which are compared, so that the quick one resumes without.
@pytest.fixture(scope="module", params=["[]", pytest.param("[saved_model]", marks=pytest.mark.slow)])
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    overrides = (*SMALL, f"export.formats={request.param}")
    folder = tmp_path_factory.mktemp("resumed") / "run"
    child, first = start_until("step 16/", *overrides, f"output_dir={folder}")
    child.send_signal(signal.SIGTERM)
    rest, error = child.communicate()
    assert child.returncode == 75
    assert not (folder / "DONE").exists()
    # In addition, the newest checkpoint is damaged: the run resumes from the one before.
    newest = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip() / "variables.npz"
    newest.write_bytes(newest.read_bytes()[:1000])
    output = train(*overrides, f"output_dir={folder}", "resume=must").stdout
    return Resumed(folder, request.param != "[]", first + rest, error, output, newest.parent.name)


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


def test_the_log(resumed: Resumed) -> None:
    for pattern in (
        "data: digits, 10 classes, 90 train, 90 validation, 90 test",
        "phase head: 12 steps (2 epochs), adam 0.001 constant",
        "the first trainable one is",
        "test accuracy ",
        "tensorboard --logdir",
    ):
        assert pattern in resumed.first + resumed.second


def test_every_step_and_epoch_is_logged_once(undisturbed: Path) -> None:
    lines = story(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [6, 12, 18, 24]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [4, 6, 8, 12, 16, 18, 20, 24]


def test_a_finished_run_is_not_repeated(undisturbed: Path) -> None:
    assert "finished" in train(*SMALL, f"output_dir={undisturbed}").stdout


def test_another_configuration_in_the_same_folder_is_rejected(undisturbed: Path) -> None:
    error = train(*SMALL, f"output_dir={undisturbed}", "training.batch_size=8", "seed=1", code=2).stderr
    assert "seed: 42 -> 1" in error
    assert "training.batch_size: 16 -> 8" in error
    assert "resume=never" in train(*SMALL, f"output_dir={undisturbed}", "resume=never", code=2).stderr


def test_a_run_is_monitored_from_its_start_to_its_end(monitored: Monitored, tmp_path: Path) -> None:
    pod = monitored.folder.parent / "pod"
    assert {code for code, _ in monitored.healths} == {200}
    assert {"importing TensorFlow\n", "compiling the first step\n", "export\n"} <= {
        text for _, text in monitored.healths
    }
    assert monitored.phases == {"start", "head", "fine_tune", "finish"}

    counted = [s["kubetune_step"] for s in monitored.metrics if "kubetune_step" in s]
    assert counted == sorted(counted)
    last = monitored.metrics[-1]
    assert (last["kubetune_step"], last["kubetune_epoch"], last["kubetune_workers"]) == (24, 4, 1)
    assert 0 < last["kubetune_goodput_ratio"] < 1
    assert 0 <= last["kubetune_data_wait_ratio"] <= 1
    assert last["kubetune_images_per_second"] > 0
    assert last["kubetune_loss"] > 0
    assert 0 < last["kubetune_last_step_age_seconds"] < 300
    assert 0 < last["kubetune_checkpoint_age_seconds"] < 300
    assert last["kubetune_last_progress_age_seconds"] <= last["kubetune_last_step_age_seconds"]

    log = entries(monitored.log)
    warnings = [entry for entry in log if entry["severity"] != "INFO"]
    assert {entry["severity"] for entry in warnings} == {"WARNING"}
    assert any("debug.max_examples=90" in entry["message"] for entry in warnings)
    assert {entry[LABELS]["worker"] for entry in log} == {"0"}
    lines = [json.loads(line) for line in (monitored.folder / "metrics.jsonl").read_text().splitlines()]
    intervals = [entry for entry in log if "images_per_second" in entry]
    for line, entry in zip([line for line in lines if line["kind"] == "train"], intervals, strict=True):
        expected = {key: value for key, value in line.items() if key not in ("kind", "timing")}
        assert {key: entry[key] for key in expected} == expected
        assert entry["goodput"] == line["timing"]["goodput"]
    accuracies = [line["val_accuracy"] for line in lines if line["kind"] == "epoch"]
    assert [entry["val_accuracy"] for entry in log if "val_accuracy" in entry] == accuracies
    accuracy = json.loads((monitored.folder / "report" / "report.json").read_text())["test"]["accuracy"]
    assert message(pod).startswith(f"exit code 0 (done): test accuracy {accuracy:.4f} (95 % interval ")
    assert message(pod).endswith(f"{monitored.folder}/report/index.html")

    again = start_workers(tmp_path, 1, *SMALL, *monitored.pod, f"output_dir={monitored.folder}")
    assert again.wait() == [0]
    assert [entry["severity"] for entry in entries(again.output(0))] == ["INFO"]
    assert re.match(rf"exit code 0 \(done\): {monitored.folder} .*finished", message(pod))


def test_a_run_resumed_after_sigterm_is_equal_bit_for_bit(undisturbed: Path, resumed: Resumed) -> None:
    assert "SIGTERM at step" in resumed.error
    assert f"output_dir={resumed.folder}" in resumed.error
    assert (resumed.folder / "checkpoints" / f"damaged-{resumed.damaged}").is_dir()
    assert "weights: this run's checkpoint at step" in resumed.second
    assert_same_run(undisturbed, resumed.folder, exported=resumed.exports)


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
