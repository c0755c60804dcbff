"""The decision whether a start trains the teacher of its run, on disk and in a bucket."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.test_schema import tree
from tests.errors import raises
from tests.runs.test_folder import FINISHED, NEW, SAVED, STARTED, make_run_in_state
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.config.schema import RunConfig, derive_teacher_config, validate_resolved_config
from trainer.distillation.own_teacher import choose_teacher_or_student, locate_teacher, must_train, rename_teacher_keys
from trainer.errors import ConfigError, DataError
from trainer.runs.folder import is_finished, open_run_folder
from trainer.storage.path import StoragePath, storage_path


def make_config(home: StoragePath, tmp_path: Path, **changes: Any) -> RunConfig:
    distillation = {"teacher": "train", "model": {"backbone": "ResNet50"}}
    cache = str(tmp_path / "cache")
    return validate_resolved_config(
        tree(output_dir=str(home), runtime__cache_dir=cache, distillation=distillation, **changes)
    )


def get_teacher_config(config: RunConfig) -> RunConfig:
    teacher = derive_teacher_config(config)
    assert isinstance(teacher, RunConfig)
    return teacher


def choose(config: RunConfig) -> tuple[Any, Any]:
    return choose_teacher_or_student(config, ControlChannel(discover({}), {}))


def test_the_teacher_is_trained_until_it_is_finished(home: StoragePath, tmp_path: Path) -> None:
    config = make_config(home, tmp_path)
    for state in (NEW, STARTED, SAVED):
        make_run_in_state(get_teacher_config(config), state)
        assert choose(config) == (config, get_teacher_config(config))
    make_run_in_state(get_teacher_config(config), FINISHED)
    assert choose(config) == (config, None)
    for state in (STARTED, SAVED, FINISHED):  # of the student, in the folder of which the teacher's is
        make_run_in_state(config, state)
        assert choose(config) == (config, None)
    assert is_finished(config)
    assert is_finished(get_teacher_config(config))
    if not home.is_local:  # a start on another node downloads the student alone
        folder = open_run_folder(config)
        assert not (folder.path / "teacher").exists()
        assert (folder.path / "config.yaml").exists()
        folder.abandon()


def test_a_longer_teacher_is_trained_unless_its_student_has_begun(home: StoragePath, tmp_path: Path) -> None:
    config, longer = make_config(home, tmp_path), make_config(home, tmp_path, phases__head__epochs=9)
    make_run_in_state(get_teacher_config(config), FINISHED)
    assert must_train(longer, get_teacher_config(longer))
    make_run_in_state(config, SAVED)
    # the run is extended, with the teacher that it began with
    assert not must_train(longer, get_teacher_config(longer))


def test_a_folder_that_the_student_cannot_use_is_rejected_before_the_teacher_trains(
    home: StoragePath, tmp_path: Path
) -> None:
    config = make_config(home, tmp_path)
    (home / "notes.txt").write("mine")
    with raises(ConfigError, "output_dir", str(home), "empty folder", r"holds no run \(notes.txt\)"):
        choose(config)
    (home / "notes.txt").delete()
    make_run_in_state(config, SAVED)
    with raises(ConfigError, "output_dir", str(home), "same values", "seed: 42 -> 5"):
        choose(make_config(home, tmp_path, seed=5))


def test_another_run_cannot_use_the_folder_of_a_teacher(home: StoragePath, tmp_path: Path) -> None:
    config = make_config(home, tmp_path)
    make_run_in_state(get_teacher_config(config), SAVED)
    alone = validate_resolved_config(tree(output_dir=str(home), runtime__cache_dir=str(tmp_path / "cache")))
    with raises(ConfigError, "output_dir", str(home), "empty folder", r"holds no run \(teacher\)"):
        open_run_folder(alone)
    other = make_config(home, tmp_path, seed=5)
    with raises(ConfigError, "output_dir", f"{home}/teacher", "same values", "seed: 42 -> 5"):
        open_run_folder(choose(other)[1])


def test_a_run_that_must_exist_can_be_that_of_its_teacher(home: StoragePath, tmp_path: Path) -> None:
    config = make_config(home, tmp_path, resume="must")
    with raises(ConfigError, "resume", "must", "resume=auto", "holds no run"):
        open_run_folder(choose(config)[1])
    make_run_in_state(get_teacher_config(make_config(home, tmp_path)), FINISHED)
    now, teacher = choose(config)
    assert teacher is None
    make_run_in_state(now, SAVED)  # not rejected, although the student has no run yet
    assert choose(config) == (config, None)


def test_a_new_folder_is_that_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(storage_path(""), tmp_path).model_copy(update={"output_dir": None})
    now, teacher = choose(config)
    assert (now.output_dir, teacher.output_dir) == (now.output_dir, f"{now.output_dir}/teacher")
    folder = open_run_folder(teacher)
    folder.student_output_dir = now.output_dir
    assert f"output_dir={now.output_dir} " in make_folder_hint(folder)
    folder.abandon()
    assert not Path(str(now.output_dir)).exists()  # a rejected start leaves nothing


def make_folder_hint(folder: Any) -> str:
    from trainer.runs.saver import Saver

    return Saver(folder, ControlChannel(discover({}), {}), 1).resume_hint


def test_runs_without_such_a_teacher_are_unchanged(tmp_path: Path) -> None:
    config = validate_resolved_config(tree(output_dir=str(tmp_path / "run"), distillation={"teacher": "outputs/t"}))
    assert choose(config) == (config, None)
    assert not (tmp_path / "run").exists()


def test_the_address_of_a_teacher() -> None:
    assert locate_teacher("train", "gs://b/run/") == "gs://b/run/teacher"
    assert locate_teacher("./train", "run") == "./train"


def test_errors_of_its_run_have_the_keys_of_the_command() -> None:
    with raises(ConfigError, "distillation.model.backbone", "x"), rename_teacher_keys():
        raise ConfigError("there is no such network", key="model.backbone", value="x")
    with raises(DataError, "data.root"), rename_teacher_keys():
        raise DataError("is missing", key="data.root")
    with pytest.raises(ConfigError) as caught, rename_teacher_keys():
        raise ConfigError.combine([ConfigError("a", key="phases.head.thaw"), ConfigError("b", key="seed")])
    assert [error.key for error in caught.value.errors] == ["distillation.phases.head.thaw", "seed"]
