"""Runs of several workers on several hosts: how they find each other, what a lost one does to them, how they go on."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import assert_same_run, assert_same_weights, run
from tests.e2e.workers import SHARED, Workers
from tests.hosts.jobs import PORT, exits, names, start_job
from tests.hosts.network import Network, needs_root
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.timeout(600)]

HOSTS = names(2)
RUN = (*SHARED, "phases.fine_tune.epochs=6")
EXIT_SECONDS = 30.0  # after which nobody may still wait for a peer that is gone
NO_NAME = "the name does not resolve yet"


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(HOSTS) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two hosts that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with Network(HOSTS) as network:
        finish(network, folder)
    return folder


def finish(network: Network, folder: Path) -> Workers:
    """Start all workers, again or for the first time, and see them end well."""
    workers = start_job(network, folder.parent / "last", *RUN, f"output_dir={folder}")
    codes = workers.wait(500)
    assert codes == [DONE, DONE], workers.output(0)[-2000:] + workers.output(1)[-2000:]
    return workers


def assert_all_interrupted(ended: dict[int, tuple[int, float]], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All ended with the code that asks for another start, in time; prints the seconds."""
    with capsys.disabled():
        print(f"\n{what}: " + ", ".join(f"worker {i} ended with {c} after {s:.1f} s" for i, (c, s) in ended.items()))
    assert {code for code, _ in ended.values()} == {INTERRUPTED}
    assert max(seconds for _, seconds in ended.values()) < EXIT_SECONDS


def kept(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a run's checkpoints and its story: size and time of the last change."""
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file() and path.name != "attempts.json"]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in [*files, folder / "metrics.jsonl"]}


# ---------------------------------------------------------------------------------------------------------------
# Finding each other
# ---------------------------------------------------------------------------------------------------------------


def test_two_hosts_find_each_other_by_name_and_learn_what_one_process_learns(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    result = run(*RUN, "training.accumulate=2", f"output_dir={folder}")  # pieces of the size that a worker has
    assert result.returncode == DONE, result.stderr
    assert_same_weights(folder, undisturbed)
    log = (undisturbed.parent / "last" / "worker-1.log").read_text()
    assert "workers: this is 1 of 2 (Indexed Job train); waiting for the others" in log
    assert "workers: all 2 are there" in log


@pytest.mark.slow
def test_a_chief_whose_name_is_published_late_is_waited_for(network: Network, tmp_path: Path) -> None:
    network.forget(HOSTS[0])
    workers = start_job(network, tmp_path, *RUN, f"output_dir={tmp_path / 'run'}")
    workers.wait_for(f"workers: worker 0 ({HOSTS[0]}:{PORT}) is missing: {NO_NAME}", index=1)
    workers.wait_for(f"workers: 1 of 2 workers are missing: worker 1 ({HOSTS[1]}:{PORT}: has not called)", index=0)
    assert "workers: all" not in workers.output(0) + workers.output(1)
    network.remember(HOSTS[0])
    for index in range(2):
        workers.wait_for("workers: all 2 are there\nrun: ", index)
    workers.kill()


@pytest.mark.slow
def test_a_worker_whose_name_is_published_late_is_waited_for(network: Network, tmp_path: Path) -> None:
    network.forget(HOSTS[1])
    chief = start_job(network, tmp_path / "0", *RUN, f"output_dir={tmp_path / 'run'}", only=[0])
    chief.wait_for(f"workers: 1 of 2 workers are missing: worker 1 ({HOSTS[1]}:{PORT}: {NO_NAME})")
    worker = start_job(network, tmp_path / "1", *RUN, f"output_dir={tmp_path / 'run'}", only=[1])
    time.sleep(5)  # it called by now, but calling it back is impossible
    assert "workers: all" not in chief.output(0) + worker.output(0)
    network.remember(HOSTS[1])
    for workers in (chief, worker):
        workers.wait_for("workers: all 2 are there\nrun: ")
    for workers in (chief, worker):
        workers.kill()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_worker_that_never_comes_is_named_and_costs_no_attempt(
    missing: int, network: Network, tmp_path: Path
) -> None:
    began = time.monotonic()
    overrides = (*RUN, "runtime.start_timeout=8", f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, only=[1 - missing])
    [(code, seconds)] = exits(workers, [0], began, 60).values()
    assert code == INTERRUPTED
    assert 8 <= seconds < 30
    said = workers.output(0)
    assert f"worker {missing} ({HOSTS[missing]}:{PORT}" in said.splitlines()[-1]
    assert "Waited for runtime.start_timeout; start all workers again to go on" in said.splitlines()[-1]
    assert ("has not called" if missing else "no answer (Connection refused)") in said
    assert not (tmp_path / "run" / "checkpoints" / "attempts.json").exists()


def test_a_worker_of_a_job_of_another_size_is_refused(network: Network, tmp_path: Path) -> None:
    overrides = (*RUN, "runtime.start_timeout=8", f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, env={1: {"WORKER_COUNT": "3"}})
    assert workers.wait(90) == [INTERRUPTED, WRONG_INPUT]
    reason = "worker 0 refuses this worker: it belongs to train with 2 workers, not to train with 3"
    assert reason in workers.output(1)
    assert f"worker 1 ({HOSTS[1]}:{PORT}: has not called)" in workers.output(0)


def test_a_worker_of_another_job_looks_for_its_own_chief(network: Network, tmp_path: Path) -> None:
    overrides = (*RUN, "runtime.start_timeout=8", f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, env={1: {"JOB_NAME": "other"}})
    assert workers.wait(90) == [INTERRUPTED, INTERRUPTED]
    assert f"worker 0 (other-0.train-workers:{PORT}) is missing: {NO_NAME}" in workers.output(1)
    assert f"worker 1 ({HOSTS[1]}:{PORT}: has not called)" in workers.output(0)


def test_workers_with_different_overrides_are_all_told_which(network: Network, tmp_path: Path) -> None:
    overrides = (*RUN, f"output_dir={tmp_path / 'run'}")
    workers = start_job(network, tmp_path / "log", *overrides, own={1: ["training.batch_size=24"]})
    assert workers.wait(90) == [WRONG_INPUT, WRONG_INPUT]
    for index in range(2):
        assert "training.batch_size: 12 on worker 0, 24 on worker 1" in workers.output(index)
        assert "the workers do not have the same configuration" in workers.output(index)
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------------
# Losing each other
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_link_ends_both_sides_and_spoils_nothing(
    victim: int, network: Network, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={folder}")
    workers.wait_for("step 24/", seconds=200)
    began = time.monotonic()
    network.cut(HOSTS[victim])
    assert_all_interrupted(exits(workers, range(2), began, 90), f"link of worker {victim} down", capsys)
    for index in range(2):
        assert f"interrupted: lost worker {1 - index} ({HOSTS[1 - index]}:{PORT}): " in workers.output(index)
    network.join(HOSTS[victim])
    assert "weights: this run's checkpoint at step " in finish(network, folder).output(0)
    assert_same_run(undisturbed, folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_worker_ends_the_other_and_thawed_itself(
    victim: int, network: Network, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={folder}")
    workers.wait_for("step 24/", seconds=200)
    began = time.monotonic()
    workers[victim].send_signal(signal.SIGSTOP)
    other = 1 - victim
    assert_all_interrupted(exits(workers, [other], began, 90), f"worker {victim} frozen", capsys)
    assert f"interrupted: lost worker {victim} ({HOSTS[victim]}:{PORT}): no word for 2" in workers.output(other)
    before = kept(folder)
    began = time.monotonic()
    workers[victim].send_signal(signal.SIGCONT)
    assert_all_interrupted(exits(workers, [victim], began, 90), f"worker {victim} thawed", capsys)
    assert kept(folder) == before


@pytest.mark.slow
def test_a_chief_killed_while_it_writes_a_checkpoint_leaves_a_whole_one(
    network: Network, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in range(10):
        folder = tmp_path / f"run-{attempt}"
        workers = start_job(network, tmp_path / f"log-{attempt}", *RUN, f"output_dir={folder}")
        checkpoints = folder / "checkpoints"
        workers.wait_until((checkpoints / "LATEST").exists, "a first checkpoint", 200)
        while workers[0].poll() is None and not list(checkpoints.glob(".writing-step-*")):
            time.sleep(0.0005)
        began = time.monotonic()
        workers[0].send_signal(signal.SIGKILL)
        assert_all_interrupted(exits(workers, [1], began, 90), "chief killed", capsys)
        assert f"interrupted: lost worker 0 ({HOSTS[0]}:{PORT}): it ended without a word" in workers.output(1)
        if list(checkpoints.glob(".writing-step-*")):
            break
    else:
        raise AssertionError("no kill hit the writing of a checkpoint")
    assert "weights: this run's checkpoint at step " in finish(network, folder).output(0)
    assert not list(checkpoints.glob(".writing-step-*"))
    assert_same_run(undisturbed, folder)


@pytest.mark.slow
def test_a_worker_lost_while_tensorflow_is_imported_is_named_too(network: Network, tmp_path: Path) -> None:
    workers = start_job(network, tmp_path / "log", *RUN, f"output_dir={tmp_path / 'run'}")
    for index in range(2):
        workers.wait_for("workers: all 2 are there", index)
    time.sleep(1)  # the import takes several
    began = time.monotonic()
    workers[1].send_signal(signal.SIGKILL)
    assert exits(workers, [0], began, 60)[0][0] == INTERRUPTED
    assert f"interrupted: lost worker 1 ({HOSTS[1]}:{PORT}): it ended without a word" in workers.output(0)


@pytest.mark.slow
def test_the_successor_of_a_frozen_chief_asks_for_another_start(network: Network, tmp_path: Path) -> None:
    """The pod is gone for Kubernetes, but its process still holds the folder; this is no mistake of the user's."""
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
    assert "another process" in successors.output(0)
    assert codes == [INTERRUPTED, INTERRUPTED]
