"""Waiting for an event ends with it, after its time, or with the process that should cause it."""

import subprocess
import sys

import pytest

from tests.waiting import wait_until


def test_the_result_of_the_condition_is_returned() -> None:
    results = iter(["", None, "event"])
    assert wait_until(lambda: next(results)) == "event"


def test_an_event_that_does_not_occur_is_a_failure_after_its_time() -> None:
    calls: list[str] = []
    with pytest.raises(AssertionError, match=r"^not within 0\.05 s: the output is \['call'"):
        wait_until(lambda: calls.append("call"), lambda: f"the output is {calls}", seconds=0.05)


def test_the_end_of_the_process_is_a_failure_at_once() -> None:
    with (
        subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(AssertionError, match=r"^the process has ended with 3: the line$"),
    ):
        wait_until(lambda: False, "the line", process=process)
    assert wait_until(lambda: process.returncode == 3, process=process)  # true by the time of its end
