"""Preflight and peers over real sockets: who is missing, who disagrees, who is gone. Workers are processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from scripts.same_bits import free_ports
from trainer.cluster.control import Connection, ControlChannel, ProtocolError, differences
from trainer.cluster.discovery import Cluster, discover
from trainer.cluster.rendezvous import rendezvous
from trainer.errors import ConfigError, Interrupted

ROOT = Path(__file__).parents[2]


def clusters(count: int) -> list[Cluster]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    config = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(count)]
    return [discover({"TF_CONFIG": json.dumps(one)}) for one in config]


def everyone(count: int, seconds: float = 20) -> list[ControlChannel]:
    """All workers of a job as threads of this process: enough where none of them ends."""
    found: dict[int, ControlChannel] = {}
    threads = [
        threading.Thread(
            target=lambda c=c: found.update({c.index: rendezvous(c, seconds, lambda _: None, lambda: None)})
        )
        for c in clusters(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[i] for i in range(count)]


def on_all(peers: list[ControlChannel], action: object) -> list[object]:
    """What `action(peers)` returns, or raises, on each worker, all of them at the same time."""
    results: list[object] = [None] * len(peers)

    def act(one: ControlChannel) -> None:
        try:
            results[one.index] = action(one)  # type: ignore[operator]
        except Exception as error:
            results[one.index] = error

    threads = [threading.Thread(target=act, args=(one,)) for one in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_one_worker_needs_nobody() -> None:
    peers = rendezvous(discover({}), 1, pytest.fail, lambda: None)
    assert (peers.index, peers.size, peers.is_chief) == (0, 1, True)
    assert peers.gather("a", b"x") == [b"x"]
    assert peers.broadcast("b", lambda: {"c": 1.5}) == {"c": 1.5}
    assert peers.any_worker("d", True)
    assert not peers.any_worker("d", False)
    peers.require_equal("data", {"fingerprint": "f"})
    peers.barrier("e")
    peers.disconnect()


def test_workers_exchange_what_they_have() -> None:
    peers = everyone(3)
    assert on_all(peers, lambda p: p.gather("a", bytes([p.index]) * 300_000)) == [
        [bytes([i]) * 300_000 for i in range(3)], None, None,
    ]  # fmt: skip
    assert on_all(peers, lambda p: p.broadcast("b", lambda: [0.1, p.index])) == [[0.1, 0]] * 3
    assert on_all(peers, lambda p: p.any_worker("c", p.index == 2)) == [True] * 3
    assert on_all(peers, lambda p: p.any_worker("c", False)) == [False] * 3
    assert on_all(peers, lambda p: p.require_equal("data", {"fingerprint": "f"})) == [None] * 3
    refused = on_all(
        peers, lambda p: p.require_equal("data", {"fingerprint": "f" if p.index < 2 else "g", "classes": ["a"]})
    )
    for error in refused:
        assert isinstance(error, ConfigError)
        assert str(error) == (
            "the workers do not have the same data; give all of them the same image and arguments:\n"
            '  fingerprint: "f" on worker 0, "g" on worker 2'
        )
    told: list[tuple[int, str]] = []
    for one in peers:
        one.on_stop = lambda reason, i=one.index: told.append((i, reason))
    peers[2].broadcast_stop("SIGTERM on worker 2")
    time.sleep(0.5)
    assert sorted(told) == [(i, "SIGTERM on worker 2") for i in range(3)]
    on_all(peers, lambda p: (p.barrier("done"), p.disconnect()))


def test_differences_name_each_fact_once() -> None:
    assert differences([{"a": 1, "b": 2}, {"a": 1}, {"a": 3, "b": 2}]) == [
        "a: 1 on worker 0, 3 on worker 2",
        "b: 2 on worker 0, null on worker 1",
    ]


def test_who_is_missing_is_named_until_the_deadline() -> None:
    chief, second, _ = clusters(3)
    lines: list[str] = []
    errors: list[Interrupted] = []

    def start(cluster: Cluster) -> None:
        with pytest.raises(Interrupted) as caught:
            rendezvous(cluster, 4, lines.append, lambda: None)
        errors.append(caught.value)

    threads = [threading.Thread(target=start, args=(c,)) for c in (chief, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    missing = f"1 of 3 workers are missing: worker 2 ({chief.addresses[2]}: has not called)"
    assert lines.count(f"workers: {missing}") == 2  # on both
    assert sorted(str(e) for e in errors) == [
        f"{missing}. Waited for runtime.start_timeout",
        f"{missing}. Waited for runtime.start_timeout; start all workers again to go on",
    ]


def test_a_chief_that_is_missing_is_named() -> None:
    worker = Cluster(1, ("nowhere.invalid:2222", f"127.0.0.1:{free_ports(1)[0]}"), "test", "job")
    lines: list[str] = []
    with pytest.raises(Interrupted, match=r"^worker 0 \(nowhere.invalid:2222\) is missing: the name does not resolve"):
        rendezvous(worker, 3, lines.append, lambda: None)
    assert "workers: worker 0 (nowhere.invalid:2222) is missing: the name does not resolve yet" in lines


def test_something_else_on_the_chiefs_port_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nsome web server\r\n")
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        worker = Cluster(1, (f"127.0.0.1:{port}", f"127.0.0.1:{free_ports(1)[0]}"), "test", "job")
        with pytest.raises(Interrupted, match="something answers there that is no waiting worker"):
            rendezvous(worker, 2, lambda _: None, lambda: None)


def test_a_worker_of_another_job_is_refused() -> None:
    chief, other = clusters(2)
    stranger = Cluster(1, other.addresses, "test", "another job")
    results: list[object] = []

    def start(cluster: Cluster) -> None:
        try:
            results.append(rendezvous(cluster, 3, lambda _: None, lambda: None))
        except (ConfigError, Interrupted) as error:
            results.append(error)

    threads = [threading.Thread(target=start, args=(c,)) for c in (chief, stranger)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    refused = next(r for r in results if isinstance(r, ConfigError))
    assert str(refused) == (
        f"worker 0 refuses this worker: it belongs to {chief.job} with 2 workers, not to another job with 2"
    )
    assert any(isinstance(r, Interrupted) for r in results)


def test_a_taken_port_is_waited_for_and_named() -> None:
    chief, _ = clusters(2)
    port = int(chief.addresses[0].rpartition(":")[2])
    lines: list[str] = []
    with (
        socket.create_server(("", port)),
        pytest.raises(Interrupted, match=f"^port {port} of this worker is still taken by another process"),
    ):
        rendezvous(chief, 1.5, lines.append, lambda: None)
    assert f"workers: port {port} is taken by another process here; waiting until it is free" in lines


def test_garbage_on_the_wire_is_no_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as there:
        here, _ = server.accept()
        there.sendall(b"x" * 100)
        with pytest.raises(ProtocolError):
            Connection(here).receive()


WORKER = """
import json, os, sys, time
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import rendezvous
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError

def work(arguments):
    peers = rendezvous(discover(os.environ), 20, lambda text: print(text, flush=True), lambda: None)
    peers.on_end = lambda code, reason: print("ended", code, reason, flush=True)
    with peers.propagate_failures():
        print("ready", flush=True)
        if arguments[0] == "wrong" and peers.index == 1:
            raise ConfigError("this one is wrong")
        if arguments[0] == "bug" and peers.index == 1:
            raise KeyError("oh")
        if arguments[0] == "wait" and peers.index != 1:
            peers.barrier("never")
        time.sleep(60)

with exit_with_code():
    work(sys.argv[1:])
"""


def processes(count: int, mode: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    found = []
    for cluster in clusters(count):
        environment = {**os.environ, "TF_CONFIG": json.dumps(
            {"cluster": {"worker": cluster.addresses}, "task": {"type": "worker", "index": cluster.index}}
        )}  # fmt: skip
        with open(folder / f"{cluster.index}.log", "w") as log:
            command = [sys.executable, "-c", textwrap.dedent(WORKER), mode]
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return found


def await_ready(count: int, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not all("ready" in (folder / f"{i}.log").read_text() for i in range(count)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_worker_ends_all_at_once_with_75(lost: int, tmp_path: Path) -> None:
    workers = processes(3, "wait", tmp_path)
    await_ready(3, tmp_path)
    workers[lost].kill()
    began = time.monotonic()
    assert [w.wait(30) for i, w in enumerate(workers) if i != lost] == [75, 75]
    assert time.monotonic() - began < 10
    for i in {0, 1, 2} - {lost}:
        text = (tmp_path / f"{i}.log").read_text()
        assert f"lost worker {lost} (" in text
        assert "it ended without a word" in text
        assert "ended 75 " in text


def test_a_frozen_worker_ends_all_within_thirty_seconds(tmp_path: Path) -> None:
    workers = processes(3, "wait", tmp_path)
    await_ready(3, tmp_path)
    workers[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert [workers[i].wait(40) for i in (0, 2)] == [75, 75]
    assert time.monotonic() - began < 30
    assert "lost worker 1 (" in (tmp_path / "2.log").read_text()
    workers[1].send_signal(signal.SIGCONT)
    assert workers[1].wait(20) == 75  # it notices as soon as it can


@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [
        ("wrong", 2, "worker 1: this one is wrong"),
        ("bug", 75, "worker 1 ended with a bug (KeyError: 'oh'); its log has the traceback"),
    ],
)
def test_a_failure_of_one_is_told_to_all(mode: str, code: int, text: str, tmp_path: Path) -> None:
    workers = processes(3, mode, tmp_path)
    assert [workers[i].wait(40) for i in (0, 2)] == [code, code]
    assert workers[1].wait(20) == (2 if mode == "wrong" else 1)
    for i in (0, 2):
        said = (tmp_path / f"{i}.log").read_text()
        assert text in said
        assert "worker 1: worker 1" not in said
