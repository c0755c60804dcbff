"""Runs and their checkpoints are read, and what is damaged is named."""

import json
from pathlib import Path

import pytest
import yaml

from tests.errors import raises
from tests.runs.test_folder import load_config
from trainer.config.schema import validate_config
from trainer.errors import ConfigError, DataError
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.folder import make_worker_run_folder, parse_run_json
from trainer.runs.stored_run import find_checkpoint, find_run

CONFIG = validate_config(
    {
        "data": {"source": "digits"},
        "model": {"backbone": "MobileNetV2"},
        "phases": {"head": {"thaw": "none", "epochs": 1}},
    }
).model_dump(mode="json")


def leave_run(folder: Path) -> Path:
    checkpoints = CheckpointFolder(folder / "checkpoints", 2, print)
    for step in (1, 2):
        checkpoints.save({"step": step, "best": {"step": 1}}, {}, 1)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "run.json").write_text(json.dumps({"classes": ["a", "b"], "data_fingerprint": {"ends": "1"}}))
    return folder


def test_only_the_last_checkpoint_needs_latest(tmp_path: Path) -> None:
    run = find_run(str(leave_run(tmp_path / "run")))
    (tmp_path / "run" / "checkpoints" / "LATEST").write_bytes(b"\xff")
    assert find_checkpoint(run, "best").name == find_checkpoint(run, "1").name == "step-00000001"
    with raises(DataError, problem="LATEST is corrupt"):
        find_checkpoint(run, "last")


def test_a_phase_is_the_checkpoint_with_which_it_ended(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "run")
    run = find_run(str(folder))
    checkpoints = CheckpointFolder(folder / "checkpoints", 2, print)
    for step in (3, 4):
        checkpoints.save({"step": step, "best": {"step": 3}, "finished": {"head": {"kept_step": 1}}}, {}, 3)
    assert find_checkpoint(run, "head").name == "step-00000001"
    with raises(ConfigError, "checkpoint", "tail", "give best, last, a step, or a phase that has ended: head"):
        find_checkpoint(run, "tail")
    (folder / "report").mkdir()
    phases = {"head": {"kept_step": 1}, "tail": {"kept_step": 3}}
    (folder / "report" / "report.json").write_text(json.dumps({"phases": phases}))
    assert find_checkpoint(run, "tail").name == "step-00000003"


@pytest.mark.parametrize("value", [5, True, 1.5, None, {}, [], {"ends": 5}, {"ends": None}, {"content": 5}])
def test_a_damaged_fingerprint_is_a_damaged_file(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="data_fingerprint"):
        parse_run_json({"data_fingerprint": value})
    file = leave_run(tmp_path / "run") / "run.json"
    file.write_text(json.dumps({"classes": ["a", "b"], "data_fingerprint": value}))
    with raises(DataError, "run", str(tmp_path / "run"), "another run", "corrupt one"):
        find_run(str(tmp_path / "run"))


@pytest.mark.parametrize("content", ['a: !!bool "x"', "a: &x {b: *x}", "phases: {1: {}}", "[", ""])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (leave_run(tmp_path / "run") / "config.yaml").write_text(content)
    with raises(ConfigError, "run", str(tmp_path / "run"), "restore the file", "its config.yaml"):
        find_run(str(tmp_path / "run"))


@pytest.mark.parametrize("damage", ["", "{", None])
def test_a_run_json_that_is_lost_while_the_run_trains_is_written_again(tmp_path: Path, damage: str | None) -> None:
    file, folder = tmp_path / "run.json", make_worker_run_folder(load_config(tmp_path, tmp_path / "cache"))
    folder.update_run_json({"attempts": [{"command": ["python", "a b"]}]})
    file.unlink() if damage is None else file.write_text(damage)
    assert folder.read_last_command() == "python 'a b'"
    folder.update_run_json({"features": {"head": "images"}})
    assert json.loads(file.read_text()) == {
        "attempts": [{"command": ["python", "a b"]}],
        "features": {"head": "images"},
    }
