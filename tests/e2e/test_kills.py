"""kill -9 at random moments: the run that goes on ends with the bits of the run that was left alone."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, assert_same_run, run, start

KILLS = 12
PATIENT = f"runtime.max_restarts_without_progress={KILLS + 1}"  # several in a row can come after the last step


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twelve_kills_change_nothing(tmp_path: Path) -> None:
    calm, folder = tmp_path / "calm", tmp_path / "killed"
    began = time.monotonic()
    assert run(*SMALL, PATIENT, f"output_dir={calm}").returncode == 0
    whole = time.monotonic() - began
    rng = np.random.default_rng(11)
    kills, runs = 0, 1
    while kills < KILLS:
        child = start(*SMALL, PATIENT, f"output_dir={folder}")
        time.sleep(rng.uniform(0.25, 0.95) * whole)
        os.kill(child.pid, signal.SIGKILL)
        said, _ = child.communicate()
        if child.returncode == 0:  # it got to its end: begin a new run, so that every kill hits something
            assert_same_run(calm, folder)
            folder, runs = tmp_path / f"killed-{runs}", runs + 1
        else:
            assert child.returncode == -signal.SIGKILL, said
            kills += 1
    result = run(*SMALL, PATIENT, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert_same_run(calm, folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_kill_in_each_phase_changes_nothing_where_examples_are_mixed(tmp_path: Path) -> None:
    mixing = (*SMALL, "augmentation=strong", "augmentation.mixup=0.4", "augmentation.cutmix=1", "training.loss=focal")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert run(*mixing, f"output_dir={calm}").returncode == 0
    for phase in ("head  epoch 2", "fine_tune  epoch 3"):
        child = start(*mixing, f"output_dir={killed}")
        said = ""
        for line in child.stdout or ():
            said += line
            if line.startswith(phase):
                break
        assert phase in said, said
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert "weights: this run's checkpoint at step" in said
    assert run(*mixing, f"output_dir={killed}").returncode == 0
    assert_same_run(calm, killed)
