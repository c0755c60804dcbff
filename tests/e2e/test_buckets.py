"""Data, weights and output in a bucket: equal, bit for bit, to a local run, with failures of network and nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.running import ROOT, SMALL, assert_same_run, by_step, program, train, with_data_at
from tests.e2e.workers import Workers, start_workers
from tests.storage.emulator import Emulator, environment, running
from tests.storage.faulty import faults
from tests.storage.s3_server import S3Server, s3_running
from trainer.errors import INTERRUPTED, WRONG_INPUT
from trainer.storage.arrays import unpack
from trainer.storage.path import StoragePath, storage_path

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("server")]

WEIGHTS = ROOT / "trainer" / "models" / "weights" / "glyphs_mobilenet_v2_0.35.weights.h5"
DATA, SHARDS = "gs://bucket/digits", 4
RUN = storage_path("gs://bucket/runs/1")
LOCAL = (*SMALL, "data=tfds", "runtime.checkpoint_every='4 steps'")


@pytest.fixture(scope="module")
def calm(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on the local disk."""
    out = tmp_path_factory.mktemp("calm") / "run"
    train(*LOCAL, f"data.root={prepared}", f"output_dir={out}")
    return out


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Emulator | S3Server]:
    """A server of Google's buckets, or by parametrization of S3's or an empty one, with the data and the weights."""
    scheme = getattr(request, "param", "gs")
    if scheme == "empty":
        with running(tmp_path / "objects") as server:
            yield server
        return
    with (running if scheme == "gs" else s3_running)(tmp_path / "objects") as server:
        for file in request.getfixturevalue("prepared").iterdir():
            if file.is_file() and not file.name.startswith("."):
                (storage_path(f"{scheme}://bucket/digits") / file.name).upload(file)
        (storage_path(f"{scheme}://bucket/weights") / WEIGHTS.name).upload(WEIGHTS)
        yield server


def start(folder: Path, cache: Path, *overrides: str, output: str = "gs://bucket/runs/1") -> Workers:
    """Start the run; another cache simulates another node."""
    scheme = output.partition(":")[0]
    return start_workers(
        folder, 1, *LOCAL, f"data.root={scheme}://bucket/digits",
        f"model.weights={scheme}://bucket/weights/{WEIGHTS.name}",
        f"runtime.cache_dir={cache}", f"output_dir={output}", *overrides,
    )  # fmt: skip


def downloaded(to: Path, prepared: Path, run: StoragePath = RUN) -> Path:
    """Download the run from the bucket; rename checkpoints and data as in the local run."""
    for info in run.list():
        info.path.download(to / str(info.path).removeprefix(f"{run}/"))
    by_step(to)
    with_data_at(to, DATA.replace("gs://", str(run)[:5]), str(prepared))
    return to


def assert_tensorboard_reads(to: Path, run: StoragePath) -> None:
    """Assert that TensorBoard reads the logs of the unfinished run in the bucket."""
    for info in (run / "logs" / "head").list():
        info.path.download(to / info.path.name)
    events = EventAccumulator(str(to)).Reload()
    assert {"train/loss", "validation/accuracy"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("server", ["gs", "s3"], indirect=True)
def test_a_run_resumed_on_an_empty_disk_is_equal_bit_for_bit(
    calm: Path, prepared: Path, tmp_path: Path, server: Emulator | S3Server
) -> None:
    run = storage_path(f"{server.scheme}://bucket/runs/1")
    first = start(tmp_path / "1", tmp_path / "node-1", output=str(run))
    first.wait_for("phase fine_tune: 12 steps")
    first[0].send_signal(signal.SIGKILL)
    first.wait(120)
    assert f"{server.scheme}://bucket/digits: fetching " in first.output(0)
    assert_tensorboard_reads(tmp_path / "logs", run)
    began = time.monotonic()
    second = start(tmp_path / "2", tmp_path / "node-2", output=str(run))
    assert second.wait(200) == [0], second.output(0)
    assert time.monotonic() - began > 30  # the lease of the first process had to expire
    assert "weights: this run's checkpoint at step " in second.output(0)
    assert_same_run(calm, downloaded(tmp_path / "downloaded", prepared, run))
    third = start(tmp_path / "3", tmp_path / "node-3", output=str(run))
    assert third.wait(120) == [0]
    assert "finished" in third.output(0)


@pytest.mark.slow
def test_sigterm_publishes_and_the_same_job_resumes_at_once(
    calm: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_UID", "1234-5678")
    first = start(tmp_path / "1", tmp_path / "node-1")
    first.wait_for("head  epoch 1 done")
    first.terminate()
    assert f"output_dir={RUN}" in first.output(0).splitlines()[-1]
    step = int((RUN / "checkpoints" / "LATEST").read_text().split()[0].split("-")[1])
    second = start(tmp_path / "2", tmp_path / "node-2")
    assert second.wait(200) == [0], second.output(0)
    assert f"weights: this run's checkpoint at step {step}" in second.output(0)
    assert_same_run(calm, downloaded(tmp_path / "downloaded", prepared))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_the_bucket_is_evaluated_into_the_bucket(tmp_path: Path) -> None:
    trained = start(
        tmp_path / "1", tmp_path / "node-1", "phases.head.epochs=1", "phases.fine_tune.epochs=1", "export.formats=[]"
    )
    assert trained.wait(300) == [0], trained.output(0)
    other_node = (f"run={RUN}", f"runtime.cache_dir={tmp_path / 'node-2'}")
    # With data.root the dataset counts as another one, to which the limit of the run does not apply.
    done = program("evaluate", *other_node, f"data.root={DATA}", "debug.max_examples=90")
    there = RUN / "evaluations" / "best-digits-test"
    assert f"{there}/index.html" in done.stdout
    assert {info.path.name for info in there.list()} >= {
        "index.html",
        "report.json",
        "confusion.png",
        "probabilities.npy",
    }
    mine, theirs = (json.loads((folder / "report.json").read()) for folder in (there, RUN / "report"))
    assert mine["test"] == theirs["test"]
    assert mine["phases"] == theirs["phases"]
    for name in ("predictions.csv", "probabilities.npy"):
        assert (there / name).read() == (RUN / "report" / name).read()

    elsewhere = storage_path("gs://bucket/first")
    step = min(int(folder.name.split("-")[1]) for folder in (RUN / "checkpoints").folders())
    program("evaluate", *other_node, f"checkpoint={step}", "split=validation", f"output={elsewhere}")
    report = json.loads((elsewhere / "report.json").read())
    assert (report["test"]["split"], report["timing"]["checkpoint_step"]) == ("validation", step)
    error = program("evaluate", *other_node, "checkpoint=7777", code=WRONG_INPUT).stderr
    for text in (str(RUN), "7777", str(step)):
        assert text in error


@pytest.mark.parametrize("server", ["empty"], indirect=True)
@pytest.mark.usefixtures("server")
def test_a_missing_address_is_named(tmp_path: Path) -> None:
    gone = start(tmp_path / "1", tmp_path / "c", "data.root=gs://bucket/nowhere", "model.weights=glyphs")
    no_bucket = start(tmp_path / "2", tmp_path / "c", output="gs://no-such-bucket/runs/1")
    assert gone.wait() == [WRONG_INPUT]
    assert re.search("error: .*gs://bucket/nowhere", gone.output(0))
    assert no_bucket.wait() == [WRONG_INPUT]
    assert re.search("error: .*gs://no-such-bucket/runs/1", no_bucket.output(0))


@pytest.mark.slow
def test_one_bad_response_in_five_changes_nothing(server: Emulator, calm: Path, prepared: Path, tmp_path: Path) -> None:
    with faults(server.url) as proxy, environment(proxy.url):
        workers = start(tmp_path / "1", tmp_path / "node")
        assert workers.wait(600) == [0], workers.output(0)
        bad = sum(count for kind, count in proxy.counts.items() if kind != "passed")
        assert bad > 0.1 * sum(proxy.counts.values())
    assert_same_run(calm, downloaded(tmp_path / "downloaded", prepared))


@pytest.mark.slow
def test_an_unavailable_server_is_retried(server: Emulator, calm: Path, prepared: Path, tmp_path: Path) -> None:
    workers = start(tmp_path / "1", tmp_path / "node")
    workers.wait_for("head  epoch 1 done")
    server.stop()
    time.sleep(8)
    server.start()
    assert workers.wait(300) == [0], workers.output(0)
    assert_same_run(calm, downloaded(tmp_path / "downloaded", prepared))


@pytest.mark.slow
def test_two_runs_on_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = start(tmp_path / "1", tmp_path / "node-1", "phases.fine_tune.epochs=100")
    first.wait_for("head  epoch 1")
    second = start(tmp_path / "2", tmp_path / "node-2", "phases.fine_tune.epochs=100")
    assert second.wait(120) == [INTERRUPTED]
    assert re.search(rf"{RUN}.* in use", second.output(0))
    first.terminate()


@pytest.mark.slow
def test_three_pods_prepare_one_dataset_in_the_bucket(tmp_path: Path) -> None:
    target = storage_path("gs://bucket/prepared")

    def pod(index: int, cache: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index), "WORKER_COUNT": "3"}
        command = [sys.executable, "-m", "trainer.prepare", "data=tfds", f"data.root={DATA}", "data.shards=5",
                   f"output={target}", f"runtime.cache_dir={tmp_path / cache}"]  # fmt: skip
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1)

    out = [pod(index, f"pod-{index}").communicate() for index in (0, 1)]
    assert not (target / "dataset_info.json").exists(), out  # the last pod finishes the dataset
    output, error = pod(2, "pod-2").communicate()
    assert "1797 images of 10 classes" in output, error
    before = {str(info.path): (info.size, info.crc32c) for info in target.list()}
    assert not any(name.rpartition("/")[2].startswith(".") for name in before)
    output, error = pod(1, "other-node").communicate()  # a restarted pod changes nothing
    assert "1797 images" in output, error
    assert {str(info.path): (info.size, info.crc32c) for info in target.list()} == before
    labels = [unpack(file.read_bytes())["labels"] for file in (tmp_path / "pod-2" / "labels").iterdir()]
    assert sum(map(len, labels)) == 1797
