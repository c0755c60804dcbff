"""Restarts without progress are counted, except after a stop request."""

import json
from pathlib import Path

import pytest

from tests.errors import raises
from trainer.errors import ConfigError, GaveUp, Interrupted, ModelError, StopRequested
from trainer.runs.restarts import MAX_ENTRIES, STOPPED, STOPS_PER_FAILURE, IncompleteStarts, RestartHistory
from trainer.storage.base import StoragePath


def record_start(
    file: Path, step: int, code: int | None = None, reason: str = "lost worker 1", max_failures: int = 3
) -> None:
    """Record a start of the run from `step`, and its failure; if `code` is None, the start was killed."""
    history = RestartHistory(file)
    history.add_start(step, max_failures)
    if code is not None:
        history.record_failure(code, reason)


def test_after_enough_restarts_without_progress_the_run_gives_up_with_the_reasons(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    record_start(file, 0)  # the first start
    for reason in ("lost worker 1", "lost worker 2"):
        record_start(file, 0, 75, reason)
    record_start(file, 0)  # killed
    before = file.read_text()
    reasons = r"lost worker 1\n.*lost worker 2\n.*killed \(out of memory or disk\?\)$"
    problem = rf"^3 restarts in a row made no progress beyond step 0.*\n.*{reasons}"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=3, problem=problem, fix=f"delete {file}"):
        record_start(file, 0)
    RestartHistory(file).record_failure(3, "gave up")  # not a start
    assert file.read_text() == before
    record_start(file, 0, max_failures=4)  # the limit was raised


def test_progress_resets_the_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in (0, 0, 0, 7, 7, 7, 9):
        record_start(file, step, 75, max_failures=3)
    record_start(file, 9, 75)
    record_start(file, 9, 75)
    with pytest.raises(GaveUp):
        record_start(file, 9, 75)


def test_stopped_and_rejected_starts_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for _ in range(10):  # the first start, and nine stops
        history = RestartHistory(file)
        history.add_start(0, 2)
        history.end(STOPPED, "SIGTERM")
        history.record_failure(75, "later calls change nothing")
    record_start(file, 0, 2, "the loss is not finite", max_failures=2)
    record_start(file, 0, 75, max_failures=2)
    assert [e["kind"] for e in json.loads(file.read_text())] == ["stopped"] * 10 + ["refused", "failed"]


def test_the_file_is_limited_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in range(MAX_ENTRIES + 20):
        record_start(file, step, 75)
    assert len(json.loads(file.read_text())) == MAX_ENTRIES
    file.write_text("{")
    record_start(file, 0, 75)
    assert len(json.loads(file.read_text())) == 1


def test_stop_requests_without_progress_are_limited_too(tmp_path: Path) -> None:
    """An eviction from a full disk is a SIGTERM at every start, which no rule of the Job counts."""
    file = tmp_path / "attempts.json"
    for _ in range(1 + 2 * STOPS_PER_FAILURE):
        history = RestartHistory(file)
        history.add_start(4, 2)
        history.end(STOPPED, "SIGTERM")
    problem = r"^2 restarts in a row \(10 stop requests count as one\) made no progress beyond step 4.*\n.*SIGTERM"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=2, problem=problem, fix=f"delete {file}"):
        RestartHistory(file).add_start(4, 2)
    RestartHistory(file).add_start(5, 2)  # progress


def record_incomplete_start(home: StoragePath, error: BaseException | None, limit: int = 2) -> None:
    starts = IncompleteStarts(home)
    starts.add_start(limit)
    if error:
        starts.end(error)


def test_starts_that_end_before_the_run_begins_are_limited(home: StoragePath) -> None:
    """The pod is evicted while the data is copied to its disk, or the weights cannot be downloaded, each time."""
    for error in (None, ConfigError("wrong"), Interrupted("no network"), None):
        record_incomplete_start(home, error)
    problem = r"^2 restarts in a row ended before the run began or resumed, .*\n.*no network\n.*killed"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=2, problem=problem, fix="delete .*starts"):
        record_incomplete_start(home, None)
    IncompleteStarts(home).clear()
    assert not (home / ".starts").exists()
    record_incomplete_start(home, None)


def test_a_start_records_its_end_once(home: StoragePath) -> None:
    """The end is recorded by the thread that exits, and by the context that is left; a killed start before remains."""
    record_incomplete_start(home, None)
    rejected = IncompleteStarts(home)
    rejected.add_start(2)
    rejected.end(ConfigError("wrong"))
    rejected.end(ConfigError("wrong"))
    assert [entry["kind"] for entry in IncompleteStarts(home).entries] == [None]
    for _ in range(2):
        record_incomplete_start(home, None)
    gave_up = IncompleteStarts(home)
    with pytest.raises(GaveUp) as error:
        gave_up.add_start(2)
    gave_up.end(error.value)
    assert len(IncompleteStarts(home).entries) == 3


def test_a_rejected_start_leaves_no_record(home: StoragePath) -> None:
    record_incomplete_start(home, ModelError("no such backbone"))
    assert not (home / ".starts").exists()
    for _ in range(2 * STOPS_PER_FAILURE):
        record_incomplete_start(home, StopRequested("SIGTERM"))
    (home / ".starts").write("{")  # damaged: begun anew
    record_incomplete_start(home, None)
    assert len(IncompleteStarts(home).entries) == 1
