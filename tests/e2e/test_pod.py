"""A run as a pod has it (`runtime=pod`): asked for its health and metrics, read line by line, ended with a reason."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.same_bits import free_ports
from tests.e2e.running import ROOT, SMALL
from tests.e2e.workers import SHARED, Workers, start_workers
from tests.monitoring.test_http import get, metrics
from trainer.errors import INTERRUPTED, WRONG_INPUT

# Two epochs of six steps.
SHORT = (*SMALL, "phases.head.epochs=1", "phases.fine_tune.epochs=1")
LABELS = "logging.googleapis.com/labels"


@pytest.fixture(autouse=True)
def _log_level_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)


def as_pod(folder: Path, port: int) -> list[str]:
    """The preset of a pod, with a pod's places moved to where a test may write."""
    folder.mkdir(parents=True, exist_ok=True)
    return ["runtime=pod", f"runtime.http_port={port}", f"runtime.termination_log={folder / 'termination-log'}",
            f"runtime.cache_dir={os.environ['KUBETUNE_CACHE']}"]  # fmt: skip


def entries(log: str) -> list[dict[str, Any]]:
    """The lines of a log; each must be an object with the fields of Cloud Logging."""
    found = [json.loads(line) for line in log.splitlines()]
    assert all({"severity", "time", "message"} <= entry.keys() for entry in found)
    return found


def message(folder: Path) -> str:
    return (folder / "termination-log").read_text()


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(port: int, path: str = "/healthz") -> tuple[int, str]:
    """What is answered now; (0, "") before anything listens."""
    try:
        return get(port, path)
    except OSError:
        return 0, ""


def steps(port: int) -> float:
    code, text = answers(port, "/metrics")
    found = re.search(r"^kubetune_step (\S+)$", text, re.MULTILINE) if code else None
    return float(found[1]) if found else 0.0


def test_a_run_is_watched_from_its_start_to_its_end(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    pod = as_pod(tmp_path / "pod", port)
    run = start_workers(tmp_path, 1, *SHORT, *pod, f"output_dir={tmp_path / 'run'}")
    healths: list[tuple[int, str]] = []
    seen: list[dict[str, float]] = []
    phases: set[str] = set()
    slowest = 0.0
    while run[0].poll() is None:
        began = time.monotonic()
        if (answer := answers(port))[0]:
            healths.append(answer)
            slowest = max(slowest, time.monotonic() - began)
        try:
            seen.append(metrics(port))
            phases |= set(re.findall(r'kubetune_info{phase="(\w+)"', get(port, "/metrics")[1]))
        except OSError:  # before the start and after the end
            pass
        time.sleep(0.1)
    print(f"{len(healths)} answers, the slowest after {slowest:.2f} s")
    assert run.wait() == [0], run.said(0)
    assert {code for code, _ in healths} == {200}
    assert {"importing TensorFlow\n", "compiling the first step\n", "export\n"} <= {text for _, text in healths}
    assert phases == {"start", "head", "fine_tune", "finish"}

    assert [s["kubetune_step"] for s in seen if "kubetune_step" in s] == sorted(
        s["kubetune_step"] for s in seen if "kubetune_step" in s
    )
    last = seen[-1]
    assert (last["kubetune_step"], last["kubetune_epoch"], last["kubetune_workers"]) == (12, 2, 1)
    assert 0 < last["kubetune_goodput_ratio"] < 1
    assert 0 <= last["kubetune_data_wait_ratio"] <= 1
    assert last["kubetune_images_per_second"] > 0
    assert last["kubetune_loss"] > 0
    assert 0 < last["kubetune_last_step_age_seconds"] < 300
    assert 0 < last["kubetune_checkpoint_age_seconds"] < 300
    assert last["kubetune_last_progress_age_seconds"] <= last["kubetune_last_step_age_seconds"]

    said = entries(run.said(0))
    assert {entry["severity"] for entry in said} == {"INFO"}
    assert {entry[LABELS]["worker"] for entry in said} == {"0"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    intervals = [entry for entry in said if "images_per_second" in entry]
    for line, entry in zip([line for line in lines if line["kind"] == "train"], intervals, strict=True):
        assert {key: entry[key] for key in line if key not in ("kind", "timing")} == {
            key: line[key] for key in line if key not in ("kind", "timing")
        }
        assert entry["goodput"] == line["timing"]["goodput"]
    assert [entry["val_accuracy"] for entry in said if "val_accuracy" in entry] == [
        line["val_accuracy"] for line in lines if line["kind"] == "epoch"
    ]
    accuracy = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["test"]["accuracy"]
    assert message(tmp_path / "pod").startswith(f"exit code 0 (done): test accuracy {accuracy:.4f} (95 % interval ")
    assert message(tmp_path / "pod").endswith(f"{tmp_path}/run/report/index.html")

    again = start_workers(tmp_path / "again", 1, *SHORT, *pod, f"output_dir={tmp_path / 'run'}")
    assert again.wait() == [0]
    assert [entry["severity"] for entry in entries(again.said(0))] == ["INFO"]
    assert message(tmp_path / "pod").startswith(f"exit code 0 (done): {tmp_path}/run is finished already")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 15 small JPEGs, dark and light."""
    rng = np.random.default_rng(1)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(low, low + 100, (60, 80, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02d}.jpg")
    return tmp_path / "photos"


def hang(photos: Path) -> None:
    """Who reads a picture now waits in the operating system for ever, as on a network disk that is gone."""
    for file in photos.glob("*/*.jpg"):
        file.rename(file.with_suffix(".aside"))
        os.mkfifo(file)


def mend(photos: Path) -> None:
    for file in photos.glob("*/*.aside"):
        file.replace(file.with_suffix(".jpg"))


def stuck(tmp_path: Path, photos: Path) -> tuple[Workers, int, list[str]]:
    """A run that hangs inside a step."""
    (port,) = free_ports(1)
    overrides = [
        "data=image_folder", f"data.root={photos}", "data.cache=none", "model=glyphs_mobilenet_v2",
        "training.batch_size=8", "phases.head.epochs=20", "~phases.fine_tune", "runtime.log_every='3 steps'",
        "export.formats=[]", f"output_dir={tmp_path / 'run'}", *as_pod(tmp_path / "pod", port), "runtime.stuck_after=4",
    ]  # fmt: skip
    run = start_workers(tmp_path, 1, *overrides)
    until(lambda: steps(port) >= 6, run[0])
    hang(photos)
    until(lambda: answers(port)[0] == 503, run[0])
    return run, port, overrides


@pytest.mark.slow
def test_a_step_that_hangs_is_noticed_and_sigterm_ends_it_at_once(tmp_path: Path, photos: Path) -> None:
    run, port, _ = stuck(tmp_path, photos)
    time.sleep(1)  # and it stays so
    code, text = get(port, "/healthz")
    assert code == 503
    assert re.fullmatch(r"stuck: nothing has moved for \d+ s \(runtime.stuck_after=4\) in: \w+ after step \d+\n", text)
    assert metrics(port)["kubetune_last_progress_age_seconds"] > 4
    assert metrics(port)["kubetune_last_step_age_seconds"] > 4
    began = time.monotonic()
    run[0].send_signal(signal.SIGTERM)
    assert run.wait(30) == [INTERRUPTED]
    assert time.monotonic() - began < 3
    said = entries(run.said(0))
    (found,) = [entry for entry in said if "the main thread is at" in entry["message"]]
    assert found["severity"] == "ERROR"
    assert re.search(r"in (train_epoch|probabilities)\n", found["message"])
    why = message(tmp_path / "pod")
    assert re.match(r"exit code 75 \(interrupted\): SIGTERM while stuck: nothing has moved for \d+ s", why)
    assert why.endswith(f"Start the same command again with output_dir={tmp_path}/run to go on")
    attempts = json.loads((tmp_path / "run" / "checkpoints" / "attempts.json").read_text())
    assert (
        attempts[-1]["kind"] == "failed"
    )  # counts towards runtime.max_restarts_without_progress: nobody asked it to stop


def test_a_wrong_configuration_is_told_in_the_log_and_in_the_last_message(tmp_path: Path) -> None:
    pod = as_pod(tmp_path, free_ports(1)[0])
    for wrong, why in (("modle=3", "modle: there is no such key"), ("seed=[1", "no viable alternative at input '[1'")):
        run = start_workers(tmp_path, 1, *pod, wrong)
        assert run.wait(60) == [WRONG_INPUT]
        (entry,) = entries(run.said(0))
        assert (entry["severity"], entry["exit_code"]) == ("ERROR", 2)
        assert why in entry["message"]
        assert message(tmp_path).startswith("exit code 2 (configuration or data is wrong): ")
        assert why in message(tmp_path)


@pytest.mark.slow
def test_prepare_in_a_pod(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.prepare", "data=digits", f"output={tmp_path / 'digits'}", "data.shards=2"]
    result = subprocess.run(
        [*command, *as_pod(tmp_path, free_ports(1)[0])], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )  # fmt: skip
    said = entries(result.stdout + result.stderr)
    assert any("1797 images of 10 classes" in entry["message"] for entry in said)
    assert message(tmp_path).startswith(f"exit code 0 (done): {tmp_path / 'digits'} holds 1797 images of 10 classes")


def test_sigterm_ends_prepare_at_once(tmp_path: Path, photos: Path) -> None:
    hang(photos)
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "trainer.prepare",
        "data=image_folder",
        f"data.root={photos}",
        f"output={tmp_path}/out",
    ]
    command += [*as_pod(tmp_path / "pod", port), "runtime.stuck_after=1"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1) as child:
        until(lambda: answers(port)[0] == 503, child)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=20)
    assert child.returncode == INTERRUPTED
    assert [entry["severity"] for entry in entries(out + err)][-2:] == ["ERROR", "WARNING"]
    why = "exit code 75 (interrupted): SIGTERM; start the same command again to write what is missing"
    assert message(tmp_path / "pod") == why


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_stuck_goes_on(tmp_path: Path, photos: Path) -> None:
    first, _, overrides = stuck(tmp_path, photos)
    first[0].send_signal(signal.SIGTERM)
    assert first.wait(30) == [INTERRUPTED]
    mend(photos)
    second = start_workers(tmp_path / "second", 1, *overrides)
    assert second.wait(300) == [0], second.said(0)
    assert "weights: this run's checkpoint at step" in second.said(0)
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_of_two_workers_is_watched_by_itself(tmp_path: Path) -> None:
    ports = free_ports(2)
    long = [*SHARED, "phases.fine_tune.epochs=40", f"output_dir={tmp_path / 'run'}"]
    own = {i: as_pod(tmp_path / f"pod-{i}", port) for i, port in enumerate(ports)}
    workers = start_workers(tmp_path, 2, *long, own=own)
    workers.wait_until(lambda: min(map(steps, ports)) >= 24, "both to train")
    found = [metrics(port) for port in ports]
    assert [f["kubetune_workers"] for f in found] == [2, 2]
    assert [f["kubetune_loss"] > 0 for f in found] == [True, True]
    assert ["kubetune_checkpoint_age_seconds" in f for f in found] == [True, False]  # the chief alone saves
    workers[1].send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        get(ports[1], "/healthz", seconds=5)
    assert workers[0].wait(60) == INTERRUPTED
    workers.kill()
    for index in range(2):
        assert {entry[LABELS]["worker"] for entry in entries(workers.said(index)) if LABELS in entry} == {str(index)}
    assert message(tmp_path / "pod-0").startswith("exit code 75 (interrupted): lost worker 1 (127.0.0.1:")
    assert not (tmp_path / "pod-1" / "termination-log").exists()  # kill -9 leaves nothing


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_leaves_the_step_that_was_saved(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    run = start_workers(tmp_path, 1, *SMALL, *as_pod(tmp_path / "pod", port), f"output_dir={tmp_path / 'run'}")
    until(lambda: steps(port) >= 4, run[0])
    run[0].send_signal(signal.SIGTERM)
    assert run.wait(60) == [INTERRUPTED]
    told = [entry["message"] for entry in entries(run.said(0)) if entry["severity"] == "WARNING"]
    assert told[0].startswith("SIGTERM: saving at the next step")
    assert told[1].startswith("interrupted: SIGTERM at step")
    assert re.match(
        r"exit code 75 \(interrupted\): SIGTERM at step \d+; everything is saved\. Start", message(tmp_path / "pod")
    )
