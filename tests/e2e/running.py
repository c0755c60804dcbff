"""Run the command line in processes, and compare the outputs of two runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.same_bits import list_differences

ROOT = Path(__file__).parents[2]
# Both phases, augmentation, dropout, EMA, an uneven last batch: all state that a checkpoint could miss.
SMALL = (
    "experiment=quickstart", "debug.max_examples=90", "training.batch_size=16", "training.ema=0.9",
    "phases.head.epochs=2", "phases.fine_tune.epochs=2", "phases.fine_tune.thaw=from_block:block_13",
    "runtime.checkpoint_every='4 steps'", "runtime.log_every='4 steps'", "runtime.steps_per_call=3",
    "export.formats=[saved_model]",
)  # fmt: skip


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *overrides]


def start(*overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start a run; its output can be read line by line."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(*overrides), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def train(*overrides: str, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m trainer` to its end and check its exit code."""
    child = start(*overrides, cwd=cwd)
    out, err = child.communicate()
    assert child.returncode == code, err
    return subprocess.CompletedProcess(child.args, code, out, err)


def program(name: str, *arguments: str, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m trainer.NAME` to its end and check its exit code."""
    call, environment = [sys.executable, "-m", f"trainer.{name}", *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(call, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result


def start_until(text: str, *overrides: str) -> tuple[subprocess.Popen[str], str]:
    """Start a run and read its output until a line contains `text`; return both."""
    child, output = start(*overrides), ""
    for line in child.stdout or ():
        output += line
        if text in line:
            return child, output
    raise AssertionError(f"no line with {text!r} in\n{output}")


def kill_at(text: str, *overrides: str) -> str:
    """Kill a run (SIGKILL) when its output contains `text`; return the output so far."""
    child, output = start_until(text, *overrides)
    child.kill()
    child.communicate()
    return output


def kill_after(seconds: float, *overrides: str) -> int:
    """Kill a run (SIGKILL) after some seconds; return the exit code, 0 where it ended before."""
    child = start(*overrides)
    time.sleep(seconds)
    child.kill()
    child.communicate()
    return child.returncode


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal (`man 5 proc`, SigCgt)."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_loaded(pid: int, library: str) -> bool:
    """Return whether a process has mapped a shared library with `library` in its path."""
    return library in Path(f"/proc/{pid}/maps").read_text()


def by_step(folder: Path) -> Path:
    """Rename the checkpoints in a copy of a run from a bucket to the names of a local run."""
    checkpoints = folder / "checkpoints"
    latest = (checkpoints / "LATEST").read_text().split()
    for path in checkpoints.glob("step-*"):
        assert path.name in latest, "a checkpoint that LATEST does not list"
        path.rename(checkpoints / path.name.rpartition("-")[0])
    (checkpoints / "LATEST").write_text(latest[0].rpartition("-")[0])
    return folder


def with_data_at(folder: Path, was: str, now: str) -> None:
    """Rename the folder of the data in the report of a run."""
    report = folder / "report"
    assert was in (report / "predictions.csv").read_text()
    for file in (report / "predictions.csv", report / "report.json"):  # the second lists suspected label errors
        file.write_text(file.read_text().replace(was, now))


def variables_of(folder: Path, pointer: str) -> dict[str, np.ndarray]:
    """Variables of the checkpoint in LATEST or BEST: weights, optimizer state, averages."""
    name = (folder / "checkpoints" / pointer).read_text().strip()
    with np.load(folder / "checkpoints" / name / "variables.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def without_timing(value: Any) -> Any:
    """Remove times, and sizes: a SavedModel contains a random number of varying length."""
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if k not in ("timing", "seconds", "bytes")}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def story(folder: Path) -> list[Any]:
    """metrics.jsonl without timing."""
    return [without_timing(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    """Assert equal weights, optimizer state and averages at the end of two runs, bit for bit."""
    mine, theirs = variables_of(one, "LATEST"), variables_of(other, "LATEST")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def assert_near(one: Path, other: Path, keys: tuple[str, ...] = ("loss", "val_loss")) -> None:
    """Assert equal variables to 1e-5 and equal metrics `keys` to 1e-4, at the same steps."""
    mine, theirs = variables_of(one, "LATEST"), variables_of(other, "LATEST")
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)
    for line, expected in zip(story(one), story(other), strict=True):
        assert line.keys() == expected.keys()
        assert [line[k] for k in ("phase", "epoch", "step")] == [expected[k] for k in ("phase", "epoch", "step")]
        for key in line.keys() & set(keys):
            assert line[key] == pytest.approx(expected[key], abs=1e-4)


def assert_same_run(one: Path, other: Path, levels: int = 0, exported: bool = True) -> None:
    """Assert equal weights, optimizer state, averages, metrics, predictions and scores, bit for bit.

    The digits are read from the cache of a run, which can be next to it, or `levels` folders above. `exported` is False
    if only one of them has exported: their scores are then those of the trainer.
    """
    assert_same_weights(one, other)
    assert story(one) == story(other)
    for name in ("predictions.csv", "report.json"):
        texts = [(p / "report" / name).read_text().replace(str(p.parents[levels]), "") for p in (one, other)]
        mine, theirs = (
            without_timing(json.loads(text)) if name == "report.json" else text.split("\n") for text in texts
        )
        if name == "report.json" and not exported:
            mine, theirs = ({**report, "export": None} for report in (mine, theirs))
        assert mine == theirs, list_differences(mine, theirs, name)[:20]
