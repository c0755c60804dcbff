"""The watchdog ends a process in which Python does not run, and no other one."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.same_bits import free_ports
from tests.waiting import PATIENCE, wait_until
from trainer.cluster import watchdog_process
from trainer.cluster.protocol import MAGIC, PREFIX
from trainer.cluster.watchdog import encode_state
from trainer.cluster.watchdog_process import (
    INTERVAL_SECONDS,
    PEER_TIMEOUT_SECONDS,
    SIGNAL_TIMEOUT_SECONDS,
    STACK_SIGNAL,
    UNRESPONSIVE_SECONDS,
    Observation,
    Peer,
    _Watchdog,
    decide_end_reason,
    decode_indices,
    parse_newest_state,
    parse_unread_messages,
)
from trainer.errors import INTERRUPTED
from trainer.monitoring.health import health
from trainer.names import MAX_COMPONENT_BYTES

ROOT = Path(__file__).parents[2]
GIL_SECONDS = 90
GRACE_SECONDS = 120  # after which Kubernetes kills a pod (k8s/base/job.yaml)
PROGRAM = f"""
import ctypes, os, sys, threading, time
from types import SimpleNamespace
from trainer.cluster import watchdog
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import rendezvous
from trainer.cluster.signals import StopFlag
from trainer.monitoring.health import health
from trainer.monitoring.http import serve

limit, port, log, body = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
control = rendezvous(discover(os.environ), {PATIENCE}, print, lambda: None)
stop = StopFlag()
health.stuck_after = limit
listener = serve(port, health, "").socket if port else None
runtime = SimpleNamespace(termination_log=log, log_format="text")
child = watchdog.start(runtime, control, stop.unread, listener)
library = ctypes.PyDLL(None)  # holds the GIL in its calls
mutex = ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
def hold_gil(seconds={GIL_SECONDS}):
    end = (ctypes.c_long * 2)(int(time.time() + seconds), 0)
    library.pthread_mutex_timedlock(mutex, end)  # a signal does not interrupt it
print("ready", child, hex(ctypes.addressof(mutex)), flush=True)
exec(body)
"""
UNTIL_DONE = """
    while not os.path.exists({file!r}): time.sleep(0.02)
    {end}
    os._exit(5)
"""


class Guarded(NamedTuple):
    """A process with a watchdog."""

    child: subprocess.Popen[str]
    watchdog: int  # its process ID
    mutex: str  # the address of the mutex for which `hold_gil` waits

    def await_gil_held(self) -> None:
        """Wait until the main thread is in the system call of `hold_gil` (`man 5 proc`, /proc/pid/syscall)."""
        call = Path(f"/proc/{self.child.pid}/syscall")
        wait_until(lambda: self.mutex in call.read_text().split(), "a thread that holds the GIL", process=self.child)

    def await_line(self, text: str) -> None:
        """Read the stderr of both processes up to a line with this text."""
        assert self.child.stderr is not None
        assert any(text in line for line in self.child.stderr), f"the end without {text!r}"


@contextmanager
def started(
    folder: Path,
    body: str,
    *,
    limit: float = 1e6,
    port: int = 0,
    worker: tuple[list[str], int] | None = None,
    cwd: Path = ROOT,
) -> Iterator[Guarded]:
    """A process with a watchdog that runs `body`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if worker:
        task = {"cluster": {"worker": worker[0]}, "task": {"type": "worker", "index": worker[1]}}
        environment["TF_CONFIG"] = json.dumps(task)
    command = [sys.executable, "-P", "-c", PROGRAM, str(limit), str(port), str(folder / "log"), textwrap.dedent(body)]
    child = subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1)
    assert child.stdout is not None
    try:
        line = next((line for line in child.stdout if line.startswith("ready")), None)
        assert line, child.communicate()[1]
        _, watchdog, mutex = line.split()
        yield Guarded(child, int(watchdog), mutex)
    finally:
        child.kill()
        child.communicate()


def is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def await_end(process: int) -> None:
    wait_until(lambda: not is_running(process), "the end of an orphan")


def test_a_process_that_holds_the_gil_beyond_its_limit_ends_with_75_and_its_stack(tmp_path: Path) -> None:
    with started(tmp_path, "health.set_activity('compiling'); hold_gil()", limit=4.5) as (child, watchdog, _):
        _, error = child.communicate(timeout=PATIENCE)
        assert child.returncode == INTERRUPTED
        await_end(watchdog)
    message = (tmp_path / "log").read_text()
    assert message.startswith("exit code 75 (interrupted): Python had not run for ")
    assert "in: compiling, longer than its limit of 4.5 s" in message
    assert "in hold_gil" in error
    assert "interrupted: Python had not run for" in error


@pytest.mark.slow
def test_a_call_with_a_limit_of_its_own(tmp_path: Path) -> None:
    body = """
    with health.blocked_in("a long call", 60): hold_gil(9)
    with health.blocked_in("the servers", 6): hold_gil()
    """
    with started(tmp_path, body, limit=3) as (child, _, _):
        assert child.wait(PATIENCE) == INTERRUPTED
    assert "in: the servers, longer than its limit of 6 s" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_a_process_that_holds_the_gil(tmp_path: Path, name: str) -> None:
    with started(tmp_path, "hold_gil()") as guarded:
        guarded.await_gil_held()  # an earlier signal is handled by Python
        guarded.child.send_signal(signal.Signals[name])
        assert guarded.child.wait(PATIENCE) == INTERRUPTED
    assert f"{name}, and Python had not run for" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_process_that_is_slow_or_stopped_or_blocked_without_the_gil_continues(tmp_path: Path) -> None:
    body = "hold_gil(5); time.sleep(8); hold_gil(1); print('end', flush=True); os._exit(7)"
    with started(tmp_path, body, limit=6) as (child, watchdog, _):
        time.sleep(6)
        child.send_signal(signal.SIGSTOP)
        time.sleep(9)
        assert child.poll() is None
        child.send_signal(signal.SIGCONT)
        assert child.wait(PATIENCE) == 7
        await_end(watchdog)
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_the_health_probe_is_answered_while_the_gil_is_held(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    body = "health.set_activity('compiling'); hold_gil(12); time.sleep(30)"
    with started(tmp_path, body, port=port) as guarded:
        guarded.await_gil_held()
        url = f"http://127.0.0.1:{port}/healthz"
        response = urllib.request.urlopen(url, timeout=PATIENCE)
        assert (response.status, response.read().decode()[:31]) == (200, "compiling; Python has not run f")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE)
        # By the process again.
        wait_until(lambda: urllib.request.urlopen(url, timeout=PATIENCE).read() == b"compiling\n")
        assert guarded.child.poll() is None


def test_neither_side_leaves_the_other(tmp_path: Path) -> None:
    with started(tmp_path, "time.sleep(600)") as (child, watchdog, _):
        child.kill()
        child.wait()
        await_end(watchdog)
    with started(tmp_path, UNTIL_DONE.format(file=str(tmp_path / "done"), end="hold_gil(1)")) as guarded:
        os.kill(guarded.watchdog, signal.SIGKILL)
        guarded.await_line("watchdog: has ended (exit code -9); the run continues without it")
        (tmp_path / "done").touch()
        assert guarded.child.wait(PATIENCE) == 5  # unguarded, but not ended


def test_modules_of_the_working_directory_are_not_those_of_the_watchdog(tmp_path: Path) -> None:
    for name in ("trainer/__init__.py", "json.py", "socket.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit(1)")
    with started(tmp_path, "time.sleep(200)", cwd=tmp_path) as guarded:
        guarded.child.send_signal(STACK_SIGNAL)
        guarded.await_line("stacks of the threads:")  # which the watchdog logs


def test_requests_for_stacks_do_not_block_a_process(tmp_path: Path) -> None:
    with started(tmp_path, UNTIL_DONE.format(file=str(tmp_path / "done"), end="pass")) as guarded:
        child, watchdog, _ = guarded
        os.kill(watchdog, signal.SIGSTOP)
        for _ in range(400):
            child.send_signal(STACK_SIGNAL)
            time.sleep(0.005)
        os.kill(watchdog, signal.SIGCONT)
        guarded.await_line("stacks of the threads:")
        (tmp_path / "done").touch()
        assert child.wait(PATIENCE) == 5
        await_end(watchdog)


@pytest.mark.parametrize(
    ("data", "state", "rest"),
    [
        (b'{"a": 1}\n{"a": 2}\n', {"a": 2}, b""),
        (b'{"a": 1}\n{"a": 2}\n{"a"', {"a": 2}, b'{"a"'),
        (b'{"a": 1}\n{"a{"a": 2}\n', {"a": 1}, b""),
        (b'{"a{"a": 2}\n', None, b""),
        (b'5\n"\xff"\n', None, b""),
        (b"", None, b""),
    ],
)
def test_the_newest_state_is_the_last_whole_line(data: bytes, state: dict[str, int] | None, rest: bytes) -> None:
    assert parse_newest_state(data) == (state, rest)


@pytest.mark.parametrize("character", ["a", "ü", "\U0001f600", "\x1f", "\udce9"])
def test_a_state_is_a_line_that_a_pipe_takes_as_a_whole(monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    monkeypatch.setattr(health, "activity", character * 5000)
    monkeypatch.setattr(health, "phase", "p" * MAX_COMPONENT_BYTES)
    watched = [0, *range(3, 2000)]
    line = encode_state(watched)
    assert len(line) <= select.PIPE_BUF
    assert line.count(b"\n") == 1
    state, rest = parse_newest_state(line)
    assert state is not None
    assert rest == b""
    assert state["phase"] == health.phase
    assert len(state["activity"]) >= 500
    assert decode_indices(state["watched"]) == watched


@contextmanager
def watchdog_of(process: int, **settings: int) -> Iterator[tuple[_Watchdog, socket.socket]]:
    """A watchdog in this process, and the socket from which it reads signals."""
    unread, signals = socket.socketpair()
    with unread, signals:
        watchdog = _Watchdog({
            "process": process, "signals": os.dup(unread.fileno()), "peers": {}, "listener": None, **settings,
        })  # fmt: skip
        with watchdog.signals:
            yield watchdog, signals


def test_what_the_process_has_just_read_is_not_awaited() -> None:
    with watchdog_of(os.getpid()) as (watchdog, signals):
        watchdog.seconds = UNRESPONSIVE_SECONDS
        ends: list[str] = []
        watchdog.end = ends.append  # type: ignore[method-assign]
        watchdog.check()
        signals.send(bytes([signal.SIGCHLD, signal.SIGTERM]))
        watchdog.seconds = SIGNAL_TIMEOUT_SECONDS + 1
        watchdog.check()
        signals.close()
        watchdog.signals.recv(16)
        watchdog.check()
    assert [reason[:7] for reason in ends] == ["SIGTERM"]


def test_the_process_ends_although_nothing_can_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    reader, writer = os.pipe()
    monkeypatch.setattr(health, "phase", health.phase)
    with watchdog_of(ended.pid, stack=1 << 20, exit=writer) as (watchdog, _), pytest.raises(OSError, match=r"."):
        watchdog.end("x")
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)


def test_silent_clients_do_not_keep_the_watchdog_from_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for each one for a quarter of the interval, and for all together for the interval."""
    monkeypatch.setattr(watchdog_process, "INTERVAL_SECONDS", 0.4)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        watchdog_of(os.getpid()) as (watchdog, _),
        ExitStack() as stack,
    ):
        server.setblocking(False)
        watchdog.listener = server
        for _ in range(20):
            stack.enter_context(socket.create_connection(server.getsockname()))
        watchdog.respond()
        server.accept()[0].close()  # without waiting: most clients are still in the queue


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("peers.broadcast_stop('x'); os._exit(0)", r"lost worker 1 (ADDRESS): connection closed without notice"),
        ("raise TrainerError('no memory')", "worker 1 failed with a bug (no memory); its log has the traceback"),
        ("raise Interrupted('the disk is full')", "worker 1: the disk is full"),
    ],
)
def test_a_peer_that_ends_while_the_gil_is_held(tmp_path: Path, ending: str, reason: str) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 1}}
    peer = f"""
import os, sys, time
from trainer.cluster.discovery import discover
from trainer.cluster.rendezvous import rendezvous
from trainer.errors import Interrupted, TrainerError
peers = rendezvous(discover(os.environ), {PATIENCE}, print, lambda: None)
with peers.propagate_failures():
    while not os.path.exists({str(tmp_path / "may end")!r}): time.sleep(0.02)
    {ending}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task)}
    other = subprocess.Popen([sys.executable, "-c", peer], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    with started(tmp_path, "hold_gil()", worker=(addresses, 0)) as guarded:
        guarded.await_gil_held()
        (tmp_path / "may end").touch()
        assert guarded.child.wait(PATIENCE) == INTERRUPTED
        other.wait(PATIENCE)
    assert f"{reason.replace('ADDRESS', addresses[1])}; Python had not run for" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_sigterm_while_tensorflow_waits_for_a_peer(tmp_path: Path) -> None:
    """TensorFlow has replaced the handler of SIGTERM, and holds the GIL; the peer runs without TensorFlow."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    start_servers = """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    import tensorflow as tf
    os.environ["TF_CONFIG"] = control.cluster.tf_config()
    with health.blocked_in("starting TensorFlow's servers", 600): tf.distribute.MultiWorkerMirroredStrategy()
    """
    (tmp_path / "b").mkdir()
    command = [sys.executable, "-c", PROGRAM, "1e6", "0", str(tmp_path / "b" / "log"), "time.sleep(300)"]
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 1}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task)}
    peer = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        with started(tmp_path, start_servers, worker=(addresses, 0)) as (child, _, _):
            assert child.stderr
            next(line for line in child.stderr if "Waiting for 1/2 tasks" in line)
            child.send_signal(signal.SIGTERM)
            assert child.wait(GRACE_SECONDS) == INTERRUPTED
            assert "ensure_initialized" in child.stderr.read()
    finally:
        peer.kill()
        peer.wait()
    assert "Python had not run for" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_peer_that_leaves_as_planned_ends_nothing(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    body = "hold_gil(9); control.disconnect(); hold_gil(6); os._exit(0)"
    other = "time.sleep(1); control.disconnect(); os._exit(0)"
    (tmp_path / "b").mkdir()
    command = [sys.executable, "-c", PROGRAM, "1e6", "0", str(tmp_path / "b" / "log"), other]
    task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": 1}}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task)}
    second = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    with started(tmp_path, body, worker=(addresses, 0)) as (child, _, _):
        assert child.wait(PATIENCE) == 0
        assert second.wait(PATIENCE) == 0


def test_the_decision() -> None:
    def decide(seconds: float, *peers: Peer, name: str | None = None) -> str | None:
        return decide_end_reason(Observation(seconds, 900.0, "compiling", name, list(peers)))

    lost, silent = Peer(1, "b:1", closed=True), Peer(2, "c:1", silent_seconds=PEER_TIMEOUT_SECONDS + 1)
    assert decide(UNRESPONSIVE_SECONDS - 1, lost, silent, name="SIGTERM") is None
    assert "lost worker 1 (b:1): connection closed" in (decide(UNRESPONSIVE_SECONDS, Peer(2, "c:1"), lost) or "")
    assert "lost worker 2 (c:1): no heartbeat for 61 s" in (decide(100, silent) or "")
    assert decide(100, Peer(1, "b:1", closed=True, messages=[{"kind": "left"}])) is None
    assert decide(SIGNAL_TIMEOUT_SECONDS, name="SIGTERM") is None
    assert (decide(SIGNAL_TIMEOUT_SECONDS + 1, name="SIGTERM") or "").startswith(
        "SIGTERM, and Python had not run for 13 s"
    )
    assert decide(900) is None
    assert "longer than its limit of 900 s" in (decide(901) or "")
    assert UNRESPONSIVE_SECONDS > 2 * INTERVAL_SECONDS


def test_unread_messages_may_begin_within_one() -> None:
    def message(payload: bytes = b"", **header: object) -> bytes:
        text = json.dumps(header).encode()
        return PREFIX.pack(MAGIC, len(text), len(payload)) + text + payload

    data = message(b"\0" * 100, kind="value", topic="a") + message(kind="heartbeat") + message(kind="failed", code=2)
    kinds = [header["kind"] for header in parse_unread_messages(data)]
    assert kinds == ["value", "heartbeat", "failed"]
    assert [header["kind"] for header in parse_unread_messages(data[5:])] == ["heartbeat", "failed"]
    # The process has read the lengths of the first message, and waits for the GIL.
    assert [header["kind"] for header in parse_unread_messages(data[PREFIX.size :])] == kinds
    assert [header["kind"] for header in parse_unread_messages(data[:-3])] == ["value", "heartbeat"]
    assert parse_unread_messages(b"") == parse_unread_messages(b"kubetune") == []
