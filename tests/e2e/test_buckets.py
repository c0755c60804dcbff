"""Data, weights and output in a bucket: the bits of a local run, whatever the network and the nodes do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.running import ROOT, SMALL, assert_same_run, by_step, with_data_at
from tests.e2e.workers import Workers, start_workers
from tests.storage.emulator import Emulator, environment, running
from tests.storage.faulty import faults
from trainer.errors import INTERRUPTED, WRONG_INPUT
from trainer.storage.path import StoragePath, storage_path

WEIGHTS = ROOT / "trainer" / "models" / "weights" / "glyphs_mobilenet_v2_0.35.weights.h5"
DATA, SHARDS = "gs://bucket/digits", 4
LOCAL = (*SMALL, "data=tfds", "runtime.checkpoint_every='4 steps'")


@pytest.fixture(scope="module")
def calm(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with everything on the local disk."""
    out = tmp_path_factory.mktemp("calm") / "run"
    command = [sys.executable, "-m", "trainer", *LOCAL, f"data.root={prepared}", f"output_dir={out}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture
def server(prepared: Path, tmp_path: Path) -> Iterator[Emulator]:
    """An emulator that holds the data and the weights."""
    with running(tmp_path / "objects") as emulator:
        for file in prepared.iterdir():
            if file.is_file() and not file.name.startswith("."):
                (storage_path(DATA) / file.name).upload(file)
        (storage_path("gs://bucket/weights") / WEIGHTS.name).upload(WEIGHTS)
        yield emulator


def start(folder: Path, cache: Path, *overrides: str, output: str = "gs://bucket/runs/1") -> Workers:
    """The run in a process of its own, with a cache of its own: another cache is another node."""
    return start_workers(
        folder, 1, *LOCAL, f"data.root={DATA}", f"model.weights=gs://bucket/weights/{WEIGHTS.name}",
        f"runtime.cache_dir={cache}", f"output_dir={output}", *overrides,
    )  # fmt: skip


def fetched(there: StoragePath, to: Path, prepared: Path) -> Path:
    """A run's folder out of the bucket, its checkpoints and records under the names of the local run."""
    for entry in there.list():
        entry.path.download(to / str(entry.path).removeprefix(f"{there}/"))
    by_step(to)
    with_data_at(to, DATA, str(prepared))
    return to


def assert_tensorboard_reads(there: StoragePath, to: Path) -> None:
    """What TensorBoard finds in the bucket of a run that is not finished."""
    for entry in (there / "logs" / "head").list():
        entry.path.download(to / entry.path.name)
    events = EventAccumulator(str(to)).Reload()
    assert {"train/loss", "validation/accuracy"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_killed_and_started_on_an_empty_disk_it_ends_with_the_same_bits(
    calm: Path, prepared: Path, tmp_path: Path
) -> None:
    first = start(tmp_path / "1", tmp_path / "node-1")
    first.wait_for("phase fine_tune: 12 steps")
    first[0].send_signal(signal.SIGKILL)
    first.wait(30)
    assert f"{DATA}: fetching " in first.said(0)
    assert_tensorboard_reads(storage_path("gs://bucket/runs/1"), tmp_path / "seen")
    began = time.monotonic()
    second = start(tmp_path / "2", tmp_path / "node-2")
    assert second.wait(200) == [0], second.said(0)
    assert time.monotonic() - began > 30  # it had to wait until the lease of the first ran out
    assert "weights: this run's checkpoint at step " in second.said(0)
    there = storage_path("gs://bucket/runs/1")
    assert_same_run(calm, fetched(there, tmp_path / "fetched", prepared))
    third = start(tmp_path / "3", tmp_path / "node-3")
    assert third.wait(60) == [0]
    assert "gs://bucket/runs/1 is finished already (it holds DONE)" in third.said(0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_sigterm_publishes_and_the_same_job_goes_on_at_once(calm: Path, prepared: Path, tmp_path: Path) -> None:
    os.environ["JOB_UID"] = "1234-5678"
    try:
        first = start(tmp_path / "1", tmp_path / "node-1")
        first.wait_for("head  epoch 1 done")
        first[0].send_signal(signal.SIGTERM)
        assert first.wait(60) == [INTERRUPTED]
        assert "Start the same command again with output_dir=gs://bucket/runs/1 to go on" in first.said(0)
        latest = (storage_path("gs://bucket/runs/1") / "checkpoints" / "LATEST").read_text().split()[0]
        step = int(latest.split("-")[1])
        second = start(tmp_path / "2", tmp_path / "node-2")
        assert second.wait(200) == [0], second.said(0)
        assert f"weights: this run's checkpoint at step {step}" in second.said(0)
    finally:
        del os.environ["JOB_UID"]
    assert_same_run(calm, fetched(storage_path("gs://bucket/runs/1"), tmp_path / "fetched", prepared))


def evaluate(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer.evaluate` on another node than the run was on."""
    command = [sys.executable, "-m", "trainer.evaluate", *arguments, f"runtime.cache_dir={cache}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("server")
def test_a_run_in_the_bucket_is_evaluated_into_the_bucket(tmp_path: Path) -> None:
    trained = start(
        tmp_path / "1", tmp_path / "node-1", "phases.head.epochs=1", "phases.fine_tune.epochs=1", "export.formats=[]"
    )
    assert trained.wait(300) == [0], trained.said(0)
    run = storage_path("gs://bucket/runs/1")
    done = evaluate(tmp_path / "node-2", f"run={run}", f"data.root={DATA}")
    assert done.returncode == 0, done.stderr
    there = run / "evaluations" / "best-digits-test"
    assert f"report   {there}/index.html" in done.stdout
    assert {entry.path.name for entry in there.list()} >= {"index.html", "report.json", "confusion.png"}
    mine, theirs = (json.loads((folder / "report.json").read()) for folder in (there, run / "report"))
    assert mine["test"] == theirs["test"]
    assert mine["phases"] == theirs["phases"]
    assert (there / "predictions.csv").read() == (run / "report" / "predictions.csv").read()

    elsewhere = storage_path("gs://bucket/first")
    step = min(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").folders())
    done = evaluate(tmp_path / "node-2", f"run={run}", f"checkpoint={step}", "split=validation", f"output={elsewhere}")
    assert done.returncode == 0, done.stderr
    report = json.loads((elsewhere / "report.json").read())
    assert (report["test"]["split"], report["timing"]["checkpoint_step"]) == ("validation", step)
    done = evaluate(tmp_path / "node-2", f"run={run}", "checkpoint=7777")
    assert done.returncode == WRONG_INPUT
    assert f"run={run} has no checkpoint 7777; the steps it has: {step}" in done.stderr


@pytest.mark.usefixtures("server")
def test_what_is_not_there_or_taken_is_named(tmp_path: Path) -> None:
    gone = start(tmp_path / "1", tmp_path / "c", "data.root=gs://bucket/nowhere")
    no_bucket = start(tmp_path / "2", tmp_path / "c", output="gs://no-such-bucket/runs/1")
    assert gone.wait(120) == [WRONG_INPUT]
    assert "there is nothing in gs://bucket/nowhere; check the address" in gone.said(0)
    assert no_bucket.wait(120) == [WRONG_INPUT]
    assert "error: gs://no-such-bucket/runs/1" in no_bucket.said(0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_bad_answer_in_five_changes_nothing(server: Emulator, calm: Path, prepared: Path, tmp_path: Path) -> None:
    with faults(server.url) as proxy, environment(proxy.url):
        workers = start(tmp_path / "1", tmp_path / "node")
        assert workers.wait(600) == [0], workers.said(0)
        bad = sum(count for kind, count in proxy.counts.items() if kind != "passed")
        assert bad > 0.1 * sum(proxy.counts.values())
    assert_same_run(calm, fetched(storage_path("gs://bucket/runs/1"), tmp_path / "fetched", prepared))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: Emulator, calm: Path, prepared: Path, tmp_path: Path
) -> None:
    workers = start(tmp_path / "1", tmp_path / "node")
    workers.wait_for("head  epoch 1 done")
    server.stop()
    time.sleep(8)
    server.start()
    assert workers.wait(300) == [0], workers.said(0)
    assert_same_run(calm, fetched(storage_path("gs://bucket/runs/1"), tmp_path / "fetched", prepared))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_two_runs_on_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = start(tmp_path / "1", tmp_path / "node-1", "phases.fine_tune.epochs=100")
    first.wait_for("head  epoch 1")
    second = start(tmp_path / "2", tmp_path / "node-2", "phases.fine_tune.epochs=100")
    assert second.wait(120) == [WRONG_INPUT]
    assert "gs://bucket/runs/1: is in use by process " in second.said(0)
    first[0].send_signal(signal.SIGTERM)
    assert first.wait(60) == [INTERRUPTED]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("server")
def test_three_pods_prepare_one_dataset_in_the_bucket(tmp_path: Path) -> None:
    target = "gs://bucket/prepared"

    def pod(index: int, cache: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index), "WORKER_COUNT": "3"}
        command = [sys.executable, "-m", "trainer.prepare", "data=tfds", f"data.root={DATA}", "data.shards=5",
                   f"output={target}", f"runtime.cache_dir={tmp_path / cache}"]  # fmt: skip
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1)

    out = [pod(index, f"pod-{index}").communicate() for index in (0, 1)]
    assert all("the part that ends last finishes the dataset" in said for said, _ in out), out
    assert not (storage_path(target) / "dataset_info.json").exists()
    said, error = pod(2, "pod-2").communicate()
    assert "holds 1797 images of 10 classes" in said, error
    before = {str(e.path): (e.size, e.crc32c) for e in storage_path(target).list()}
    assert not any(name.rpartition("/")[2].startswith(".") for name in before)
    again, error = pod(1, "other-node").communicate()  # a pod that is started once more changes nothing
    assert "holds 1797 images" in again, error
    assert {str(e.path): (e.size, e.crc32c) for e in storage_path(target).list()} == before
    labels = [np.load(file) for file in (tmp_path / "pod-2" / "labels").glob("*.npy")]
    assert sum(map(len, labels)) == 1797
