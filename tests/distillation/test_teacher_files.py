"""Teachers in folders and buckets, and the errors for a missing or unsuitable one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer.config.schema import validate_config
from trainer.distillation.teacher_files import (
    check_classes,
    describe_teacher,
    read_scores,
    read_weights,
    write_saved_model,
)
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.runs.checkpoints import CheckpointFolder
from trainer.storage.path import storage_path

CLASSES = ("cat", "dog", "owl")
VALUES = {"a/kernel": np.ones(3, np.float32), "ema/a/kernel": np.full(3, 2, np.float32), "optimizer/0/m": np.zeros(3)}


def leave_run(folder: Path, values: dict[str, Any] | None = None, keep: str = "best") -> Path:
    """Write the files of a run with two checkpoints, of which the first was the best."""
    settings = {"data": {"source": "digits"}, "model": {"backbone": "Xception", "image_size": 96},
            "phases": {"head": {"thaw": "none", "epochs": 1}}, "training": {"keep": keep}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(validate_config(settings).model_dump(mode="json")))
    (folder / "run.json").write_text(json.dumps({"classes": CLASSES}))
    checkpoints = CheckpointFolder(folder / "checkpoints", 2, print)
    checkpoints.save({"step": 1, "best": {"step": 1}}, values or VALUES, 1)
    checkpoints.save({"step": 2, "best": {"step": 1}}, {name: value + 1 for name, value in VALUES.items()}, 1)
    return folder


@pytest.fixture(params=["local", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The folder of a run, on disk and in a bucket."""
    folder = leave_run(tmp_path / "teacher")
    if request.param == "local":
        yield str(folder)
        return
    with running(tmp_path / "objects"):
        remote = f"gs://{BUCKET}/teacher"
        for file in folder.rglob("*"):
            if file.is_file() and file.name not in ("LATEST", "BEST"):
                name = file.relative_to(folder).as_posix().replace("/step-00000001/", "/step-00000001-ab/")
                (storage_path(remote) / name).upload(file)
        (storage_path(remote) / "checkpoints/LATEST").write("step-00000002\nstep-00000001-ab\n")
        (storage_path(remote) / "checkpoints/BEST").write("step-00000001-ab\n")
        yield remote


def test_the_best_checkpoint_of_a_run_with_its_averages(run: str) -> None:
    teacher = describe_teacher(run + "/")
    assert (teacher.classes, teacher.home.name[:13]) == (CLASSES, "step-00000001")
    assert (teacher.model.backbone, teacher.model.image_size) == ("Xception", 96)
    assert teacher.summary.startswith(f"{run}/ (Xception, checkpoint step-00000001")
    values = read_weights(teacher)
    assert not any(name.startswith("optimizer") for name in values)
    np.testing.assert_array_equal(values["a/kernel"], [2, 2, 2])


def test_the_last_checkpoint_with_keep_last(tmp_path: Path) -> None:
    teacher = describe_teacher(str(leave_run(tmp_path / "t", keep="last")))
    np.testing.assert_array_equal(read_weights(teacher)["a/kernel"], [3, 3, 3])


def test_the_fingerprint_depends_on_the_weights_only(tmp_path: Path) -> None:
    one, same = (describe_teacher(str(leave_run(tmp_path / name))) for name in "ab")
    other = describe_teacher(str(leave_run(tmp_path / "c", {"a/kernel": np.full(3, 5, np.float32)})))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_only_read_teacher_reads_weights(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "run")
    (folder / "checkpoints" / "step-00000001" / "variables.npz").unlink()
    teacher = describe_teacher(str(folder))
    with pytest.raises(DataError):
        read_weights(teacher)


def test_a_saved_model_has_the_same_fingerprint_in_a_bucket(tmp_path: Path) -> None:
    home = tmp_path / "saved_model" / "1"
    contents = {"saved_model.pb": b"graph", "assets/labels.txt": b"cat\ndog\nowl\n", "variables/variables.index": b"v"}
    for name, content in contents.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    local = describe_teacher(str(home))
    assert (local.classes, local.model) == (CLASSES, None)
    with running(tmp_path / "objects"):
        for name in contents:
            (storage_path(f"gs://{BUCKET}/m") / name).upload(home / name)
        remote = describe_teacher(f"gs://{BUCKET}/m")
        remote_files = read_weights(remote)
    assert remote.fingerprint == local.fingerprint
    for files in (remote_files, read_weights(local)):
        write_saved_model(files, tmp_path / "copy")
        assert {name: (tmp_path / "copy" / name).read_bytes() for name in files} == contents


def test_errors_for_what_is_no_teacher(tmp_path: Path) -> None:
    def check(address: Path, problem: str, fix: str, kind: type[TrainerError] = DataError) -> None:
        with raises(kind, "distillation.teacher", str(address), fix=fix, problem=problem):
            read_weights(describe_teacher(str(address)))

    check(tmp_path, "no config.yaml.*no saved_model.pb", "output_dir of a run")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "saved_model.pb").write_bytes(b"x")
    check(tmp_path / "m", "SavedModel without assets/labels.txt", "export/saved_model/1")
    folder = leave_run(tmp_path / "run")
    (folder / "checkpoints" / "BEST").unlink()
    check(folder, "no checkpoint yet", "wait")
    damaged = leave_run(tmp_path / "damaged")
    file = damaged / "checkpoints" / "step-00000001" / "variables.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    check(damaged, f"{file}.* does not match its size or checksum", "")
    for content in ("{", '{"classes": [1, 2]}', '{"classes": ["a", null]}'):
        (damaged / "run.json").write_text(content)
        check(damaged, f"{file.parent} or run.json is corrupt", "restore")
    (damaged / "config.yaml").write_text("modle: {}")
    check(damaged, "(?s)config.yaml cannot be used: .*modle", "of this version", ConfigError)


def test_the_classes_of_the_data_pass() -> None:
    check_classes("t", CLASSES, CLASSES)
    check_classes("t", ("caf\u00e9", "c"), ("cafe\u0301", "c"))


@pytest.mark.parametrize(
    ("known", "required", "problem"),
    [
        (
            "cat dog owl",
            "cat dog yak",
            "3 classes and the data has 3: only the teacher has owl and only the data has yak",
        ),
        ("cat dog owl", "cat dog", "3 classes and the data has 2: only the teacher has owl"),
        ("dog cat", "cat dog", r"2 classes and the data has 2: they are in a different order \(dog, cat; cat, dog\)"),
        (" ".join(map(str, range(20))), "0 1 2 3 4 5 6 7 8 9", "only the teacher has 10, 11, 12, 13, 14 and 5 more"),
    ],
)
def test_other_classes_are_named(known: str, required: str, problem: str) -> None:
    with raises(DataError, "distillation.teacher", "t", fix="trained on these classes", problem=f"{problem}$"):
        check_classes("t", tuple(known.split()), tuple(required.split()))


def test_the_scores_of_a_teacher_are_those_of_its_report(run: str) -> None:
    assert read_scores(run, "f") is None
    test = {"split": "test", "n": 90, "accuracy": 0.9, "interval": [0.82, 0.95], "loss": 1.0}
    report = storage_path(run) / "report" / "report.json"
    report.write(json.dumps({"test": test, "data": {"fingerprint": "f"}}))
    scores = {"split": "test", "n": 90, "accuracy": 0.9, "interval": [0.82, 0.95]}
    assert read_scores(run + "/", "f") == scores | {"same_data": True}
    assert read_scores(run, "g") == scores | {"same_data": False}
    for corrupt in ("{", "[]", '{"test": {"interval": [1]}}', '{"test": null}'):
        report.write(corrupt)
        assert read_scores(run, "f") is None
