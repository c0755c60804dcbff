"""Run programs as separate processes, and measure their time and memory, and the times of their log lines."""

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
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Completed:
    """A process that exited with 0.

    Attributes:
        began: time.time() of its start.
        output: its standard output.
        peak_mb: peak resident memory, pages of mapped files included.
        own_mb: peak anonymous memory, sampled every 50 ms.
        seconds: time from its start to its end.
    """

    began: float
    output: str
    peak_mb: float
    own_mb: float
    seconds: float


def run(*command: str, environment: dict[str, str] | None = None) -> Completed:
    """Run Python with these arguments.

    Raises:
        SystemExit: it failed; with its command and the end of its output.
    """
    whole = [sys.executable, *command]
    # PYTHONPATH makes the modules of this folder available in every working directory.
    whole_environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(ROOT), **(environment or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began = time.time()
        process = subprocess.Popen(whole, cwd=ROOT, env=whole_environment, stdout=out, stderr=errors)
        own = 0.0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    seconds = time.time() - began
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                own = max(own, _own_mb(process.pid))
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
            sys.exit(f"{shlex.join(whole)} ended with {process.returncode}:\n{end}")
    return Completed(began, output, usage.ru_maxrss / 1024, own, seconds)


def _own_mb(pid: int) -> float:
    try:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # the process has just ended
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


@dataclass(frozen=True)
class TrainerRun:
    """A run of `python -m trainer` and the lines of its log; times are in seconds since the start of the process.

    Attributes:
        lines: its log records, each with `message`, `at`, and the values of an interval or an epoch.
        breakdown: its time breakdown, seconds per category.
    """

    process: Completed
    lines: list[dict[str, Any]]
    breakdown: dict[str, float]

    def at(self, start: str) -> float:
        """Time of the first line that starts with `start`.

        Raises:
            SystemExit: there is none.
        """
        for line in self.lines:
            if line["message"].startswith(start):
                return float(line["at"])
        sys.exit(f"no line of the run starts with {start!r}; its last: {[line['message'] for line in self.lines[-5:]]}")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of the ends of epochs."""
        return [line for line in self.lines if "val_accuracy" in line]

    @property
    def training(self) -> float:
        """Seconds from opening the data to the end of training, without imports, evaluation and report."""
        return self.at("evaluating ") - self.at("run: ")


def train(overrides: Sequence[str], scratch: Path, exports: bool = False) -> TrainerRun:
    """Run the command line with a new output folder and cache, with the default exports or without exports."""
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        output = Path(own, "run")
        quiet = ["runtime.log_format=json", "runtime.progress=lines", f"output_dir={output}"]
        quiet += [] if exports else ["export.formats=[]"]
        process = run("-m", "trainer", *overrides, *quiet, environment={"KUBETUNE_CACHE": f"{own}/cache"})
        breakdown = json.loads((output / "ledger.json").read_text())["seconds"]
    lines = [json.loads(line) for line in process.output.splitlines()]
    for line in lines:
        line["at"] = datetime.datetime.fromisoformat(line["time"]).timestamp() - process.began
    return TrainerRun(process, lines, breakdown)


def in_turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Pairs (round, name): every round has each name once, and begins with a different one."""
    order = []
    for turn in range(rounds):
        first = turn % len(names)
        order += [(turn, name) for name in (*names[first:], *names[:first])]
    return order
