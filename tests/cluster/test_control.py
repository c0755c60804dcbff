"""Rendezvous and control channel over real sockets: missing, disagreeing, lost and failing workers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scripts.same_bits import free_ports
from tests.errors import raises
from tests.waiting import PATIENCE, wait_until
from trainer.cluster.control import (
    HEARTBEAT_INTERVAL_SECONDS,
    HEARTBEAT_TIMEOUT_SECONDS,
    Connection,
    ControlChannel,
    ProtocolError,
    list_differences,
)
from trainer.cluster.discovery import Cluster, discover
from trainer.cluster.rendezvous import rendezvous
from trainer.errors import ConfigError, Interrupted

ROOT = Path(__file__).parents[2]


def clusters(count: int) -> list[Cluster]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    config = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(count)]
    return [discover({"TF_CONFIG": json.dumps(tree)}) for tree in config]


def in_threads(function: Callable[[Any], Any], workers: Sequence[Any]) -> list[Any]:
    """The results or exceptions of concurrent calls, one per worker."""

    def call(worker: Any) -> Any:
        try:
            return function(worker)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(call, workers, timeout=PATIENCE))


def connected(workers: Sequence[Cluster], seconds: float, lines: list[str]) -> list[Any]:
    """The control channels, or exceptions, of workers that are threads of this process."""
    return in_threads(lambda cluster: rendezvous(cluster, seconds, lines.append, lambda: None), workers)


def connect(cluster: Cluster, index: int = 0) -> Connection:
    """A connection to a worker, as soon as it listens."""
    host, _, port = cluster.addresses[index].rpartition(":")

    def try_to_connect() -> Connection | None:
        with contextlib.suppress(ConnectionRefusedError):
            return Connection(socket.create_connection((host, int(port)), PATIENCE))
        return None

    connection = wait_until(try_to_connect, f"worker {index} at {cluster.addresses[index]}")
    assert connection
    return connection


def test_one_worker_needs_no_connection() -> None:
    peers = rendezvous(discover({}), 1, pytest.fail, lambda: None)
    assert (peers.index, peers.size, peers.is_chief) == (0, 1, True)
    assert peers.gather("a", b"x") == [b"x"]
    assert peers.broadcast("b", lambda: {"c": 1.5}) == {"c": 1.5}
    assert peers.any_worker("d", True)
    assert not peers.any_worker("d", False)
    peers.require_equal("data", {"fingerprint": "f"})
    peers.barrier("e")
    peers.disconnect()


def test_collective_operations_and_stop_requests() -> None:
    peers = connected(clusters(3), PATIENCE, [])
    payloads = [bytes([i]) * 300_000 for i in range(3)]
    assert in_threads(lambda p: p.gather("a", payloads[p.index]), peers) == [payloads, None, None]
    assert in_threads(lambda p: p.broadcast("b", lambda: [0.1, p.index]), peers) == [[0.1, 0]] * 3
    assert in_threads(lambda p: p.any_worker("c", p.index == 2), peers) == [True] * 3
    assert in_threads(lambda p: p.any_worker("c", False), peers) == [False] * 3
    assert in_threads(lambda p: p.require_equal("data", {"fingerprint": "f"}), peers) == [None] * 3
    facts = [{"fingerprint": fingerprint, "classes": ["a"]} for fingerprint in "ffg"]
    for error in in_threads(lambda p: p.require_equal("data", facts[p.index]), peers):
        with raises(
            ConfigError, fix="same image", problem='same data:\n  fingerprint: "f" on worker 0, "g" on worker 2$'
        ):
            raise error
    stops: list[tuple[int, str]] = []
    for peer in peers:
        peer.on_stop = lambda reason, i=peer.index: stops.append((i, reason))
    peers[2].broadcast_stop("SIGTERM on worker 2")
    in_threads(lambda p: p.barrier("done"), peers)  # its messages come after those of the stop
    assert sorted(stops) == [(i, "SIGTERM on worker 2") for i in range(3)]
    in_threads(lambda p: p.disconnect(), peers)


def test_differences_name_each_fact_once() -> None:
    assert list_differences([{"a": 1, "b": 2}, {"a": 1}, {"a": 3, "b": 2}]) == [
        "a: 1 on worker 0, 3 on worker 2",
        "b: 2 on worker 0, null on worker 1",
    ]


TIMEOUT = "runtime.start_timeout"


@pytest.fixture
def frequent_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cluster.rendezvous.REPORT_INTERVAL_SECONDS", 0.5)


@pytest.mark.usefixtures("frequent_reports")
def test_a_missing_worker_is_named_on_all_others_until_the_deadline() -> None:
    chief, second, _ = clusters(3)
    lines: tuple[list[str], list[str]] = ([], [])
    workers = in_threads(lambda c: rendezvous(c, 3, lines[c.index].append, lambda: None), [chief, second])
    for error, reports in zip(workers, lines, strict=True):
        with raises(Interrupted, key=TIMEOUT, fix="start all workers again") as caught:
            raise error
        missing = f"1 of 3 workers are missing: worker 2 ({chief.addresses[2]}: has not connected)"
        assert caught.value.problem == missing
        assert f"workers: {missing}" in reports


@pytest.mark.usefixtures("frequent_reports")
def test_a_missing_chief_is_named() -> None:
    worker = Cluster(1, ("nowhere.invalid:2222", f"127.0.0.1:{free_ports(1)[0]}"), "test", "job")
    lines: list[str] = []
    with raises(Interrupted, key=TIMEOUT, problem=r"^worker 0 \(nowhere.invalid:2222\) is missing: .*not resolve"):
        rendezvous(worker, 3, lines.append, lambda: None)
    assert "workers: worker 0 (nowhere.invalid:2222) is missing: the name does not resolve yet" in lines


def test_another_server_on_the_port_of_the_chief() -> None:
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
        with raises(Interrupted, key=TIMEOUT, problem="another server uses its port"):
            rendezvous(worker, 2, lambda _: None, lambda: None)


def test_a_worker_of_another_job_is_rejected() -> None:
    chief, other = clusters(2)
    unknown = Cluster(1, other.addresses, "test", "another job")
    interrupted, refused = connected([chief, unknown], 3, [])
    assert isinstance(interrupted, Interrupted)
    with raises(ConfigError, problem=f"this is {chief.job} with 2 workers, not another job with 2", fix="same image"):
        raise refused


def test_a_port_in_use_is_named() -> None:
    chief, _ = clusters(2)
    port = int(chief.addresses[0].rpartition(":")[2])
    lines: list[str] = []
    with (
        socket.create_server(("", port)),
        raises(Interrupted, problem=f"port {port} of this worker is in use", fix="WORKER_PORT"),
    ):
        rendezvous(chief, 1.5, lines.append, lambda: None)
    assert f"workers: port {port} is in use by another process; waiting until it is free" in lines


def test_a_second_process_with_one_index_is_named() -> None:
    chief, second, third = clusters(3)
    channels: list[Any] = []
    waiting = threading.Thread(target=lambda: channels.extend(connected([chief, second], PATIENCE, [])))
    waiting.start()
    try:
        for index in range(2):
            connect(chief, index).close()
        # On the same machine its port is in use; on another one the other process responds at its address.
        twin = Cluster(1, second.addresses, "TF_CONFIG", second.job)
        with raises(
            ConfigError, key="TF_CONFIG", problem=f"index of worker 1: .* at {second.addresses[1]}", fix="own index"
        ):
            rendezvous(twin, PATIENCE, lambda _: None, lambda: None)
        pod = Cluster(0, chief.addresses, "Indexed Job a", chief.job)
        with raises(ConfigError, key="JOB_COMPLETION_INDEX", problem="index of worker 0", fix="earlier start"):
            rendezvous(pod, PATIENCE, lambda _: None, lambda: None)
    finally:
        channels += connected([third], PATIENCE, [])
        waiting.join()
    assert [type(channel) for channel in channels] == [ControlChannel] * 3, channels  # the first two were not disturbed
    in_threads(lambda channel: channel.disconnect(), channels)


def test_bytes_of_another_protocol_are_rejected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        client.sendall(b"x" * 100)
        with pytest.raises(ProtocolError):
            Connection(accepted).receive()


WORKER = """
import json, os, sys, time
from trainer.cluster import control
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import _Rendezvous, rendezvous
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError

def work(arguments):
    peers = rendezvous(discover(os.environ), 240, lambda text: print(text, flush=True), lambda: None)
    peers.on_end = lambda code, reason: print("ended", code, reason, flush=True)
    with peers.propagate_failures():
        print("ready", flush=True)
        if arguments[0] == "wrong" and peers.index == 1:
            raise ConfigError("this one is wrong")
        if arguments[0] == "bug" and peers.index == 1:
            raise KeyError("oh")
        if arguments[0] == "wait" and peers.index != 1:
            peers.barrier("never")
        time.sleep(600)

control.HEARTBEAT_INTERVAL_SECONDS, control.HEARTBEAT_TIMEOUT_SECONDS = map(float, sys.argv[2:])
with exit_with_code():
    work(sys.argv[1:])
"""
HEARTBEATS = (HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS)


@contextlib.contextmanager
def processes(
    count: int, mode: str, folder: Path, heartbeats: tuple[float, float] = HEARTBEATS
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers that are killed at the end."""
    workers = []
    for cluster in clusters(count):
        environment = {**os.environ, "TF_CONFIG": json.dumps(
            {"cluster": {"worker": cluster.addresses}, "task": {"type": "worker", "index": cluster.index}}
        )}  # fmt: skip
        with open(folder / f"{cluster.index}.log", "w") as log:
            command = [sys.executable, "-c", textwrap.dedent(WORKER), mode, *map(str, heartbeats)]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def await_ready(workers: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    for index, worker in enumerate(workers):
        log = folder / f"{index}.log"
        wait_until(lambda: "ready" in log.read_text(), log.read_text, process=worker)  # noqa: B023


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_worker_ends_all_at_once_with_75(lost: int, tmp_path: Path) -> None:
    """Without a heartbeat that is missing."""
    with processes(3, "wait", tmp_path, (HEARTBEAT_INTERVAL_SECONDS, 600.0)) as workers:
        await_ready(workers, tmp_path)
        workers[lost].kill()
        assert [w.wait(PATIENCE) for i, w in enumerate(workers) if i != lost] == [75, 75]
    for i in {0, 1, 2} - {lost}:
        text = (tmp_path / f"{i}.log").read_text()
        assert f"lost worker {lost} (" in text
        assert "connection closed without notice" in text
        assert "ended 75 " in text


@pytest.mark.parametrize("heartbeats", [(0.5, 6.0), pytest.param(HEARTBEATS, marks=pytest.mark.slow)])
def test_a_frozen_worker_ends_all_within_thirty_seconds(heartbeats: tuple[float, float], tmp_path: Path) -> None:
    assert sum(HEARTBEATS) < 30  # the limit, and the interval until it is checked
    with processes(3, "wait", tmp_path, heartbeats) as workers:
        await_ready(workers, tmp_path)
        workers[1].send_signal(signal.SIGSTOP)
        assert [workers[i].wait(PATIENCE) for i in (0, 2)] == [75, 75]
        assert "lost worker 1 (" in (tmp_path / "2.log").read_text()
        workers[1].send_signal(signal.SIGCONT)
        assert workers[1].wait(PATIENCE) == 75  # as soon as it resumes


@pytest.mark.parametrize(
    ("mode", "code", "text"),
    [("wrong", 2, "worker 1: this one is wrong"), ("bug", 75, "worker 1 failed with a bug (KeyError: 'oh')")],
)
def test_a_failure_of_one_ends_all(mode: str, code: int, text: str, tmp_path: Path) -> None:
    with processes(3, mode, tmp_path) as workers:
        assert [workers[i].wait(PATIENCE) for i in (0, 2)] == [code, code]
        assert workers[1].wait(PATIENCE) == (2 if mode == "wrong" else 1)
    for i in (0, 2):
        log = (tmp_path / f"{i}.log").read_text()
        assert text in log
        assert "worker 1: worker 1" not in log
