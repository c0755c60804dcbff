"""SIGKILL at random times: the resumed run is equal, bit for bit, to a run without interruption."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import SMALL, assert_same_run, kill_after, kill_at, train

KILLS = 12
PATIENT = f"runtime.max_restarts_without_progress={KILLS + 1}"  # several in a row may be after the last step


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twelve_kills_change_nothing(tmp_path: Path) -> None:
    calm, folder = tmp_path / "calm", tmp_path / "killed"
    began = time.monotonic()
    train(*SMALL, PATIENT, f"output_dir={calm}")
    duration = time.monotonic() - began
    rng = np.random.default_rng(11)
    kills, runs = 0, 1
    while kills < KILLS:
        code = kill_after(rng.uniform(0.25, 0.95) * duration, *SMALL, PATIENT, f"output_dir={folder}")
        if code == 0:  # finished before the kill, which does not count: begin a new run
            assert_same_run(calm, folder)
            folder, runs = tmp_path / f"killed-{runs}", runs + 1
        else:
            assert code == -signal.SIGKILL
            kills += 1
    train(*SMALL, PATIENT, f"output_dir={folder}")
    assert_same_run(calm, folder)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_kill_in_each_phase_changes_nothing_where_examples_are_mixed(tmp_path: Path) -> None:
    mixing = (*SMALL, "augmentation=strong", "augmentation.mixup=0.4", "augmentation.cutmix=1", "training.loss=focal")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(*mixing, f"output_dir={calm}")
    kill_at("head  epoch 2", *mixing, f"output_dir={killed}")
    output = kill_at("fine_tune  epoch 3", *mixing, f"output_dir={killed}")
    assert "weights: this run's checkpoint at step" in output
    train(*mixing, f"output_dir={killed}")
    assert_same_run(calm, killed)
