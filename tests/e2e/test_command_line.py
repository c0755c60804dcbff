"""Replies of the command line that must not wait for TensorFlow."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ROOT, SMALL, has_loaded, start, train
from tests.processes import run_python
from tests.waiting import PATIENCE, wait_until

ANSWERS: list[tuple[list[str], int, str, str]] = [
    (["--help"], 0, "out", "kubetune fine-tunes an image classifier in phases."),
    (["--cfg", "job"], 0, "out", "weights: glyphs"),
    (["experiment=flowers_mobilenet_v2", "data=image_folder", "data.root=x", "--cfg", "job"], 0, "out", "image_size: 160"),
    (["runtime=pod", "--cfg", "job"], 0, "out", "http_port: 8080"),
    (["data=digitss"], 2, "err", "error: data=digitss: there is no such data; did you mean digits?"),
    (["phases.head.epoch=3"], 2, "err", "phases.head.epoch: there is no such key; did you mean phases.head.epochs?"),
    (["phases.head.epochs=-1", "seed=x"], 2, "err", "the configuration has 2 errors:"),
    (["data=image_folder"], 2, "err", "error: data.root: must be given; add data.root=..."),
    (["seed=[1"], 2, "err", "error: seed=[1: cannot be read as a value"),
    (["phases.haed.epochs=3"], 2, "err", "phases.haed.thaw: there is no phase 'haed'; did you mean head?"),
    (["runtime.max_fruitless_restarts=3"], 2, "err", "use runtime.max_restarts_without_progress"),
]  # fmt: skip
# The command with each list of arguments, one after the other: importing it takes longer than the answers.
PROGRAM = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from trainer.__main__ import main

answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = ["trainer", *arguments], StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    slow = "tensorflow" in sys.modules
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "slow": slow, "files": os.listdir()})
print("RESULT", json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    options = {"cwd": tmp_path_factory.mktemp("empty"), "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    result = run_python(PROGRAM, json.dumps([arguments for arguments, *_ in ANSWERS]), **options)
    return list(json.loads(result.stdout.split("RESULT")[1]))


@pytest.mark.parametrize("number", range(len(ANSWERS)), ids=[" ".join(arguments) for arguments, *_ in ANSWERS])
def test_answers_at_once(number: int, answers: list[dict[str, Any]]) -> None:
    _, code, stream, sentence = ANSWERS[number]
    answer = answers[number]
    assert answer["code"] == code
    assert sentence in answer[stream]
    assert "Traceback" not in answer["err"]
    assert not answer["slow"]  # TensorFlow was not imported
    assert answer["files"] == []  # nothing was written, no folder was made


def test_tensorflow_is_not_imported_before_the_configuration_is_right() -> None:
    program = (
        "import sys; sys.argv = ['trainer', 'seed=-1']\n"
        "from trainer.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'tensorflow' in sys.modules)\n"
    )
    assert run_python(program).stdout.split() == ["2", "False"]


def test_a_folder_with_something_else_in_it_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    error = train(f"output_dir={tmp_path}", code=2).stderr
    assert f"output_dir={tmp_path}" in error
    assert "letter.txt" in error
    train(f"output_dir={tmp_path / 'new'}", "resume=must", code=2)


def test_an_output_dir_that_cannot_be_made_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = train(f"output_dir={tmp_path / 'file' / 'run'}", code=2).stderr
    assert re.search(r"^error: output_dir=.*\(?Not a directory", error)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="inspects the process through Linux's /proc")
def test_sigterm_while_tensorflow_is_imported_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a line on stderr for each module, once it has been imported
    child = start(*SMALL, f"output_dir={tmp_path / 'run'}")
    wait_until(lambda: has_loaded(child.pid, "libtensorflow"), process=child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 75
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported
    assert not imported & {"keras", "tensorflow"}
    assert "interrupted: SIGTERM before training began, nothing is lost; start the same command again to resume" in err


# Runs a module as `python -m` does, and suspends the process when it has installed a handler of SIGTERM.
SUSPENDED = """
import os, runpy, signal, sys

def install_and_suspend(number, handler, install=signal.signal):
    install(number, handler)
    if number == signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGSTOP)

signal.signal, sys.argv = install_and_suspend, sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="inspects the process through Linux's /proc")
@pytest.mark.parametrize("module", ["trainer", "trainer.prepare", "trainer.plan"])
def test_a_signal_ends_the_process_before_anything_large_is_imported(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SUSPENDED, module, f"output={tmp_path}"]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1)
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    early = not has_loaded(child.pid, "pydantic_core")
    child.terminate()
    child.send_signal(signal.SIGCONT)
    out, err = child.communicate(timeout=PATIENCE)
    assert early
    assert child.returncode == 75
    assert out == ""
    assert err.startswith("interrupted: SIGTERM")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("preset", ["pod", "gpu_pod"])
def test_an_error_in_the_configuration_of_a_pod_is_in_its_log_and_termination_message(
    preset: str, tmp_path: Path
) -> None:
    file = tmp_path / "termination-log"
    result = train(f"runtime={preset}", f"runtime.termination_log={file}", "seed=-1", code=2, cwd=tmp_path)
    (entry,) = [json.loads(line) for line in (result.stdout + result.stderr).splitlines()]
    assert [(fault["key"], fault["value"]) for fault in entry["faults"]] == [("seed", -1)]
    assert "seed" in file.read_text()
