"""Where a teacher is found, and what is said where there is none or another one than needed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.storage.emulator import BUCKET, running
from trainer.config.schema import load
from trainer.distillation.source import check_classes, find_teacher, read_teacher, write_saved_model
from trainer.errors import ConfigError, DataError
from trainer.runs.checkpoints import CheckpointFolder
from trainer.storage.path import storage_path

CLASSES = ("cat", "dog", "owl")
VALUES = {"a/kernel": np.ones(3, np.float32), "ema/a/kernel": np.full(3, 2, np.float32), "optimizer/0/m": np.zeros(3)}


def leave_run(folder: Path, values: dict[str, Any] | None = None, keep: str = "best") -> Path:
    """What a run leaves: two checkpoints, of which the first was the best."""
    told = {"data": {"source": "digits"}, "model": {"backbone": "Xception", "image_size": 96},
            "phases": {"head": {"thaw": "none", "epochs": 1}}, "training": {"keep": keep}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(load(told).model_dump(mode="json")))
    (folder / "run.json").write_text(json.dumps({"classes": CLASSES}))
    checkpoints = CheckpointFolder(folder / "checkpoints", 2, print)
    checkpoints.save({"step": 1, "best": {"step": 1}}, values or VALUES, 1)
    checkpoints.save({"step": 2, "best": {"step": 1}}, {name: value + 1 for name, value in VALUES.items()}, 1)
    return folder


@pytest.fixture(params=["local", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The folder of such a run, on disk and in a bucket."""
    folder = leave_run(tmp_path / "teacher")
    if request.param == "local":
        yield str(folder)
        return
    with running(tmp_path / "objects"):
        there = f"gs://{BUCKET}/teacher"
        for file in folder.rglob("*"):
            if file.is_file() and file.name not in ("LATEST", "BEST"):
                name = file.relative_to(folder).as_posix().replace("/step-00000001/", "/step-00000001-ab/")
                (storage_path(there) / name).upload(file)
        (storage_path(there) / "checkpoints/LATEST").write("step-00000002\nstep-00000001-ab\n")
        (storage_path(there) / "checkpoints/BEST").write("step-00000001-ab\n")
        yield there


def test_the_best_checkpoint_of_a_run_with_its_averages(run: str) -> None:
    found = find_teacher(run + "/")
    assert (found.kind, found.classes, found.home.name[:13]) == ("checkpoint", CLASSES, "step-00000001")
    assert found.model is not None
    assert (found.model.backbone, found.model.image_size) == ("Xception", 96)
    assert found.words.startswith(f"{run}/ (Xception, checkpoint step-00000001")
    values = read_teacher(found)
    assert not any(name.startswith("optimizer") for name in values)
    np.testing.assert_array_equal(values["a/kernel"], [2, 2, 2])


def test_the_last_checkpoint_where_that_was_kept(tmp_path: Path) -> None:
    found = find_teacher(str(leave_run(tmp_path / "t", keep="last")))
    np.testing.assert_array_equal(read_teacher(found)["a/kernel"], [3, 3, 3])


def test_another_teacher_has_another_fingerprint_and_a_moved_one_has_not(tmp_path: Path) -> None:
    one, same = (find_teacher(str(leave_run(tmp_path / name))) for name in "ab")
    other = find_teacher(str(leave_run(tmp_path / "c", {"a/kernel": np.full(3, 5, np.float32)})))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_only_read_teacher_reads_weights(tmp_path: Path) -> None:
    folder = leave_run(tmp_path / "run")
    (folder / "checkpoints" / "step-00000001" / "variables.npz").unlink()
    found = find_teacher(str(folder))
    with pytest.raises(DataError):
        read_teacher(found)


def test_a_saved_model_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    home = tmp_path / "saved_model" / "1"
    contents = {"saved_model.pb": b"graph", "assets/labels.txt": b"cat\ndog\nowl\n", "variables/variables.index": b"v"}
    for name, content in contents.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    here = find_teacher(str(home))
    assert (here.kind, here.classes, here.model) == ("SavedModel", CLASSES, None)
    with running(tmp_path / "objects"):
        for name in contents:
            (storage_path(f"gs://{BUCKET}/m") / name).upload(home / name)
        there = find_teacher(f"gs://{BUCKET}/m")
        files = read_teacher(there)
    assert there.fingerprint == here.fingerprint
    for found in (files, read_teacher(here)):
        write_saved_model(found, tmp_path / "copy")
        assert {name: (tmp_path / "copy" / name).read_bytes() for name in found} == contents


def refusal(address: object) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        read_teacher(find_teacher(str(address)))
    assert error.value.exit_code == 2
    return str(error.value)


def test_where_there_is_no_teacher_it_is_said(tmp_path: Path) -> None:
    start = f"distillation.teacher={tmp_path}"
    assert refusal(tmp_path) == (
        f"{start} is neither the output_dir of a run (no config.yaml in it) nor the folder of a SavedModel "
        "(no saved_model.pb in it)"
    )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "saved_model.pb").write_bytes(b"x")
    assert refusal(tmp_path / "m") == (
        f"{start}/m is a SavedModel without assets/labels.txt: kubetune did not export it"
    )
    folder = leave_run(tmp_path / "run")
    (folder / "checkpoints" / "BEST").unlink()
    assert refusal(folder) == f"{start}/run: that run has no checkpoint yet; let it end first"
    damaged = leave_run(tmp_path / "damaged")
    file = damaged / "checkpoints" / "step-00000001" / "variables.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert refusal(damaged) == f"{start}/damaged: {file} does not match its checksum"
    (damaged / "run.json").write_text("{")
    assert refusal(damaged) == f"{start}/damaged: {file.parent} or run.json is damaged"
    (damaged / "config.yaml").write_text("modle: {}")
    assert refusal(damaged).startswith(f"{start}/damaged: its config.yaml cannot be used; the configuration has ")


def test_other_classes_are_named() -> None:
    check_classes("t", CLASSES, CLASSES)
    check_classes("t", ("a b", "c"), ("a\nb", "c"))  # labels.txt has one name a line

    def said(known: tuple[str, ...], wanted: tuple[str, ...]) -> str:
        with pytest.raises(DataError) as error:
            check_classes("t", known, wanted)
        return str(error.value)

    tail = "; give a teacher that was trained on these classes"
    assert said(CLASSES, ("cat", "dog", "yak")) == (
        f"distillation.teacher=t knows 3 classes, the data has 3: it alone has owl and the data alone has yak{tail}"
    )
    assert said(CLASSES, ("cat", "dog")) == (
        f"distillation.teacher=t knows 3 classes, the data has 2: it alone has owl{tail}"
    )
    assert said(("dog", "cat"), ("cat", "dog")) == (
        "distillation.teacher=t knows 2 classes, the data has 2: they are the same in another order (dog, cat; cat, "
        f"dog){tail}"
    )
    assert "it alone has 10, 11, 12, 13, 14 and 5 more" in said(tuple(map(str, range(20))), tuple(map(str, range(10))))
