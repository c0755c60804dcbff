"""Monitoring of a run in a pod (`runtime=pod`): health, metrics, JSON log and termination message.

tests/e2e/test_run.py monitors its undisturbed run, from start to end.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from scripts.same_bits import free_ports
from tests.e2e.running import ROOT, SMALL, program
from tests.e2e.workers import SHARED, Workers, start_workers
from tests.monitoring.test_http import get, metrics
from tests.waiting import PATIENCE, wait_until
from trainer.cluster.signals import STOP_TIMEOUT_SECONDS
from trainer.errors import INTERRUPTED, WRONG_INPUT

LABELS = "logging.googleapis.com/labels"


@pytest.fixture(autouse=True)
def _log_level_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)


def as_pod(folder: Path, port: int) -> list[str]:
    """The preset of a pod with writable paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return ["runtime=pod", f"runtime.http_port={port}", f"runtime.termination_log={folder / 'termination-log'}",
            f"runtime.cache_dir={os.environ['KUBETUNE_CACHE']}"]  # fmt: skip


def entries(log: str) -> list[dict[str, Any]]:
    """Parse the lines of a log: objects with the fields of Cloud Logging."""
    parsed = [json.loads(line) for line in log.splitlines()]
    assert all({"severity", "time", "message"} <= entry.keys() for entry in parsed)
    return parsed


def message(folder: Path) -> str:
    return (folder / "termination-log").read_text()


def response(port: int, path: str = "/healthz") -> tuple[int, str]:
    """Code and text of a response; (0, "") before the server listens, and if the process ends during the response."""
    try:
        return get(port, path)
    except (OSError, HTTPException):
        return 0, ""


def steps(port: int) -> float:
    match = re.search(r"^kubetune_step (\S+)$", response(port, "/metrics")[1], re.MULTILINE)
    return float(match[1]) if match else 0.0


def block(photos: Path) -> None:
    """Make reads of an image block in the operating system, as on a lost network disk."""
    for file in photos.glob("*/*.jpg"):
        file.rename(file.with_suffix(".moved"))
        os.mkfifo(file)


def unblock(photos: Path) -> None:
    for file in photos.glob("*/*.moved"):
        file.replace(file.with_suffix(".jpg"))


def stalled(tmp_path: Path, photos: Path) -> tuple[Workers, int, list[str]]:
    """Start a run and stall it inside a step."""
    (port,) = free_ports(1)
    overrides = [
        "data=image_folder", f"data.root={photos}", "data.cache=none", "model=glyphs_mobilenet_v2",
        "training.batch_size=8", "phases.head.epochs=100", "~phases.fine_tune", "runtime.log_every='3 steps'",
        "export.formats=[]", f"output_dir={tmp_path / 'run'}", *as_pod(tmp_path / "pod", port), "runtime.stuck_after=4",
    ]  # fmt: skip
    run = start_workers(tmp_path, 1, *overrides)
    wait_until(lambda: steps(port) >= 6, process=run[0])
    block(photos)
    wait_until(lambda: response(port)[0] == 503, process=run[0])
    return run, port, overrides


@pytest.mark.slow
def test_a_stalled_step_is_reported_and_sigterm_ends_it_at_once(tmp_path: Path, photos: Path) -> None:
    run, port, _ = stalled(tmp_path, photos)
    time.sleep(1)  # it stays unhealthy
    code, text = get(port, "/healthz")
    assert code == 503
    assert re.search(r"\d+ s \(runtime.stuck_after=4\).* after step \d+\n", text)
    assert metrics(port)["kubetune_last_progress_age_seconds"] > 4
    assert metrics(port)["kubetune_last_step_age_seconds"] > 4
    run.terminate(seconds=STOP_TIMEOUT_SECONDS / 2)  # which it would wait for the step
    log = entries(run.output(0))
    (stacks,) = [entry for entry in log if re.search(r"in (train_epoch|validate)\n", entry["message"])]
    assert stacks["severity"] == "ERROR"
    reason = message(tmp_path / "pod")
    assert re.match(r"exit code 75 \(interrupted\): SIGTERM while .* \d+ s", reason)
    assert f"output_dir={tmp_path}/run" in reason
    attempts = json.loads((tmp_path / "run" / "checkpoints" / "attempts.json").read_text())
    assert attempts[-1]["kind"] == "failed"  # counts towards runtime.max_restarts_without_progress


def test_a_wrong_configuration_is_in_the_log_and_in_the_termination_message(tmp_path: Path) -> None:
    pod = as_pod(tmp_path, free_ports(1)[0])
    for wrong, reason in (("modle=3", "modle"), ("seed=[1", "cannot be read as a value")):
        run = start_workers(tmp_path, 1, *pod, wrong)
        assert run.wait(PATIENCE) == [WRONG_INPUT]
        (entry,) = entries(run.output(0))
        assert (entry["severity"], entry["exit_code"]) == ("ERROR", 2)
        assert reason in entry["message"]
        assert message(tmp_path).startswith("exit code 2 (configuration or data is wrong): ")
        assert reason in message(tmp_path)


@pytest.mark.slow
def test_prepare_in_a_pod(tmp_path: Path) -> None:
    pod = as_pod(tmp_path, free_ports(1)[0])
    result = program("prepare", "data=digits", f"output={tmp_path / 'digits'}", "data.shards=2", *pod)
    assert any("1797 images" in entry["message"] for entry in entries(result.stdout + result.stderr))
    assert re.match(rf"exit code 0 \(done\): {tmp_path / 'digits'} .*1797 images of 10 classes", message(tmp_path))


def test_sigterm_ends_prepare_at_once(tmp_path: Path, photos: Path) -> None:
    block(photos)
    (port,) = free_ports(1)
    pod = (*as_pod(tmp_path / "pod", port), "runtime.stuck_after=1")
    call = [
        sys.executable,
        "-m",
        "trainer.prepare",
        "data=image_folder",
        f"data.root={photos}",
        f"output={tmp_path}/out",
    ]
    with subprocess.Popen([*call, *pod], cwd=ROOT, text=True, stdout=-1, stderr=-1) as child:
        wait_until(lambda: response(port)[0] == 503, process=child)
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == INTERRUPTED
    assert [entry["severity"] for entry in entries(out + err)][-2:] == ["ERROR", "WARNING"]
    assert message(tmp_path / "pod").startswith("exit code 75 (interrupted): SIGTERM")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stalled_run_resumes(tmp_path: Path, photos: Path) -> None:
    first, _, overrides = stalled(tmp_path, photos)
    first.terminate(seconds=STOP_TIMEOUT_SECONDS / 2)
    unblock(photos)
    second = start_workers(tmp_path / "second", 1, *overrides)
    assert second.wait(300) == [0], second.output(0)
    assert "weights: this run's checkpoint at step" in second.output(0)
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_are_monitored_separately(tmp_path: Path) -> None:
    ports = free_ports(2)
    long = [*SHARED, "phases.fine_tune.epochs=40", f"output_dir={tmp_path / 'run'}"]
    own = {i: as_pod(tmp_path / f"pod-{i}", port) for i, port in enumerate(ports)}
    workers = start_workers(tmp_path, 2, *long, own=own)
    workers.wait_until(lambda: min(map(steps, ports)) >= 24, "step 24 on both")
    gauges = [metrics(port) for port in ports]
    assert [worker["kubetune_workers"] for worker in gauges] == [2, 2]
    assert [worker["kubetune_loss"] > 0 for worker in gauges] == [True, True]
    assert ["kubetune_checkpoint_age_seconds" in worker for worker in gauges] == [True, False]  # only the chief saves
    workers[1].send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        get(ports[1], "/healthz", seconds=5)
    assert workers[0].wait(120) == INTERRUPTED
    workers.kill()
    for index in range(2):
        assert {entry[LABELS]["worker"] for entry in entries(workers.output(index)) if LABELS in entry} == {str(index)}
    assert message(tmp_path / "pod-0").startswith("exit code 75 (interrupted): lost worker 1 (127.0.0.1:")
    assert not (tmp_path / "pod-1" / "termination-log").exists()  # SIGKILL leaves none


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_termination_message_after_sigterm_has_the_saved_step(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    run = start_workers(tmp_path, 1, *SMALL, *as_pod(tmp_path / "pod", port), f"output_dir={tmp_path / 'run'}")
    wait_until(lambda: steps(port) >= 4, process=run[0])
    run.terminate()
    request, end = (entry["message"] for entry in entries(run.output(0)) if entry["severity"] == "WARNING")
    assert "SIGTERM" in request
    assert end.startswith("interrupted: SIGTERM at step")
    pattern = r"exit code 75 \(interrupted\): SIGTERM at step \d+; everything is saved"
    assert re.match(pattern, message(tmp_path / "pod"))
