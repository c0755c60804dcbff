"""Signals set the flag while the main thread is inside TensorFlow, also after TensorFlow replaced the handlers."""

import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.processes import ROOT, run_python
from trainer.cluster import signals
from trainer.errors import INTERRUPTED
from trainer.monitoring.health import Health

PROGRAM = """
import signal, sys, time
from trainer.cluster.signals import StopFlag
from trainer.errors import StopRequested
stop = StopFlag()
stop.on_signal = lambda reason: print("signal", reason, flush=True)
print("ready", flush=True)
{body}
"""
BUSY = """
import hashlib, threading
def watch():
    while not stop.reason: time.sleep(0.01)
    print("seen", flush=True)
threading.Thread(target=watch).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds in C, where no Python handler can run
print("main thread is back", flush=True)
try:
    stop.check("here")
except StopRequested as error:
    print(error)
"""
WAITING = "time.sleep(30)"
PEER = """
stop.request("SIGTERM on worker 1")
print("requested", flush=True)
[time.sleep(0.1) for _ in range(30)]
print(stop.reason)
"""


def started(body: str) -> subprocess.Popen[str]:
    program = textwrap.dedent(PROGRAM).format(body=textwrap.dedent(body))
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=-1, stderr=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_flag_is_set_while_the_main_thread_is_busy(number: signal.Signals) -> None:
    child = started(BUSY)
    time.sleep(0.2)
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    name = number.name
    *order, last, message = out.splitlines()
    assert sorted(order) == ["seen", f"signal {name}"]
    assert last == "main thread is back"
    assert message == f"{name} here; start the same command again, nothing is lost"
    assert f"{name}: saving at the next step, then stopping (again to stop at once)" in err


def test_a_second_signal_ends_at_once_with_75() -> None:
    child = started(WAITING)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(120) == 75


def test_a_peers_signal_does_not_make_the_first_own_one_the_second() -> None:
    child = started(PEER)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=120)
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
    assert ended.get(timeout=60) == (INTERRUPTED, "SIGTERM")
    checked = threading.Event()
    monkeypatch.setattr(Health, "seconds_since_progress", property(lambda _: checked.set() or 0.1))
    signals.end_without_progress(lambda *outcome: ended.put(outcome), "SIGTERM", seconds=0.2)
    current.record_progress()  # the step has ended: there is time to save
    assert checked.wait(120)
    time.sleep(0.05)
    assert ended.empty()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("exit_on_sigterm(); os.kill(os.getpid(), 15)", 75),
        ("StopFlag(); os.kill(os.getpid(), 15); time.sleep(0.5); os.kill(os.getpid(), 15); time.sleep(9)", 75),
        ("termination.set_path('/nowhere/x'); termination.write(5); os._exit(5)", 5),
    ],
)
def test_signals_do_not_depend_on_who_reads_the_log(body: str, code: int) -> None:
    imports = "import os, time\nfrom trainer.cluster.signals import *\nfrom trainer.monitoring import termination\n"
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", imports + body], cwd=ROOT, stderr=full, timeout=30, check=False)
    assert ended.returncode == code
