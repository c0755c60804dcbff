"""Signals set the flag while the main thread is inside TensorFlow, also after TensorFlow replaced the handlers."""

import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.processes import ROOT, run_python
from tests.waiting import PATIENCE
from trainer.cluster import signals
from trainer.errors import INTERRUPTED
from trainer.monitoring.health import Health

PROGRAM = """
import ctypes, signal, sys, threading, time
from trainer.cluster.signals import StopFlag
from trainer.errors import StopRequested
stop, printed = StopFlag(), threading.Event()
def print_signal(reason):
    print("signal", reason, flush=True)
    printed.set()
stop.on_signal = print_signal
print("ready", flush=True)
{body}
"""
BUSY = """
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
def watch():
    while not stop.reason: time.sleep(0.01)
    print("seen", flush=True)
    printed.wait()
    library.pthread_mutex_unlock(mutex)
threading.Thread(target=watch).start()
print("main thread is away", flush=True)
library.pthread_mutex_lock(mutex)  # in C, where no Python handler can run, and no signal interrupts it
print("main thread is back", flush=True)
try:
    stop.check("here")
except StopRequested as error:
    print(error)
"""
PEER = """
stop.request("SIGTERM on worker 1")
print("requested", flush=True)
printed.wait()
print(stop.reason)
"""


@contextmanager
def started(body: str, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed these lines, and is killed at the end."""
    program = textwrap.dedent(PROGRAM).format(body=textwrap.dedent(body))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1) as child:
        try:
            assert child.stdout is not None
            for line in ("ready", *lines):
                assert child.stdout.readline() == f"{line}\n"
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_flag_is_set_while_the_main_thread_is_busy(number: signal.Signals) -> None:
    with started(BUSY, "main thread is away") as child:
        child.send_signal(number)
        out, err = child.communicate(timeout=PATIENCE)
    name = number.name
    *order, last, message = out.splitlines()
    assert sorted(order) == ["seen", f"signal {name}"]
    assert last == "main thread is back"
    assert message == f"{name} here; start the same command again, nothing is lost"
    assert f"{name}: saving at the next step, then stopping (again to stop at once)" in err


def test_a_second_signal_ends_at_once_with_75() -> None:
    with started("time.sleep(600)") as child:
        child.send_signal(signal.SIGTERM)
        assert child.stdout is not None
        assert child.stdout.readline() == "signal SIGTERM\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 75
    assert err.splitlines()[-1] == "SIGINT: stopping at once"  # not after the first one


def test_a_peers_signal_does_not_make_the_first_own_one_the_second() -> None:
    with started(PEER, "requested") as child:
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=PATIENCE)
    assert out == "signal SIGTERM\nSIGTERM on worker 1\n"
    assert child.returncode == 0


LATE = """
import os, signal, sys
class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):  # when Python takes down the modules
        kill(process, number)
late = Late()
sys.argv = ["trainer", "modle=3"]
from trainer.__main__ import main
main()
"""


def test_a_signal_after_the_end_does_not_change_the_exit_code() -> None:
    assert "there is no such key" in run_python(LATE, code=2).stderr


def test_a_step_that_does_not_end_after_a_stop_request_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: queue.Queue[tuple[int, str]] = queue.Queue()
    monkeypatch.setattr("trainer.cluster.signals.health", current := Health())
    signals.end_without_progress(lambda *outcome: ended.put(outcome), "SIGTERM", seconds=0.2)
    assert ended.get(timeout=PATIENCE) == (INTERRUPTED, "SIGTERM")
    checked = threading.Event()
    monkeypatch.setattr(Health, "seconds_since_progress", property(lambda _: checked.set() or 0.1))
    signals.end_without_progress(lambda *outcome: ended.put(outcome), "SIGTERM", seconds=0.2)
    current.record_progress()  # the step has ended: there is time to save
    assert checked.wait(PATIENCE)
    time.sleep(0.05)
    assert ended.empty()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("exit_on_sigterm(); os.kill(os.getpid(), 15)", 75),
        ("StopFlag(); os.kill(os.getpid(), 15); time.sleep(0.5); os.kill(os.getpid(), 15); time.sleep(99)", 75),
        ("termination.set_path('/nowhere/x'); termination.write(5); os._exit(5)", 5),
    ],
)
def test_signals_do_not_depend_on_who_reads_the_log(body: str, code: int) -> None:
    imports = "import os, time\nfrom trainer.cluster.signals import *\nfrom trainer.monitoring import termination\n"
    command = [sys.executable, "-c", imports + body]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, cwd=ROOT, stderr=full, timeout=PATIENCE, check=False)
    assert ended.returncode == code
