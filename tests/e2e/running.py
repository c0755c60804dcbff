"""Start the real command line as a user would, and compare what two runs left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
# Both phases, augmentation, dropout, EMA, an uneven last batch: everything that could forget something.
SMALL = (
    "experiment=quickstart",
    "debug.max_examples=90",
    "training.batch_size=16",
    "training.ema=0.9",
    "phases.head.epochs=2",
    "phases.fine_tune.epochs=2",
    "phases.fine_tune.thaw=from_block:block_13",
    "runtime.checkpoint_every='4 steps'",
    "runtime.log_every='4 steps'",
    "runtime.steps_per_call=3",
    "export.formats=[saved_model]",
)


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *overrides]


def start(*overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """A run in a process of its own; its output can be read line by line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(*overrides), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*overrides: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A run to its end."""
    child = start(*overrides, cwd=cwd)
    out, err = child.communicate()
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal (`man 5 proc`, SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_loaded(pid: int, library: str) -> bool:
    """Whether a process has a shared library whose path holds `library`."""
    return library in Path(f"/proc/{pid}/maps").read_text()


def by_step(folder: Path) -> Path:
    """A copy of a run's folder in a bucket: its checkpoints get the names that they have in a local one."""
    checkpoints = folder / "checkpoints"
    latest = (checkpoints / "LATEST").read_text().split()
    for path in checkpoints.glob("step-*"):
        assert path.name in latest, "a checkpoint that nothing names was left behind"
        path.rename(checkpoints / path.name.rpartition("-")[0])
    (checkpoints / "LATEST").write_text(latest[0].rpartition("-")[0])
    return folder


def with_data_at(folder: Path, was: str, now: str) -> None:
    """Rename the data in what the report of a run says of examples."""
    report = folder / "report"
    assert was in (report / "predictions.csv").read_text()
    for file in (report / "predictions.csv", report / "report.json"):  # the second names those that may be mislabelled
        file.write_text(file.read_text().replace(was, now))


def variables_of(folder: Path, pointer: str) -> dict[str, np.ndarray]:
    """The variables of the checkpoint that LATEST or BEST names: weights, optimizer state, averages."""
    name = (folder / "checkpoints" / pointer).read_text().strip()
    with np.load(folder / "checkpoints" / name / "variables.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def without_timing(value: Any) -> Any:
    """Leave out what the machine and the moment decide; a SavedModel holds a random number of varying length."""
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if k not in ("timing", "seconds", "bytes")}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def story(folder: Path) -> list[Any]:
    """metrics.jsonl without timing."""
    return [without_timing(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit at the end of two runs: weights, optimizer state, averages."""
    mine, theirs = variables_of(one, "LATEST"), variables_of(other, "LATEST")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer state, averages, metrics, predictions, scores."""
    assert_same_weights(one, other)
    assert story(one) == story(other)
    assert (one / "report" / "predictions.csv").read_bytes() == (other / "report" / "predictions.csv").read_bytes()
    reports = [without_timing(json.loads((p / "report" / "report.json").read_text())) for p in (one, other)]
    assert reports[0] == reports[1]
