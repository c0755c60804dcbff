"""With `runtime.log_format=json` every log record is one JSON object per line, with Cloud Logging's field names."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def told(program: str, code: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a process said on stdout and on stderr; every line must be a JSON object."""
    head = "from trainer.monitoring.log import configure, last_words, log\n"
    command = [sys.executable, "-c", head + program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == code, result.stderr
    out, err = ([json.loads(line) for line in text.splitlines()] for text in (result.stdout, result.stderr))
    return out, err


def test_a_line_has_the_fields_of_cloud_logging_and_its_numbers() -> None:
    program = (
        "from trainer.monitoring.health import health\nconfigure(json_lines=True, worker='1')\nhealth.enter_phase('head')\nhealth.steps_taken(7, 1)\n"
        "log.info('\\ntwo\\nlines ü', extra={'fields': {'loss': 0.5, 'rate': float('inf')}})"
    )
    (entry,), err = told(program)
    assert err == []
    when = datetime.datetime.fromisoformat(entry.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=1)
    assert entry == {
        "severity": "INFO", "message": "two\nlines ü", "phase": "head", "step": 7, "loss": 0.5, "rate": "inf",
        "logging.googleapis.com/labels": {"worker": "1"},
    }  # fmt: skip


def test_text_stays_as_it_was() -> None:
    program = "from trainer.monitoring.log import configure, log\nconfigure()\nlog.info('one', extra={'fields': {'loss': 3}})\nlog.error('two')\nprint('three')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("one\nthree\n", "two\n")


def test_warnings_and_library_logs_are_objects() -> None:
    program = """
configure(json_lines=True)
import logging, warnings
warnings.warn("old")
logging.getLogger("some.library").error("it failed")
logging.getLogger("some.library").info("not worth a word")
"""
    out, err = told(program)
    assert out == []
    assert [(e["severity"], e["logger"]) for e in err] == [("WARNING", "py.warnings"), ("ERROR", "some.library")]
    assert "UserWarning: old" in err[0]["message"]
    assert err[1]["message"] == "it failed"


def test_composing_a_configuration_keeps_the_log_of_libraries() -> None:
    program = """
configure(json_lines=True)
import logging, warnings
from trainer.cli.compose import compose
compose(["data=digits"])
logging.getLogger("some.library").warning("look out")
warnings.warn("old")
"""
    _, err = told(program)
    assert [(e["severity"], e["logger"]) for e in err] == [("WARNING", "some.library"), ("WARNING", "py.warnings")]
    assert err[0]["message"] == "look out"


def test_a_traceback_is_one_entry_of_severity_error() -> None:
    program = "configure(json_lines=True)\ndef broken():\n    raise ValueError('no')\nbroken()"
    out, (entry,) = told(program, code=1)
    assert out == []
    assert entry["severity"] == "ERROR"
    assert entry["message"].startswith("Traceback (most recent call last):\n")
    assert entry["message"].endswith("in broken\nValueError: no")


def test_a_traceback_of_a_thread_too() -> None:
    program = (
        "configure(json_lines=True)\nimport threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\nt.join()"
    )
    _, (entry,) = told(program)
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
    out, _ = told(program)
    assert len({e["message"].split(" x")[0] for e in out}) == len(out) == 1600


def test_what_multiprocessing_leaves_behind_is_not_told() -> None:
    program = "configure(json_lines=True)\nimport multiprocessing, os\nkept = multiprocessing.get_context('spawn').Lock()\nos._exit(75)"
    assert told(program, code=75) == ([], [])


def test_last_words_before_the_end() -> None:
    _, (entry,) = told(
        "configure(json_lines=True)\nimport os\nlast_words('\\nSIGTERM: so long')\nos._exit(75)", code=75
    )
    assert (entry["severity"], entry["message"]) == ("WARNING", "SIGTERM: so long")
