"""Several workers train as one does; they stop, fail and resume together."""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cluster.test_authentication import (
    TOKEN,
    announce_a_terabyte,
    join_without_proof,
    send_nested_json,
    send_random_bytes,
)
from tests.cluster.test_control import connect
from tests.e2e.running import assert_near, assert_same_run, assert_same_weights, program, train
from tests.e2e.workers import SHARED, Workers, start_workers, train_alone_and_by_two
from trainer.cluster.control import Connection
from trainer.cluster.discovery import Cluster
from trainer.errors import GAVE_UP, INTERRUPTED, WRONG_INPUT

ATTACKS = (join_without_proof, announce_a_terabyte, send_nested_json, send_random_bytes)
LONG = (*SHARED, "phases.fine_tune.epochs=12")


def train_by(workers: int, folder: Path, *overrides: str) -> Path:
    """Train with several workers to the end; return the output folder."""
    out = folder / "run"
    if workers == 1:
        train(*overrides, f"output_dir={out}")
        return out
    started = start_workers(folder, workers, *overrides, f"output_dir={out}")
    assert started.wait() == [0] * workers, started.output(0)
    return out


@pytest.mark.slow
def test_two_workers_train_as_one_in_two_micro_batches(tmp_path: Path) -> None:
    """Adam, EMA, dropout and augmentation on; 90 examples in batches of 12 leave padding in the last batch."""
    extra = ("training.clip_norm=1", "training.class_weights=balanced", "model.dropout=0.2")
    one, two = train_alone_and_by_two(tmp_path, *SHARED, *extra)
    predictions = [(p / "report" / "predictions.csv").read_text() for p in (one, two)]
    assert predictions[0].count("\n") == predictions[1].count("\n") == 91
    report = json.loads((two / "report" / "report.json").read_text())
    assert report["timing"]["workers"] == 2
    assert json.loads((two / "run.json").read_text())["attempts"][0]["found_by"] == "TF_CONFIG"


@pytest.mark.parametrize(
    ("own", "texts"),
    [
        (["training.batch_size=24"], ["training.batch_size: 12 on worker 0, 24 on worker 1"]),
        (["runtime.log_every='5 steps'", "seed=1"], ["runtime.log_every.count: 4.0 on worker 0, 5.0", "seed: 42 on worker 0, 1"]),
    ],
)  # fmt: skip
def test_workers_with_another_configuration_are_rejected_with_the_difference(
    tmp_path: Path, own: list[str], texts: list[str]
) -> None:
    out = tmp_path / "run"
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={out}", own={1: own})
    assert workers.wait() == [WRONG_INPUT] * 2
    for i in range(2):
        for text in ("configuration", *texts):
            assert text in workers.output(i)
    assert not out.exists()


@pytest.mark.slow
def test_cache_and_budgets_may_differ_between_workers_but_not_the_output(tmp_path: Path) -> None:
    own = {1: [f"runtime.cache_dir={tmp_path}/c1", "runtime.memory_budget_gb=1", f"output_dir={tmp_path}/b"]}
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={tmp_path}/a", own=own)
    assert workers.wait() == [WRONG_INPUT] * 2
    output = workers.output(1)
    assert "output_dir" in output
    assert "cache_dir" not in output
    assert "memory_budget" not in output


def test_several_workers_need_an_output_dir(tmp_path: Path) -> None:
    workers = start_workers(tmp_path, 1, *SHARED, size=2)
    assert workers.wait() == [WRONG_INPUT]
    assert "output_dir" in workers.output(0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hostile_process_neither_joins_nor_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects to the ports of both workers in the rendezvous, and later, when TensorFlow listens there."""
    monkeypatch.setenv("JOB_UID", TOKEN)  # as the manifests set it
    out = tmp_path / "run"
    workers = start_workers(tmp_path, 2, *LONG, f"output_dir={out}")
    peers = attack(workers, ATTACKS)
    workers.wait_for("step 4/", seconds=400)
    peers += attack(workers, ATTACKS)
    assert workers.wait() == [0, 0], workers.output(0)
    assert (out / "DONE").exists()
    for peer in peers:
        peer.close()


def attack(workers: Workers, attacks: Sequence[Callable[[Connection, Cluster], None]]) -> list[Connection]:
    """Connect to every worker for each attack; return the connections, which remain open."""
    peers = []
    for index in range(len(workers.processes)):
        for run_attack in attacks:
            cluster = Cluster(0, workers.addresses, "TF_CONFIG", ",".join(workers.addresses), "another token")
            peers.append(connect(cluster, index))
            peers[-1].socket.settimeout(2)
            with contextlib.suppress(OSError):
                run_attack(peers[-1], cluster)
    return peers


@pytest.mark.slow
def test_a_finished_run_is_finished_for_a_worker_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = (*SHARED, "debug.max_steps=1", "export.formats=[]", f"output_dir={out}")
    train(*small)
    workers = start_workers(tmp_path, 1, *small, size=2)  # the other worker does not exist any more
    assert workers.wait() == [0]
    assert "finished" in workers.output(0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "overrides",
    [
        ("phases.head.optimizer.name=sgd", "phases.fine_tune.optimizer.name=sgd",
         "phases.head.optimizer.momentum=0.9", "training.clip_norm=1", "training.accumulate=2", "training.class_weights=balanced"),
        # Adam divides by the root of its second moment: with its default epsilon of 1e-7, rounding errors of nearly zero
        # gradients become full steps.
        ("phases.head.optimizer.epsilon=1e-3", "phases.fine_tune.optimizer.epsilon=1e-3", "training.ema=0.95",
         "model.dropout=0.2", "training.label_smoothing=0.1"),
    ],
    ids=["sgd", "adam"],
)  # fmt: skip
def test_one_two_and_three_workers_agree(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    one = train_by(1, tmp_path / "1", *SHARED, *overrides)
    for workers in (2, 3):
        assert_near(train_by(workers, tmp_path / str(workers), *SHARED, *overrides), one)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_devices_of_one_process_train_the_same_and_resume(tmp_path: Path) -> None:
    alone = train_by(1, tmp_path / "alone", *LONG, "training.accumulate=2")
    mirrored = (*LONG, "runtime.replicas=2", f"output_dir={tmp_path / 'run'}")
    first = start_workers(tmp_path / "first", 1, *mirrored)
    first.wait_for("step 40/")
    assert "devices: 2 CPUs" in first.output(0)
    first.terminate()
    second = start_workers(tmp_path / "second", 1, *mirrored)
    assert second.wait() == [0]
    assert_same_weights(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("worker", [0, 1])
def test_sigterm_on_any_worker_stops_all_and_the_resumed_run_is_equal(tmp_path: Path, worker: int) -> None:
    calm = train_by(2, tmp_path / "calm", *LONG)
    out = tmp_path / "run"
    first = start_workers(tmp_path / "first", 2, *LONG, f"output_dir={out}")
    first.wait_for("step 40/")
    first.terminate(worker)
    state = out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip() / "state.json"
    step = json.loads(state.read_text())["step"]
    for i in range(2):
        assert f"at step {step}; everything is saved" in first.output(i)
    second = start_workers(tmp_path / "second", 2, *LONG, f"output_dir={out}")
    assert second.wait() == [0, 0]
    assert_same_run(calm, out)
    ledger = json.loads((out / "ledger.json").read_text())["seconds"]
    assert ledger["down"] > 0
    assert ledger["lost"] < 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_after_a_lost_worker_another_number_of_workers_resumes(tmp_path: Path) -> None:
    epsilon = ("phases.head.optimizer.epsilon=1e-3", "phases.fine_tune.optimizer.epsilon=1e-3")
    calm = train_by(2, tmp_path / "calm", *LONG, *epsilon)
    out = tmp_path / "run"
    for number, (workers, lost) in enumerate([(2, 1), (3, 0)]):
        started = start_workers(tmp_path / str(number), workers, *LONG, *epsilon, f"output_dir={out}")
        started.wait_for(f"step {24 + 24 * number}/")
        started[lost].send_signal(signal.SIGKILL)
        codes = started.wait()
        assert codes == [-9 if i == lost else INTERRUPTED for i in range(workers)]
    train(*LONG, *epsilon, f"output_dir={out}")
    assert_near(out, calm)
    attempts = json.loads((out / "checkpoints" / "attempts.json").read_text())
    assert attempts[0]["reason"].startswith("lost worker 1 (127.0.0.1:")
    assert attempts[1]["reason"] is None  # the chief was killed
    assert json.loads((out / "ledger.json").read_text())["seconds"]["lost"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_by_file_another_number_of_workers_is_rejected_inside_an_epoch(tmp_path: Path) -> None:
    prepared = tmp_path / "digits"
    program("prepare", "data=digits", f"output={prepared}", "data.shards=4")
    data = ("data=tfds", f"data.root={prepared}", "data.shard_by=file", "debug.max_examples=null")
    overrides = (*SHARED, *data, "training.batch_size=48", "runtime.checkpoint_every='8 steps'")
    calm, out = train_by(2, tmp_path / "calm", *overrides), tmp_path / "stopped" / "run"
    first = start_workers(tmp_path / "first", 2, *overrides, f"output_dir={out}")
    first.wait_for("step 36/")
    assert "worker 1 has 2 of 4 shards with 628 of 1,257 records" in first.output(1)
    first.terminate(1)
    error = train(*overrides, f"output_dir={out}", code=WRONG_INPUT).stderr
    assert re.search("file.*2 workers.*record.*1", error)
    second = start_workers(tmp_path / "second", 2, *overrides, f"output_dir={out}")
    assert second.wait() == [0, 0]
    assert_same_run(calm, out, levels=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_never_gets_anywhere_gives_up_with_3(tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Long epochs: the end of the first one, which is the best so far, would be progress.
    overrides = (*SHARED, "debug.max_examples=null", "runtime.checkpoint_every='1000 steps'", "phases.head.epochs=40",
                 "runtime.max_restarts_without_progress=2", f"output_dir={out}")  # fmt: skip
    for number in range(3):  # the first start and two restarts
        started = start_workers(tmp_path / str(number), 2, *overrides)
        started.wait_for(" steps (40 epochs)", index=1)  # of the line about the phase, after the start is recorded
        started[1].send_signal(signal.SIGKILL)
        assert started.wait() == [INTERRUPTED, -9]
    last = start_workers(tmp_path / "last", 2, *overrides)
    assert last.wait() == [GAVE_UP] * 2
    for i in range(2):
        assert re.search("2 restarts.*step 0", last.output(i))
    assert "lost worker 1 (" in last.output(0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_peer_that_fails_in_the_start_of_tensorflow_ends_all_with_75(tmp_path: Path) -> None:
    """TensorFlow on the chief waits for the peer forever, and holds Python's GIL meanwhile."""
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={tmp_path / 'run'}")
    address = workers.addresses[1]
    workers.wait_for("workers: all 2 are connected", index=1)
    deadline = time.monotonic() + 300
    taken = None
    while taken is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # the rendezvous still uses the port
            taken = socket.create_server(("", int(address.rpartition(":")[2])))
    assert taken
    with taken:
        assert workers.wait() == [INTERRUPTED] * 2
    assert f"TensorFlow cannot start its server at {address}" in workers.output(1)
    assert "Python had not run for" in workers.output(0)
    assert "ensure_initialized" in workers.output(0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", ["at once", "while TensorFlow starts"])
def test_a_second_process_of_one_index_makes_no_worker_hang(tmp_path: Path, when: str) -> None:
    """It can bind the port of its index when the first one frees it for TensorFlow, whose server then cannot start."""
    workers = start_workers(tmp_path, 2, *SHARED, f"output_dir={tmp_path / 'run'}")
    if when == "at once":
        time.sleep(0.3)
    else:
        workers.wait_for("workers: all 2 are connected", index=1)
    workers.start_again(1)
    started = "phase head: "  # with one of the two; otherwise the chief ends by itself
    workers.wait_until(lambda: started in workers.output(0) or workers[0].poll() is not None, "worker 0")
    # The one that is too many starts as slowly as the run; without the chief it would end with another code.
    workers.wait_until(lambda: any(workers[i].poll() is not None for i in (1, 2)), "one of the two to end")
    if started in workers.output(0):
        workers[0].send_signal(signal.SIGTERM)
    chief, first, second = workers.wait()
    outputs = [workers.output(index) for index in range(3)]
    assert chief == INTERRUPTED, outputs[0]
    assert {first, second} <= {WRONG_INPUT, INTERRUPTED}, outputs
    if started not in outputs[0]:
        assert re.search(r"interrupted: .*worker 1", outputs[0]), outputs[0]
    for code, output in ((first, outputs[1]), (second, outputs[2])):
        if code == WRONG_INPUT:
            assert "two processes have the index of worker 1: another one responds at" in output
        elif code == INTERRUPTED:
            named = "perhaps a second one with the index 1", "is in use by another process", "worker 0", "everything is"
            assert any(text in output for text in named), output
    if when == "at once":
        assert WRONG_INPUT in (first, second), outputs
