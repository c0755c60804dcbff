"""The log as text, and as one JSON object per line with Cloud Logging's field names."""

import datetime
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.processes import ROOT, run_python


def logged(program: str, code: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Stdout and stderr of a process; every line must be a JSON object."""
    head = "from trainer.monitoring.log import configure, log_unbuffered, log\n"
    result = run_python(head + program, code=code)
    out, err = ([json.loads(line) for line in text.splitlines()] for text in (result.stdout, result.stderr))
    return out, err


def test_a_record_has_the_fields_of_cloud_logging_and_its_own() -> None:
    program = """
from trainer.monitoring.health import health
configure(json_lines=True, worker='1')
health.enter_phase('head')
health.record_steps(7, 1)
log.info('\\ntwo\\nlines ü', extra={'fields': {'loss': 0.5, 'rate': float('inf')}})"""
    (entry,), err = logged(program)
    assert err == []
    when = datetime.datetime.fromisoformat(entry.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=5)
    assert entry == {
        "severity": "INFO", "message": "two\nlines ü", "phase": "head", "step": 7, "loss": 0.5, "rate": "inf",
        "logging.googleapis.com/labels": {"worker": "1"},
    }  # fmt: skip


def test_text_has_no_fields() -> None:
    program = """
from trainer.monitoring.log import configure, log
configure()
log.info('one', extra={'fields': {'loss': 3}})
log.error('two')
print('three')"""
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("one\nthree\n", "two\n")


@pytest.mark.parametrize("composed", [False, True])
def test_warnings_and_records_of_libraries_are_objects(composed: bool) -> None:
    program = f"""
configure(json_lines=True)
import logging, warnings
if {composed}:  # a configuration
    from trainer.cli.compose import compose
    compose(["data=digits"])
warnings.warn("old")
logging.getLogger("some.library").error("it failed")
logging.getLogger("some.library").info("unimportant")
"""
    out, err = logged(program)
    assert out == []
    assert [(e["severity"], e["logger"]) for e in err] == [("WARNING", "py.warnings"), ("ERROR", "some.library")]
    assert "UserWarning: old" in err[0]["message"]
    assert err[1]["message"] == "it failed"


def test_a_traceback_is_one_entry_of_severity_error() -> None:
    program = "configure(json_lines=True)\ndef broken():\n    raise ValueError('no')\nbroken()"
    out, (entry,) = logged(program, code=1)
    assert out == []
    assert entry["severity"] == "ERROR"
    assert entry["message"].startswith("Traceback (most recent call last):\n")
    assert entry["message"].endswith("in broken\nValueError: no")


def test_a_traceback_of_a_thread_too() -> None:
    program = "configure(json_lines=True)\nimport threading\nthreading.Thread(target=lambda: 1 / 0).start()"
    _, (entry,) = logged(program)
    assert entry["severity"] == "ERROR"
    assert "ZeroDivisionError" in entry["message"]


def test_lines_of_many_threads_do_not_mix() -> None:
    program = """
configure(json_lines=True)
import threading
def talk(n):
    for i in range(200):
        log.info(f"{n} {i} " + "x" * 5000)
threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    out, _ = logged(program)
    assert len({e["message"].split(" x")[0] for e in out}) == len(out) == 1600


def test_the_resource_tracker_of_multiprocessing_logs_nothing() -> None:
    program = """
configure(json_lines=True)
import multiprocessing, os
lock = multiprocessing.get_context('spawn').Lock()
os._exit(75)"""
    assert logged(program, code=75) == ([], [])


def test_last_words_before_the_end() -> None:
    program = "configure(json_lines=True)\nimport os\nlog_unbuffered('\\nSIGTERM: so long')\nos._exit(75)"
    _, (entry,) = logged(program, code=75)
    assert (entry["severity"], entry["message"]) == ("WARNING", "SIGTERM: so long")


STDOUT = "stdout: cannot be written to (No space left on device)"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("[log.info('x' * 100) for _ in range(3000)]", 0, f"{STDOUT}; lines of the log are lost"),
        ("print('x')", 75, f"interrupted: {STDOUT}; make space there, then start the same command again"),
        ("print('x', flush=True)", 75, f"interrupted: {STDOUT}; make space there, then start the same command again"),
        ("[print('x' * 100) for _ in range(3000)]", 75,
         f"interrupted: {STDOUT}; make space there, then start the same command again"),
        ("raise DataError('is wrong')", 2, "error: is wrong"),
    ],
)  # fmt: skip
def test_a_full_disk_of_stdout_is_named_once(body: str, code: int, line: str, unbuffered: str) -> None:
    program = f"""
from trainer.cli.process import exit_with_code
from trainer.errors import DataError
from trainer.monitoring.log import log
with exit_with_code():
    {body}
"""
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=-1,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr.splitlines()) == (code, [line])


def test_records_are_not_lost_if_the_process_ends_while_lines_are_dropped() -> None:
    program = """
import os, re
from trainer.monitoring.log import drop_stderr_lines
configure(json_lines=True)
with drop_stderr_lines(re.compile("noise")):
    os.write(2, b"noise\\n")
    log.error("stalled")
    log_unbuffered("ends")
    os._exit(75)"""
    _, err = logged(program, code=75)
    assert [entry["message"] for entry in err] == ["stalled", "ends"]
