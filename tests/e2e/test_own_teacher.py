"""A run that trains its teacher first: kills and stops in both, and two workers, give the same bits."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.running import assert_same_run, assert_same_weights, kill_at, start_until, train
from tests.e2e.workers import SHARED, start_workers
from trainer.errors import INTERRUPTED

pytestmark = pytest.mark.slow

TEACHER = (
    "distillation.teacher=train", "distillation.model=glyphs_mobilenet_v2", "distillation.model.image_size=40",
    "distillation.model.hidden=16", "distillation.phases=head_only", "distillation.phases.head.epochs=3",
    "distillation.temperature=2",
)  # fmt: skip
FIRST, THEN = "teacher: trained first", "teacher: finished; starting the run of its student"


def run(folder: Path, *more: str) -> tuple[str, ...]:
    cache = f"runtime.cache_dir={folder.parent / 'cache'}"
    return (*SHARED, *TEACHER, "augmentation=none", "export.formats=[]", cache, f"output_dir={folder}", *more)


def assert_same_runs(one: Path, other: Path) -> None:
    assert_same_run(one / "teacher", other / "teacher", levels=1)
    assert_same_run(one, other)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "run"
    output = train(*run(folder)).stdout
    before, after = output.split(THEN)
    assert FIRST in before
    assert FIRST not in after
    scores = r"test accuracy (\d\.\d+ \(95 % interval \d\.\d+ to \d\.\d+, n = 90\))"
    of_teacher, of_student, again = (
        *re.findall(rf"^{scores}", output, re.M),
        *re.findall(rf"  teacher: {scores}", output),
    )
    assert again == of_teacher != of_student
    return folder


@pytest.mark.timeout(1800)
def test_kills_in_the_teacher_and_in_the_student_change_nothing(calm: Path, tmp_path: Path) -> None:
    killed = tmp_path / "run"
    output = kill_at("head  epoch 2", *run(killed))
    assert THEN not in output
    assert not (killed / "config.yaml").exists()
    output = kill_at("fine_tune  epoch 3", *run(killed))
    assert "weights: this run's checkpoint at step" in output.split(THEN)[0]
    output = train(*run(killed)).stdout
    assert FIRST not in output
    assert "soft labels: read from" in output
    assert_same_runs(calm, killed)
    assert "finished already" in train(*run(killed)).stdout


@pytest.mark.timeout(1800)
def test_a_signal_at_any_moment_stops_with_75_and_the_same_command_continues(calm: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "run"
    for text, delay in (("head  epoch 2", 0.0), (THEN, 0.0), (THEN, 0.2)):
        if text == THEN and (stopped / "teacher" / "DONE").exists():
            (stopped / "teacher" / "DONE").unlink()  # its results are written again
        child, _ = start_until(text, *run(stopped))
        time.sleep(delay)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate()
        assert child.returncode == INTERRUPTED, (text, delay, errors)
        assert "teacher to resume" not in errors  # the hint names the folder of the run
    train(*run(stopped))
    assert_same_runs(calm, stopped)


@pytest.mark.timeout(1800)
def test_two_workers_train_both_as_one_in_two_micro_batches(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    train(*run(one, "training.accumulate=2"))
    own = {1: [f"runtime.cache_dir={tmp_path / 'cache-1'}"]}
    first = start_workers(tmp_path / "killed", 2, *run(two), own=own)
    first.wait_for(THEN)
    first.wait_for("fine_tune  epoch 3 done")  # the teacher has no such phase
    first.terminate()
    second = start_workers(tmp_path / "again", 2, *run(two), own=own)
    assert second.wait(400) == [0, 0], second.output(0)
    assert FIRST not in second.output(0)
    assert_same_weights(one / "teacher", two / "teacher")
    assert_same_weights(one, two)
