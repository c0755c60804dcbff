"""Restarts without progress are counted, except after a stop request."""

import json
from pathlib import Path

import pytest

from tests.errors import raises
from trainer.errors import ConfigError, GaveUp, Interrupted, ModelError, StopRequested
from trainer.runs.restarts import MAX_ENTRIES, STOPPED, STOPS_PER_FAILURE, RestartHistory, UnbegunStarts
from trainer.storage.base import StoragePath


def attempt(file: Path, step: int, code: int | None = None, reason: str = "lost worker 1", most: int = 3) -> None:
    """One start of the run; `code` None: it was killed."""
    history = RestartHistory(file)
    history.begin(step, most)
    if code is not None:
        history.record_failure(code, reason)


def test_after_enough_restarts_without_progress_the_run_gives_up_with_the_reasons(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    attempt(file, 0)  # the first start
    for reason in ("lost worker 1", "lost worker 2"):
        attempt(file, 0, 75, reason)
    attempt(file, 0)  # killed
    before = file.read_text()
    reasons = r"lost worker 1\n.*lost worker 2\n.*killed \(out of memory or disk\?\)$"
    problem = rf"^3 restarts in a row made no progress beyond step 0.*\n.*{reasons}"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=3, problem=problem, fix=f"delete {file}"):
        attempt(file, 0)
    RestartHistory(file).record_failure(3, "gave up")  # not a start
    assert file.read_text() == before
    attempt(file, 0, most=4)  # the limit was raised


def test_progress_resets_the_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in (0, 0, 0, 7, 7, 7, 9):
        attempt(file, step, 75, most=3)
    attempt(file, 9, 75)
    attempt(file, 9, 75)
    with pytest.raises(GaveUp):
        attempt(file, 9, 75)


def test_stopped_and_refused_starts_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for _ in range(10):  # the first start, and nine stops
        history = RestartHistory(file)
        history.begin(0, 2)
        history.end(STOPPED, "SIGTERM")
        history.record_failure(75, "later calls change nothing")
    attempt(file, 0, 2, "the loss is not finite", most=2)
    attempt(file, 0, 75, most=2)
    assert [e["kind"] for e in json.loads(file.read_text())] == ["stopped"] * 10 + ["refused", "failed"]


def test_the_file_is_limited_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    for step in range(MAX_ENTRIES + 20):
        attempt(file, step, 75)
    assert len(json.loads(file.read_text())) == MAX_ENTRIES
    file.write_text("{")
    attempt(file, 0, 75)
    assert len(json.loads(file.read_text())) == 1


def test_stop_requests_without_progress_are_limited_too(tmp_path: Path) -> None:
    """An eviction from a full disk is a SIGTERM at every start, which no rule of the Job counts."""
    file = tmp_path / "attempts.json"
    for _ in range(1 + 2 * STOPS_PER_FAILURE):
        history = RestartHistory(file)
        history.begin(4, 2)
        history.end(STOPPED, "SIGTERM")
    problem = r"^2 restarts in a row \(10 stop requests count as one\) made no progress beyond step 4.*\n.*SIGTERM"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=2, problem=problem, fix=f"delete {file}"):
        RestartHistory(file).begin(4, 2)
    RestartHistory(file).begin(5, 2)  # progress


def start(home: StoragePath, error: BaseException | None, limit: int = 2) -> None:
    starts = UnbegunStarts(home)
    starts.begin(limit)
    if error:
        starts.end(error)


def test_starts_that_end_before_the_run_begins_are_limited(home: StoragePath) -> None:
    """The pod is evicted while the data is copied to its disk, or the weights cannot be downloaded, each time."""
    for error in (None, ConfigError("wrong"), Interrupted("no network"), None):
        start(home, error)
    problem = r"^2 restarts in a row ended before the run began or resumed, .*\n.*no network\n.*killed"
    with raises(GaveUp, key="runtime.max_restarts_without_progress", value=2, problem=problem, fix="delete .*starts"):
        start(home, None)
    UnbegunStarts(home).clear()
    assert not (home / ".starts").exists()
    start(home, None)


def test_a_start_records_its_end_once(home: StoragePath) -> None:
    """The end is recorded by the thread that exits, and by the context that is left; a killed start before remains."""
    start(home, None)
    refused = UnbegunStarts(home)
    refused.begin(2)
    refused.end(ConfigError("wrong"))
    refused.end(ConfigError("wrong"))
    assert [entry["kind"] for entry in UnbegunStarts(home).entries] == [None]
    for _ in range(2):
        start(home, None)
    gave_up = UnbegunStarts(home)
    with pytest.raises(GaveUp) as error:
        gave_up.begin(2)
    gave_up.end(error.value)
    assert len(UnbegunStarts(home).entries) == 3


def test_a_refused_start_leaves_no_record(home: StoragePath) -> None:
    start(home, ModelError("no such backbone"))
    assert not (home / ".starts").exists()
    for _ in range(2 * STOPS_PER_FAILURE):
        start(home, StopRequested("SIGTERM"))
    (home / ".starts").write("{")  # damaged: begun anew
    start(home, None)
    assert len(UnbegunStarts(home).entries) == 1
