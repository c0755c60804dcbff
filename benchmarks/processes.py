"""Run Python programs in child processes, and measure their duration, memory, and the times of their log lines."""

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.05  # interval at which the memory of a child process is sampled


@dataclass(frozen=True)
class FinishedProcess:
    """A process that has exited with code 0.

    Attributes:
        started_at: time.time() of its start.
        output: its standard output.
        peak_mb: peak resident memory, pages of mapped files included.
        anonymous_mb: peak anonymous memory, sampled every 50 ms.
        seconds: duration of the process.
    """

    started_at: float
    output: str
    peak_mb: float
    anonymous_mb: float
    seconds: float


def run_python(*arguments: str, environment: dict[str, str] | None = None) -> FinishedProcess:
    """Run Python with these command-line arguments and additional environment variables, and wait for its end.

    Raises:
        SystemExit: the exit code is not 0. The message has the command and the end of the output.
    """
    command = [sys.executable, *arguments]
    # With PYTHONPATH, the modules of this repository can be imported in every working directory.
    full_environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(ROOT), **(environment or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started_at = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env=full_environment, stdout=out, stderr=errors)
        anonymous_mb = 0.0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    seconds = time.time() - started_at
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                anonymous_mb = max(anonymous_mb, _read_anonymous_mb(process.pid))
                time.sleep(POLL_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        out.seek(0)
        errors.seek(0)
        output = out.read().decode()
        if process.returncode:
            end = (output + errors.read().decode(errors="replace"))[-2000:]
            sys.exit(f"{shlex.join(command)} ended with {process.returncode}:\n{end}")
    return FinishedProcess(started_at, output, usage.ru_maxrss / 1024, anonymous_mb, seconds)


def _read_anonymous_mb(pid: int) -> float:
    """Return the anonymous memory of a running process; 0 if the process has ended."""
    try:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # the process has ended
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of `python -m trainer`. Times are in seconds since the start of the process.

    Attributes:
        process: the process of the run.
        lines: the parsed JSON log lines. Each has `message`, its time `at`, and the values of an interval or an epoch.
        breakdown: the run's time breakdown, seconds by category.
    """

    process: FinishedProcess
    lines: list[dict[str, Any]]
    breakdown: dict[str, float]

    def get_time_of(self, prefix: str) -> float:
        """Return the time of the first log line whose message starts with `prefix`.

        Raises:
            SystemExit: there is no such line.
        """
        for line in self.lines:
            if line["message"].startswith(prefix):
                return float(line["at"])
        last_messages = [line["message"] for line in self.lines[-5:]]
        sys.exit(f"no line of the run starts with {prefix!r}; the last lines: {last_messages}")

    @property
    def epoch_lines(self) -> list[dict[str, Any]]:
        """The log lines at the ends of epochs."""
        return [line for line in self.lines if "val_accuracy" in line]

    @property
    def training_seconds(self) -> float:
        """Seconds from opening the data to the end of training, without imports, evaluation and report."""
        return self.get_time_of("evaluating ") - self.get_time_of("run: ")


def run_trainer(overrides: Sequence[str], scratch: Path, exports: bool = False) -> FinishedRun:
    """Run `python -m trainer` with a new output folder and an empty cache below the folder `scratch`.

    `overrides` are the arguments of the run. If `exports` is true, the run writes the default exports, otherwise none.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        output = Path(folder, "run")
        arguments = [*overrides, "runtime.log_format=json", "runtime.progress=lines", f"output_dir={output}"]
        arguments += [] if exports else ["export.formats=[]"]
        process = run_python("-m", "trainer", *arguments, environment={"KUBETUNE_CACHE": f"{folder}/cache"})
        breakdown = json.loads((output / "ledger.json").read_text())["seconds"]
    lines = [json.loads(line) for line in process.output.splitlines()]
    for line in lines:
        line["at"] = datetime.datetime.fromisoformat(line["time"]).timestamp() - process.started_at
    return FinishedRun(process, lines, breakdown)


def interleave(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Return (round, name) for each measurement. Each round has all names, and starts with a different one."""
    order = []
    for round_index in range(rounds):
        first = round_index % len(names)
        order += [(round_index, name) for name in (*names[first:], *names[:first])]
    return order
