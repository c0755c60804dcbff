"""The prediction log in parts: whole files, a bucket that fails, and predictions that have no room."""

import json
import re
import threading
from itertools import chain
from pathlib import Path
from time import sleep

import pytest

from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from tests.waiting import PATIENCE, wait_until
from trainer.errors import ConfigError
from trainer.serving import prediction_log
from trainer.serving.prediction_log import FileLog, PartLog, open_log
from trainer.storage import retries
from trainer.storage.path import StoragePath, storage_path

PART = re.compile(r"20\d\d-\d\d-\d\d/20\d{6}T\d{6}Z-[^/]+-[0-9a-f]{8}-(\d{6})\.jsonl")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_log, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(prediction_log, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(prediction_log, "CLOSE_SECONDS", PATIENCE)
    monkeypatch.setattr(retries, "INITIAL_BACKOFF_SECONDS", 0.01)


def line(number: int) -> str:
    return json.dumps({"request": number}) + "\n"


def await_written(log: PartLog) -> None:
    """Wait until the log's thread has written every complete part, and has made room for others."""
    wait_until(lambda: log._buffered == 0, lambda: f"{log._buffered} bytes are not written")


def parts(folder: StoragePath) -> dict[str, list[int]]:
    """The requests in each part, in the order of the names."""
    contents = {str(i.path).removeprefix(f"{folder}/"): i.path.read_text() for i in folder.list()}
    return {name: [json.loads(row)["request"] for row in text.splitlines()] for name, text in contents.items()}


def test_parts_are_whole_and_have_every_prediction_once(tmp_path: Path) -> None:
    with running(tmp_path / "objects"):
        for folder in (storage_path(tmp_path / "log"), storage_path(f"gs://{BUCKET}/log")):
            log = open_log(str(folder), 0.2)
            assert isinstance(log, PartLog)
            seen: set[str] = set()
            for number in range(40):
                assert log.append([line(2 * number), line(2 * number + 1)]) == 0
                for name, requests in parts(folder).items():  # while they are written
                    assert requests == list(range(requests[0], requests[-1] + 1)), name
                    seen.add(name)
                sleep(0.02)
            log.close()
            written = parts(folder)
            assert seen <= written.keys()
            assert len(seen) > 1
            assert all(PART.fullmatch(name) for name in written)
            assert sorted(chain(*written.values())) == list(range(80))


def test_a_part_ends_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_log, "PART_BYTES", 3 * len(line(1)))
    log = PartLog(storage_path(tmp_path), 3600)
    log.append([line(number) for number in range(8)])
    wait_until(lambda: len(parts(storage_path(tmp_path))) == 2)
    log.close()
    assert list(parts(storage_path(tmp_path)).values()) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_bucket_that_fails_delays_and_then_drops_predictions_and_no_caller_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prediction_log, "MAX_BUFFERED_BYTES", 10 * len(line(1)))
    may_write, results, write = threading.Event(), list[bool](), PartLog._write

    def write_when_allowed(log: PartLog, name: str, content: str) -> bool:
        assert may_write.wait(PATIENCE)
        results.append(write(log, name, content))
        return results[-1]

    monkeypatch.setattr(PartLog, "_write", write_when_allowed)
    may_write.set()
    with running(tmp_path / "objects") as server:
        folder = storage_path(f"gs://{BUCKET}/log")
        log = PartLog(folder, 0.05)
        log.append([line(0)])
        await_written(log)
        assert len(parts(folder)) == 1
        server.stop()
        may_write.clear()
        dropped = sum(log.append([line(number)]) for number in range(1, 10) for _ in range(2))
        assert dropped == 8  # 10 of 18 have room
        may_write.set()
        wait_until(lambda: results.count(False) >= 3)
        assert capsys.readouterr().err.count("cannot be written") == 1  # further failures are not logged
        server.start()
        await_written(log)
        assert len([*chain(*parts(folder).values())]) == 11
        assert log.append([line(20)]) == 0  # there is room again
        log.close()
        assert sorted(chain(*parts(folder).values())) == sorted([0, *range(1, 6), *range(1, 6), 20])
        assert "can be written again" in capsys.readouterr().out


def test_closing_gives_up_on_a_bucket_that_does_not_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prediction_log, "CLOSE_SECONDS", 0.3)
    with running(tmp_path / "objects") as server:
        server.stop()
        log = PartLog(storage_path(f"gs://{BUCKET}/log"), 0.1)
        log.append([line(1), line(2)])
        wait_until(lambda: log._complete_parts, "the part to be complete")
        log.close()
        assert "2 predictions are lost" in capsys.readouterr().err
        server.start()
        wait_until(lambda: not log._thread.is_alive(), "the end of the thread")


def test_a_file_is_appended_to_and_everything_else_is_a_folder_of_parts(tmp_path: Path) -> None:
    assert open_log(None, 60) is None
    assert isinstance(open_log(str(tmp_path / "a.jsonl"), 60), FileLog)
    assert isinstance(open_log("/dev/null", 60), FileLog)
    folder = open_log(str(tmp_path / "new" / "predictions"), 60)
    assert isinstance(folder, PartLog)
    folder.close()
    assert (tmp_path / "new" / "predictions").is_dir()
    with raises(ConfigError, key="log", value="gs://b/a.jsonl", fix="folder"):
        open_log("gs://b/a.jsonl", 60)
    with raises(ConfigError, key="log", value=f"{tmp_path}/a.jsonl/b", problem="cannot be written"):
        open_log(f"{tmp_path}/a.jsonl/b", 60)
