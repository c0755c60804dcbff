"""Nights of `python -m trainer.nightly` without a trained run; tests/e2e/test_nightly.py has the others."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.same_bits import free_ports
from tests.cli.verbs import exit_code_of
from tests.promote.runs import write_finished_run
from tests.test_drift import NAMES, log_lines, predictions
from trainer import nightly as verb
from trainer.errors import DONE, WRONG_INPUT
from trainer.exporting.reference import compute_reference
from trainer.nightly.night import Night, choose_night
from trainer.promote.promotion import promote
from trainer.storage.path import storage_path

Call = Callable[..., tuple[int, str, str]]  # exit code, stdout and stderr
NOON = "2026-03-01T12:00:00Z"


def make_nights(**outcomes: str | None) -> list[Night]:
    return [Night(f"2026-03-{day.removeprefix('d')}", outcome=outcome) for day, outcome in outcomes.items()]


@pytest.mark.parametrize(
    ("outcomes", "day", "has_begun"),
    [
        ({}, "05", False),
        ({"d03": "promoted", "d04": "stable"}, "05", False),
        ({"d03": None}, "03", True),  # cut off: continued, however long ago
        ({"d02": None, "d03": "promoted"}, "05", False),  # a later night has been finished
        ({"d04": "failed"}, "05", False),  # the next night begins another run
        ({"d05": "failed"}, "05", True),  # after the cause was fixed
        ({"d05": "stable"}, "05", False),  # measured again
        ({"d05": None}, "05", True),
        ({"d05": "refused"}, "05", False),
    ],
)
def test_an_unfinished_run_is_continued_before_another_one_begins(
    outcomes: dict[str, str | None], day: str, has_begun: bool
) -> None:
    night, continued = choose_night(make_nights(**outcomes), "2026-03-05")
    assert (night.day, continued) == (f"2026-03-{day}", has_begun)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Promote version 1 of a served model, with a drift reference."""
    run = write_finished_run(tmp_path / "run", 0.8)
    reference = json.dumps(compute_reference("test", NAMES, *predictions(400, 1), 96, "stretch"))
    (run / "export" / "saved_model" / "1" / "assets" / "reference.json").write_text(reference)
    promote(str(run), storage_path(tmp_path / "models"), 5)
    return tmp_path / "models"


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs `trainer.nightly` at 2:00 on 2 March 2026."""
    fixed_arguments = (f"to={tmp_path}/models", f"log={tmp_path}/log", f"runs={tmp_path}/runs", "now=2026-03-02T02:00")

    def call(*arguments: str) -> tuple[int, str, str]:
        return (exit_code_of(verb.main, *fixed_arguments, *arguments), *capsys.readouterr())

    return call


def write_log(folder: Path, shift: float, version: str = "1") -> None:
    """Write a log of 300 predictions at noon on 1 March."""
    rows = [json.loads(line) for line in log_lines(*predictions(300, 2, shift=shift)).splitlines()]
    (folder / "2026-03-01").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row | {"time": NOON, "model_version": version}) + "\n" for row in rows)
    (folder / "2026-03-01" / f"part-{version}.jsonl").write_text(text)


def read_record(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "runs" / "nights" / "2026-03-02.json").read_text()))


@pytest.mark.usefixtures("models")
def test_a_night_without_drift_trains_nothing(tmp_path: Path, command: Call) -> None:
    write_log(tmp_path / "log", 0.0)
    write_log(tmp_path / "log", 1.0, "0")  # of an earlier version
    port = free_ports(1)[0]
    code, out, _ = command(f"runtime.http_port={port}")
    socket.create_server(("127.0.0.1", port)).close()  # released at the end
    assert (code, "stable: version 1 has not drifted; nothing to do" in out) == (DONE, True)
    assert read_record(tmp_path)["outcome"] == "stable"
    assert read_record(tmp_path)["levels"] == {"classes": "stable", "confidence": "stable", "embedding": "stable"}
    assert sorted(path.name for path in (tmp_path / "runs").rglob("*.*")) == ["2026-03-02.json", "2026-03-02.png"]


@pytest.mark.usefixtures("models")
def test_a_night_without_predictions_trains_nothing(tmp_path: Path, command: Call) -> None:
    write_log(tmp_path / "log", 1.0, "0")
    code, _, err = command()
    assert (code, "has no predictions of version 1 since 2026-03-01 02:00" in err) == (DONE, True)
    assert read_record(tmp_path)["outcome"] == "no predictions"


def test_a_run_that_fails_for_good_is_recorded_and_the_next_night_begins_another(
    models: Path, tmp_path: Path, command: Call
) -> None:
    write_log(tmp_path / "log", 1.0)
    message = tmp_path / "termination-log"
    pod = (f"runtime.http_port={free_ports(1)[0]}", f"runtime.termination_log={message}")
    code, _, err = command("resume=must", *pod)  # rejected by the run, since there is no run of this night yet
    assert code == WRONG_INPUT
    assert "resume=must: output_dir=" in message.read_text()  # the message of the run, in that of the night
    assert f"error: {tmp_path}/runs/2026-03-02: " in err
    assert (read_record(tmp_path)["outcome"], read_record(tmp_path)["version"]) == ("failed", None)
    assert sorted(path.name for path in models.iterdir() if path.name.isdecimal()) == ["1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("output_dir=a",), "error: output_dir: "),
        (("warm_start=a",), "error: warm_start: "),
        (("hours=no",), "error: hours=no: "),
        (("keep=0",), "error: keep=0: "),
        (("phases.head.epochs=none",), "phases.head.epochs=none"),
        (("to=a",), "error: to=a: is given twice"),
    ],
)
def test_a_wrong_argument_exits_with_2_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, tmp_path: Path, command: Call
) -> None:
    code, _, err = command(*arguments)
    assert (code, message in err) == (WRONG_INPUT, True), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("models")
def test_without_a_log_the_night_is_an_error(command: Call) -> None:
    code, _, err = command()
    assert (code, "error: log=" in err) == (WRONG_INPUT, True)
