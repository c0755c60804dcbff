"""The termination message: for every exit, at most 4,096 bytes, and without effect on the exit code."""

import subprocess
from pathlib import Path

import pytest

from tests.processes import run_python
from trainer.monitoring.termination import MAX_BYTES, truncate_message

PROGRAM = """
import sys
from trainer.cli.process import exit_with_code
from trainer.errors import Drifted, GaveUp, Interrupted
from trainer.monitoring import termination
termination.set_path(sys.argv[1])
with exit_with_code():
{body}
"""


def ended(body: str, file: Path, code: int) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(body="".join(f"    {line}\n" for line in body.splitlines()))
    return run_python(program, file, code=code)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("termination.set_success_message('accuracy 0.9')", 0, "exit code 0 (done): accuracy 0.9"),
        ("pass", 0, "exit code 0 (done)"),
        ("raise GaveUp('5 restarts')", 3, "exit code 3 (gave up): 5 restarts"),
        ("raise Drifted('classes shifted')", 4, "exit code 4 (drifted): classes shifted"),
        ("raise Interrupted('SIGTERM')", 75, "exit code 75 (interrupted): SIGTERM"),
        ("raise KeyboardInterrupt", 75, "exit code 75 (interrupted): interrupted before anything was trained"),
        ("{}['x']", 1, "exit code 1 (a bug): KeyError: 'x'; the log has the traceback"),
        ("termination.set_success_message('fine')\nraise ValueError('no')", 1, "exit code 1 (a bug): ValueError: no; the log has the traceback"),
    ],
)  # fmt: skip
def test_each_exit_has_its_message(tmp_path: Path, body: str, code: int, message: str) -> None:
    file = tmp_path / "termination-log"
    file.write_text("longer earlier content " * 9)
    ended(body, file, code)
    assert file.read_text() == message


def test_a_bug_still_prints_its_traceback(tmp_path: Path) -> None:
    err = ended("{}['x']", tmp_path / "log", 1).stderr
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("KeyError: 'x'\n")


def test_a_file_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "no" / "log"
    result = ended("raise Interrupted('SIGTERM')", file, 75)
    assert result.stderr.startswith(f"interrupted: SIGTERM\nruntime.termination_log={file}: cannot be written (No such")


@pytest.mark.parametrize("text", ["x" * 5000, "ä" * 3000, "𝄞" * 1500, "x" + "€" * 2000])
def test_kubernetes_reads_4096_bytes(text: str) -> None:
    data = truncate_message(text)
    assert MAX_BYTES - 6 <= len(data) <= MAX_BYTES
    assert data.decode().endswith(text[-1] + "…")


def test_a_short_message_is_unchanged() -> None:
    assert truncate_message("ä" * 2048) == ("ä" * 2048).encode()
    assert truncate_message("\ud800") == b"\\ud800"
