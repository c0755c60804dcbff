"""Runs of several workers on several hosts: rendezvous, failures of workers and links, and resuming."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.running import assert_same_run, assert_same_weights, train
from tests.e2e.workers import SHARED, Workers
from tests.hosts.jobs import PORT, exits, names, start_job
from tests.hosts.network import Network, needs_root
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.timeout(600)]

HOSTS = names(2)
RUN = (*SHARED, "phases.fine_tune.epochs=6")
EXIT_SECONDS = 30.0  # until a worker must have exited after a peer has failed
NO_NAME = "the name does not resolve yet"
ALL_CONNECTED = "workers: all 2"


def address(index: int) -> str:
    return f"worker {index} ({HOSTS[index]}:{PORT}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on two hosts without faults."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with Network(HOSTS) as network:
        finish(network, folder)
    return folder


def finish(network: Network, folder: Path) -> Workers:
    workers = start_job(network, folder.parent / "last", *RUN, f"output_dir={folder}")
    codes = workers.wait(500)
    assert codes == [DONE, DONE], workers.output(0)[-2000:] + workers.output(1)[-2000:]
    return workers


def assert_all_interrupted(ended: dict[int, tuple[int, float]], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that all exited with INTERRUPTED in time; prints the seconds."""
    with capsys.disabled():
        print(f"\n{what}: " + ", ".join(f"worker {i} ended with {c} after {s:.1f} s" for i, (c, s) in ended.items()))
    assert {code for code, _ in ended.values()} == {INTERRUPTED}
    assert max(seconds for _, seconds in ended.values()) < EXIT_SECONDS


def file_versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of metrics.jsonl and of every checkpoint file."""
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file() and path.name != "attempts.json"]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in [*files, folder / "metrics.jsonl"]}


# ---- Rendezvous ----


def test_two_hosts_connect_by_name_and_train_the_weights_of_one_process(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    train(*RUN, "training.accumulate=2", f"output_dir={folder}")  # micro-batches of the size of a worker's batch
    assert_same_weights(folder, undisturbed)
    log = (undisturbed.parent / "last" / "worker-1.log").read_text()
    assert "1 of 2 (Indexed Job train)" in log
    assert ALL_CONNECTED in log


def test_workers_wait_for_a_chief_whose_name_is_published_late(network: Network, tmp_path: Path) -> None:
    network.forget(HOSTS[0])
    workers = start_job(network, tmp_path, *RUN, f"output_dir={tmp_path / 'run'}")
    workers.wait_for(NO_NAME, index=1)
    assert address(0) in workers.output(1)
    workers.wait_for(address(1), index=0)
    assert ALL_CONNECTED not in workers.output(0) + workers.output(1)
    network.remember(HOSTS[0])
    for index in range(2):
        workers.wait_for("\nrun: ", index)
        assert ALL_CONNECTED in workers.output(index)
    workers.kill()


def test_the_chief_waits_for_a_worker_whose_name_is_published_late(network: Network, tmp_path: Path) -> None:
    network.forget(HOSTS[1])
    chief = start_job(network, tmp_path / "0", *RUN, f"output_dir={tmp_path / 'run'}", only=[0])
    chief.wait_for(f"{address(1)}: {NO_NAME}")
    worker = start_job(network, tmp_path / "1", *RUN, f"output_dir={tmp_path / 'run'}", only=[1])
    time.sleep(5)  # it has connected by now, but the chief cannot connect to it
    assert ALL_CONNECTED not in chief.output(0) + worker.output(0)
    network.remember(HOSTS[1])
    for workers in (chief, worker):
        workers.wait_for("\nrun: ")
        assert ALL_CONNECTED in workers.output(0)
    for workers in (chief, worker):
        workers.kill()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_worker_is_reported_and_the_start_is_not_counted(
    missing: int, network: Network, tmp_path: Path
) -> None:
    began = time.monotonic()
    overrides = (*RUN, "runtime.start_timeout=8", f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, only=[1 - missing])
    [(code, seconds)] = exits(workers, [0], began, 60).values()
    assert code == INTERRUPTED
    assert 8 <= seconds < 30
    last_line = workers.output(0).splitlines()[-1]
    assert address(missing) in last_line
    assert "runtime.start_timeout" in last_line
    assert not (tmp_path / "run" / "checkpoints" / "attempts.json").exists()


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"WORKER_COUNT": "3"}, WRONG_INPUT, "worker 0 .*train with 2 workers.*train with 3"),
        ({"JOB_NAME": "other"}, INTERRUPTED, rf"worker 0 \(other-0\.train-workers:{PORT}\).*{NO_NAME}"),
    ],
)
def test_a_worker_of_another_job_is_not_accepted(
    environment: dict[str, str], code: int, message: str, network: Network, tmp_path: Path
) -> None:
    overrides = (*RUN, "runtime.start_timeout=8", f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, env={1: environment})
    assert workers.wait(90) == [INTERRUPTED, code]
    assert re.search(message, workers.output(1))
    assert address(1) in workers.output(0)


# ---- Failures ----


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_link_interrupts_both_workers_and_the_run_can_be_resumed(
    victim: int, network: Network, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={folder}")
    workers.wait_for("step 24/", seconds=200)
    began = time.monotonic()
    network.cut(HOSTS[victim])
    assert_all_interrupted(exits(workers, range(2), began, 90), f"link of worker {victim} down", capsys)
    for index in range(2):
        assert f"lost {address(1 - index)}" in workers.output(index)
    network.join(HOSTS[victim])
    assert "weights: this run's checkpoint at step " in finish(network, folder).output(0)
    assert_same_run(undisturbed, folder)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_worker_interrupts_the_other_and_itself_when_continued(
    victim: int, network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={folder}")
    workers.wait_for("step 24/", seconds=200)
    began = time.monotonic()
    workers[victim].send_signal(signal.SIGSTOP)
    other = 1 - victim
    assert_all_interrupted(exits(workers, [other], began, 90), f"worker {victim} stopped", capsys)
    assert re.search(rf"lost {re.escape(address(victim))}\): .* 2\d s", workers.output(other))  # the heartbeat timeout
    before = file_versions(folder)
    began = time.monotonic()
    workers[victim].send_signal(signal.SIGCONT)
    assert_all_interrupted(exits(workers, [victim], began, 90), f"worker {victim} continued", capsys)
    assert file_versions(folder) == before


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_stopped_while_the_model_is_built_interrupts_the_other(
    victim: int, network: Network, tmp_path: Path
) -> None:
    """TensorFlow's own heartbeat may end the broadcast of the weights first, with an error that names no cause."""
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={tmp_path / 'run'}")
    workers.wait_for("starting TensorFlow's servers", victim, seconds=200)
    began, other = time.monotonic(), 1 - victim
    workers[victim].send_signal(signal.SIGSTOP)
    # Before the servers are connected it waits for `runtime.start_timeout`, 60 s here.
    [(code, _)] = exits(workers, [other], began, 120).values()
    assert code == INTERRUPTED, workers.output(other)
    workers.kill()


@pytest.mark.timeout(1800)
def test_a_chief_killed_while_it_writes_a_checkpoint_leaves_a_complete_one(
    network: Network, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in range(10):
        folder = tmp_path / f"run-{attempt}"
        workers = start_job(network, tmp_path / f"log-{attempt}", *RUN, f"output_dir={folder}")
        checkpoints = folder / "checkpoints"
        workers.wait_until((checkpoints / "LATEST").exists, "a first checkpoint")
        while workers[0].poll() is None and not list(checkpoints.glob(".step-*")):
            time.sleep(0.0005)
        if workers[0].poll() is not None:  # on a busy machine this loop can miss all writes
            assert workers.wait() == [DONE, DONE]
            continue
        began = time.monotonic()
        workers[0].send_signal(signal.SIGKILL)
        assert_all_interrupted(exits(workers, [1], began, 90), "chief killed", capsys)
        assert f"lost {address(0)}" in workers.output(1)
        if list(checkpoints.glob(".step-*")):
            break
    else:
        raise AssertionError("no SIGKILL arrived while a checkpoint was written")
    assert "weights: this run's checkpoint at step " in finish(network, folder).output(0)
    assert not list(checkpoints.glob(".step-*"))
    assert_same_run(undisturbed, folder)


def test_a_worker_lost_while_tensorflow_is_imported_is_reported(network: Network, tmp_path: Path) -> None:
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={tmp_path / 'run'}")
    for index in range(2):
        workers.wait_for(ALL_CONNECTED, index)
    time.sleep(1)  # the import takes several
    began = time.monotonic()
    workers[1].send_signal(signal.SIGKILL)
    assert exits(workers, [0], began, 60)[0][0] == INTERRUPTED
    assert f"lost {address(1)}" in workers.output(0)


def test_the_successor_of_a_stopped_chief_exits_with_interrupted(network: Network, tmp_path: Path) -> None:
    """Kubernetes has deleted the pod, but its process still holds the lease: not a user error."""
    folder = tmp_path / "run"
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={folder}")
    workers.wait_until((folder / "config.yaml").exists, "the chief to take the folder")
    began = time.monotonic()
    workers[0].send_signal(signal.SIGSTOP)
    assert exits(workers, [1], began, 60)[1][0] == INTERRUPTED
    with Network(HOSTS) as elsewhere:
        successors = start_job(elsewhere, tmp_path / "successors", *RUN, f"output_dir={folder}")
        codes = successors.wait(120)
    workers.kill()
    assert "is in use by another run" in successors.output(0)
    assert codes == [INTERRUPTED, INTERRUPTED]
