"""The folder of a run: a rejected start changes nothing in it, and corrupt files are reported or renamed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_schema import tree
from tests.errors import raises
from trainer.config.schema import RunConfig, validate_resolved_config
from trainer.errors import ConfigError, DataError, GaveUp, Interrupted
from trainer.runs.checkpoints import CheckpointFolder
from trainer.runs.folder import (
    RunFolder,
    describe_versions,
    inspect_folder,
    is_finished,
    open_run_folder,
)
from trainer.storage.path import StoragePath, storage_path
from trainer.training.state import RunState
from trainer.types import Dataset

FINGERPRINT = "0123456789abcdef"
OTHER = "fedcba9876543210"
NEW, STARTED, SAVED, FINISHED = "new", "begun", "saved", "finished"


def load_config(folder: object, cache: Path, **changes: Any) -> RunConfig:
    return validate_resolved_config(tree(output_dir=str(folder), runtime__cache_dir=str(cache), **changes))


def make_dataset(fingerprint: str) -> Dataset:
    return Dataset("x", ("a", "b"), {}, fingerprint, fingerprints={"ends": fingerprint})


def start_run(config: RunConfig) -> RunFolder:
    """Start or resume the run of this configuration, as `trainer.train` does."""
    folder = open_run_folder(config)
    assert isinstance(folder.config, RunConfig)
    folder.check_data(make_dataset(FINGERPRINT))
    folder.record_start(
        folder.config, make_dataset(FINGERPRINT), {"head": "cached"}, {"classes": ["a", "b"], "workers": 1}
    )
    return folder


def close_folder(folder: RunFolder) -> None:
    folder.publisher.close()
    assert folder.lock
    folder.lock.close()


def save_checkpoint(folder: RunFolder, step: int) -> None:
    CheckpointFolder(folder.path / "checkpoints", 2, print).save(RunState(step=step).to_json(), {}, None)
    folder.publisher.publish_checkpoints()
    folder.publisher.wait()


def make_run_in_state(config: RunConfig, state: str) -> None:
    """Make a run in its output_dir, and end it in this state: NEW (nothing), STARTED, SAVED or FINISHED."""
    if state == NEW:
        return
    folder = start_run(config)
    if state != STARTED:
        save_checkpoint(folder, 3)
    if state == FINISHED:
        folder.publisher.finish("{}\n")
    close_folder(folder)


def read_files(folder: StoragePath) -> dict[str, bytes]:
    """Read all files in a folder, by name, without the lock and the lease."""
    infos = {str(info.path).removeprefix(f"{folder}/"): info.path for info in folder.list()}
    return {name: path.read() for name, path in infos.items() if name not in (".lock", ".lease")}


@pytest.mark.parametrize("state", [NEW, STARTED, SAVED, FINISHED])
@pytest.mark.parametrize("found_by", ["this worker", "another worker"])
def test_a_rejected_start_changes_nothing(home: StoragePath, tmp_path: Path, state: str, found_by: str) -> None:
    config = load_config(home, tmp_path / "cache")
    make_run_in_state(config, state)
    before = read_files(home)
    if state in (SAVED, FINISHED):
        with raises(ConfigError, "output_dir", str(home), "same values", "seed: 42 -> 5"):
            open_run_folder(load_config(home, tmp_path / "cache", seed=5))
        assert read_files(home) == before
    longer = load_config(home, tmp_path / "cache", phases__head__epochs=9)
    rejected_start = open_run_folder(longer)  # later this start fails, because its data or weights cannot be opened
    if state in (SAVED, FINISHED):
        with raises(DataError, "output_dir", str(home), problem=FINGERPRINT):
            rejected_start.check_data(make_dataset(OTHER))
    if found_by == "this worker":
        rejected_start.abandon()
    else:  # its error ends this process at once
        rejected_start.record_exit(2, "worker 2: seed: is wrong", stopped=False)
        rejected_start.publisher.close(publish=False)  # releases a bucket's lease, which would otherwise expire
    assert rejected_start.lock
    rejected_start.lock.close()
    assert read_files(home) == before
    assert is_finished(config) == (state == FINISHED)
    if state == NEW and home.is_local:
        assert not Path(str(home)).exists()
    make_run_in_state(config, FINISHED)  # the original command continues
    assert is_finished(config)


@pytest.mark.parametrize("result", ["DONE", "report/index.html", "export/model_card.md"])
@pytest.mark.parametrize("changes", [{"seed": 5}, {"phases__head__epochs": 9}])
def test_results_whose_checkpoints_are_deleted_are_not_overwritten(
    home: StoragePath, tmp_path: Path, result: str, changes: dict[str, Any]
) -> None:
    config = load_config(home, tmp_path / "cache")
    make_run_in_state(config, SAVED)
    (home / "checkpoints").delete_tree()
    (home / result).write("{}\n")
    before, other = read_files(home), load_config(home, tmp_path / "cache", **changes)
    for function in (open_run_folder, inspect_folder):
        problem = rf"results of a run \({result.split('/')[0]}\), but not its checkpoints"
        with raises(ConfigError, "output_dir", str(home), "another folder", problem):
            function(other)
    assert read_files(home) == before
    assert is_finished(config) == (result == "DONE")


def test_an_extended_run_is_not_finished_before_its_end(home: StoragePath, tmp_path: Path) -> None:
    config = load_config(home, tmp_path / "cache")
    make_run_in_state(config, FINISHED)
    longer = load_config(home, tmp_path / "cache", phases__head__epochs=9)
    close_folder(start_run(longer))  # killed soon
    assert not is_finished(longer)
    assert not (home / "DONE").exists()
    close_folder(start_run(longer))
    assert not (home / "DONE").exists()


@pytest.mark.parametrize("changes", [{"seed": 5}, {"data__source": "image_folder", "data__root": "/right"}])
def test_without_a_checkpoint_a_run_can_begin_with_other_settings(
    home: StoragePath, tmp_path: Path, changes: dict[str, Any]
) -> None:
    make_run_in_state(load_config(home, tmp_path / "cache"), STARTED)
    config = load_config(home, tmp_path / "cache", **changes)
    folder = open_run_folder(config)
    assert (folder.resuming, folder.is_new) == (False, True)
    folder.check_data(make_dataset("the fingerprint of other data"))
    folder.record_start(config, make_dataset(OTHER), {}, {"classes": ["c"]})
    close_folder(folder)
    recorded = json.loads((home / "run.json").read())
    assert (recorded["data_fingerprint"], recorded["classes"]) == ({"ends": OTHER}, ["c"])
    assert len(recorded["attempts"]) == 1
    assert inspect_folder(config) == (None, {})


MOVED = [
    ("data__root", "image_folder", {}),
    ("data__pattern", "tfrecords", {"data__class_names": ["a", "b"]}),
]


@pytest.mark.parametrize(("key", "source", "others"), MOVED)
def test_moved_data_is_compared_by_its_fingerprint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, source: str, others: dict[str, Any]
) -> None:
    def of(address: str) -> RunConfig:
        return load_config(tmp_path / "run", tmp_path / "cache", data__source=source, **{key: address}, **others)

    make_run_in_state(of("/old"), FINISHED)
    assert not is_finished(of("/new"))  # it may be other data
    folder = open_run_folder(of("/new"))
    with raises(DataError, "output_dir", str(tmp_path / "run"), problem="other data"):
        folder.check_data(make_dataset(OTHER))
    folder.abandon()
    close_folder(folder)
    assert is_finished(of("/old"))
    logging.getLogger("trainer").propagate = True
    close_folder(start_run(of("/new")))
    assert f"{key.replace('__', '.')}: /old -> /new" in caplog.text
    with raises(ConfigError, "output_dir", problem="seed"):
        open_run_folder(of("/new").model_copy(update={"seed": 5}))


def test_other_versions_on_resume_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(tmp_path / "run", tmp_path / "cache")
    make_run_in_state(config, SAVED)
    file = tmp_path / "run" / "run.json"
    recorded = json.loads(file.read_text())
    assert describe_versions(recorded) is None
    now = recorded["attempts"][-1]["versions"]["tensorflow"]
    recorded["attempts"][-1]["versions"]["tensorflow"] = "2.1.0"
    file.write_text(json.dumps(recorded))
    logging.getLogger("trainer").propagate = True
    close_folder(start_run(config))
    assert f"tensorflow 2.1.0 -> {now}" in caplog.text
    caplog.clear()
    close_folder(start_run(config))
    assert "tensorflow" not in caplog.text


@pytest.mark.parametrize(
    "name", [".config.yaml.17-000000000004711", ".run.json.1-000000000000002", ".probe.5-000000000000006"]
)
def test_temporary_files_of_a_killed_process_are_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "checkpoints" / ".step-00000001.3-000000000000004").mkdir(parents=True)
    (tmp_path / "run" / name).write_text("half of a fi")
    config = load_config(tmp_path / "run", tmp_path / "cache")
    if name == ".config.yaml.17-000000000004711":
        (tmp_path / "run" / "checkpoints" / ".step-00000001.3-000000000000004").rmdir()
        (tmp_path / "run" / "checkpoints").rmdir()
        make_run_in_state(config, SAVED)
    else:
        make_run_in_state(load_config(tmp_path / "other", tmp_path / "cache"), SAVED)
        for path in (tmp_path / "other").rglob("*"):
            if path.is_file():
                target = tmp_path / "run" / path.relative_to(tmp_path / "other")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        close_folder(start_run(config))
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock"]


def test_a_folder_with_files_of_others_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with raises(ConfigError, "output_dir", str(tmp_path / "run"), "empty folder", r"holds no run \(notes.txt\)"):
        open_run_folder(load_config(tmp_path / "run", tmp_path / "cache"))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


DAMAGE: list[bytes] = [b"", b"{", b"null", b"[1]", b"3", b'"text"', b"\xff\xfe\x00", b"[" * 10_000]


# A depth that exceeds the recursion limit of the YAML parser, which is slower at a larger one.
YAML_DAMAGE = [*DAMAGE[:-1], b"[" * 1_000]


@pytest.mark.parametrize("content", [*YAML_DAMAGE, b"a: [", b"- 1", b"\x00", b"seed: 1", b"training: 7", b"unknown: 3"])
def test_a_damaged_configuration_is_named_if_the_run_has_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    config = load_config(tmp_path / "run", tmp_path / "cache")
    make_run_in_state(config, FINISHED)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    before = read_files(storage_path(tmp_path / "run"))
    functions: list[Callable[[RunConfig], object]] = [open_run_folder, is_finished, inspect_folder]
    for function in functions:
        with raises(ConfigError, "output_dir", str(tmp_path / "run"), "restore the file.*warm_start=", "config.yaml"):
            function(config)
    assert read_files(storage_path(tmp_path / "run")) == before


@pytest.mark.parametrize("content", YAML_DAMAGE)
def test_a_damaged_configuration_is_replaced_if_the_run_has_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    config = load_config(tmp_path / "run", tmp_path / "cache")
    make_run_in_state(config, STARTED)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    make_run_in_state(config, FINISHED)
    assert is_finished(config)


@pytest.mark.parametrize("name", ["run.json", "checkpoints/attempts.json", "ledger.json"])
@pytest.mark.parametrize("content", [*DAMAGE, b"{}", b'[{"step": "x"}]', b'{"seconds": {"train": NaN}, "as_of": 1}'])
def test_other_damaged_files_are_renamed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    config = load_config(tmp_path / "run", tmp_path / "cache")
    make_run_in_state(config, SAVED)
    file = tmp_path / "run" / name
    file.write_bytes(content)
    inspect_folder(config)
    assert file.read_bytes() == content
    logging.getLogger("trainer").propagate = True
    close_folder(start_run(config))
    aside = file.with_name(f"{file.name}.damaged")
    if (name, content) in [("run.json", b"{}"), ("run.json", b'{"seconds": {"train": NaN}, "as_of": 1}')]:
        assert not aside.exists()  # an object without these keys is one of an earlier version
        return
    assert aside.read_bytes() == content
    assert f"{file} is corrupt" in caplog.text
    assert aside.name in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data_fingerprint"] == {"ends": FINGERPRINT}


@pytest.mark.parametrize("state", [NEW, STARTED, SAVED])
def test_a_start_that_is_interrupted_before_it_begins_is_recorded_until_one_begins(
    home: StoragePath, tmp_path: Path, state: str
) -> None:
    config = load_config(home, tmp_path / "cache", runtime__max_restarts_without_progress=2)
    make_run_in_state(config, state)
    before = read_files(home)
    for _ in range(3):
        folder = open_run_folder(config)
        folder.abandon(Interrupted("the weights could not be downloaded"))
    assert read_files(home).keys() == before.keys() | {".starts"}
    with raises(GaveUp, "runtime.max_restarts_without_progress", problem="2 restarts .* before the run began"):
        open_run_folder(config)
    close_folder(start_run(load_config(home, tmp_path / "cache", runtime__max_restarts_without_progress=9)))
    assert ".starts" not in read_files(home)
