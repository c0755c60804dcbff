"""Restarts without progress are counted; those that were told to stop are not."""

import json
from pathlib import Path

import pytest

from trainer.errors import GAVE_UP, GaveUp
from trainer.runs.restarts import MAX_ENTRIES, STOPPED, RestartHistory


def attempt(file: Path, step: int, code: int | None = None, reason: str = "lost worker 1", most: int = 3) -> None:
    """One start of the run; None: it was killed."""
    attempts = RestartHistory(file)
    attempts.begin(step, most)
    if code is not None:
        attempts.failed(code, reason)


def test_after_enough_fruitless_restarts_the_run_gives_up_with_the_reasons(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    attempt(file, 0)  # the first start is no restart
    for reason in ("lost worker 1", "lost worker 2"):
        attempt(file, 0, 75, reason)
    attempt(file, 0)  # killed
    before = file.read_text()
    with pytest.raises(GaveUp) as caught:
        attempt(file, 0)
    given_up = RestartHistory(file)
    given_up.failed(3, "gave up")  # which is no attempt
    assert file.read_text() == before
    assert caught.value.exit_code == GAVE_UP == 3
    text = str(caught.value)
    assert text.startswith("3 restarts in a row made no step of progress beyond step 0; mend the cause, then delete ")
    assert "lost worker 1\n" in text
    assert "lost worker 2\n" in text
    assert text.endswith("ended without a word (killed; out of memory?)")
    attempt(file, 0, most=4)  # told to try once more


def test_progress_begins_the_count_anew(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in (0, 0, 0, 7, 7, 7, 9):
        attempt(file, step, 75, most=3)
    attempt(file, 9, 75)
    attempt(file, 9, 75)
    with pytest.raises(GaveUp):
        attempt(file, 9, 75)


def test_stopped_and_refused_attempts_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for _ in range(10):
        attempts = RestartHistory(file)
        attempts.begin(0, 2)
        attempts.end(STOPPED, "SIGTERM")
        attempts.failed(75, "later news changes nothing")
    attempt(file, 0, 2, "the loss is not finite", most=2)
    attempt(file, 0, 75, most=2)
    assert [e["kind"] for e in json.loads(file.read_text())] == ["stopped"] * 10 + ["refused", "failed"]


def test_the_file_stays_small_and_a_damaged_one_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in range(MAX_ENTRIES + 20):
        attempt(file, step, 75)
    assert len(json.loads(file.read_text())) == MAX_ENTRIES
    file.write_text("{")
    attempt(file, 0, 75)
    assert len(json.loads(file.read_text())) == 1
