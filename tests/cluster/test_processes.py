"""A process that replaces itself by one of the same command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, socket, sys
from trainer.cluster.processes import replace_process
from trainer.cluster.signals import exit_on_sigterm
print(os.getpid(), sys.argv[1:], "SECRET" in os.environ, sorted(os.listdir("/proc/self/fd"), key=int)[:-1], flush=True)
if "again" not in sys.argv:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)  # as those of libraries
    os.environ["SECRET"] = "1"
    execve = os.execve
    def signalled(*arguments):
        if "signal" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)
        execve(*arguments)
    os.execve = signalled
    environment = {k: v for k, v in os.environ.items() if k != "SECRET"}
    replace_process(["again"], environment, lambda: "request" in sys.argv)
exit_on_sigterm()
print("no signal")
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_it_has_the_same_number_arguments_and_streams_and_nothing_else() -> None:
    ended = run("it's", "a b")
    assert ended.returncode == 0, ended.stderr
    first, second, last = ended.stdout.splitlines()
    pid, given = first.split()[0], ["it's", "a b"]
    assert first.startswith(f"{pid} {given} False ['0', '1', '2'")
    assert second == first.replace("'a b']", "'a b', 'again']")
    assert last == "no signal"


@pytest.mark.parametrize("when", ["signal", "request"])
def test_a_signal_before_or_meanwhile_is_not_lost(when: str) -> None:
    ended = run(when)
    assert ended.returncode == 75, ended.stderr
    assert len(ended.stdout.splitlines()) == 2
    assert "interrupted: SIGTERM" in ended.stderr + ended.stdout
