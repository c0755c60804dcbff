"""Programs as processes of their own: when they said what, how long they took, how much memory they had."""

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
class Ended:
    """A process that ended well.

    Attributes:
        began: time.time() at which it was started.
        said: its standard output.
        peak_mb: most resident memory, pages of mapped files included.
        own_mb: most memory that no file backs, looked at every 50 ms.
    """

    began: float
    said: str
    peak_mb: float
    own_mb: float


def run(*command: str, environment: dict[str, str] | None = None) -> Ended:
    """Run Python with these arguments, to its end.

    Raises:
        SystemExit: it failed; with its command and the end of what it said.
    """
    whole = [sys.executable, *command]
    # Found in PYTHONPATH: the programs of this folder, wherever one stands.
    given = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(ROOT), **(environment or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began = time.time()
        process = subprocess.Popen(whole, cwd=ROOT, env=given, stdout=out, stderr=errors)
        own = 0.0
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
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
        said = out.read().decode()
        if process.returncode:
            end = (said + errors.read().decode(errors="replace"))[-2000:]
            sys.exit(f"{shlex.join(whole)} ended with {process.returncode}:\n{end}")
    return Ended(began, said, usage.ru_maxrss / 1024, own)


def _own_mb(pid: int) -> float:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has just ended
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


@dataclass(frozen=True)
class TrainerRun:
    """A run of `python -m trainer`, by the lines of its log; times are in seconds since the process was started.

    Attributes:
        lines: what it said, each with `message`, `at`, and the facts of an interval or an epoch.
        places: seconds by place, of its ledger.
    """

    ended: Ended
    lines: list[dict[str, Any]]
    places: dict[str, float]

    def at(self, start: str) -> float:
        """When it first said a line that starts so.

        Raises:
            SystemExit: it never did.
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
        """From opening the data to the end of training: all but imports before and evaluation and report after."""
        return self.at("evaluating ") - self.at("run: ")


def train(overrides: Sequence[str], scratch: Path) -> TrainerRun:
    """A run of the command line in a folder of its own, with caches of its own, nothing exported."""
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        output = Path(own, "run")
        quiet = ("runtime.log_format=json", "runtime.progress=lines", "export.formats=[]", f"output_dir={output}")
        ended = run("-m", "trainer", *overrides, *quiet, environment={"KUBETUNE_CACHE": f"{own}/cache"})
        places = json.loads((output / "ledger.json").read_text())["seconds"]
    lines = [json.loads(line) for line in ended.said.splitlines()]
    for line in lines:
        line["at"] = datetime.datetime.fromisoformat(line["time"]).timestamp() - ended.began
    return TrainerRun(ended, lines, places)


def in_turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """(round, name): every round has each name once, and begins with another one than the round before."""
    order = []
    for turn in range(rounds):
        first = turn % len(names)
        order += [(turn, name) for name in (*names[first:], *names[:first])]
    return order
