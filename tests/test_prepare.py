"""`python -m trainer.prepare`: once as a process, the other times in this one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.cli.verbs import exit_code_of
from tests.data.images import fill_folder, noise
from tests.e2e.running import program
from trainer import prepare as verb
from trainer.monitoring.health import health

Prepare = Callable[..., str]


@pytest.fixture
def prepare(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """The output of the command with these arguments and this exit code."""
    # The set-up of a new process is not for this one, which has used TensorFlow.
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)
    for name in ("phase", "activity"):
        monkeypatch.setattr(health, name, getattr(health, name))

    def run(*arguments: str, code: int = 0) -> str:
        capfd.readouterr()
        ended = exit_code_of(verb.main, *arguments, f"runtime.cache_dir={tmp_path}")
        out, err = capfd.readouterr()
        assert ended == code, err
        return err if code else out

    return run


def test_an_image_folder_becomes_a_tfds_folder_and_that_one_another(tmp_path: Path, prepare: Prepare) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    (photos / "dog" / "blank.gif").write_bytes(noise(99, "GIF"))
    folder = ("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", "data.shards=2")
    done = program("prepare", *folder, f"runtime.cache_dir={tmp_path}", cwd=tmp_path)
    for text in (
        "validation has only 8 examples",
        "wrote 41 of 41 images",
        f"{tmp_path}/out holds 41 images of 2 classes in 3 shards",
        f"python -m trainer data=tfds data.root={tmp_path}/out",
    ):
        assert text in done.stdout
    info = tfds.builder_from_directory(tmp_path / "out").info
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 33, "validation": 8}
    assert info.features["label"].names == ["cat", "dog"]
    prepare("data=tfds", f"data.root={tmp_path}/out", f"output={tmp_path}/second")
    assert tfds.builder_from_directory(tmp_path / "second").info.splits["train"].num_examples == 33


def test_damaged_images_end_with_2_or_are_skipped(tmp_path: Path, prepare: Prepare) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    (photos / "dog" / "02.jpg").write_bytes(noise(1)[:400])
    arguments = ("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out")
    error = prepare(*arguments, code=2)
    assert f"{photos}/dog/02.jpg: " in error
    assert "data.on_error=skip" in error
    done = prepare(*arguments, "data.on_error=skip")
    assert f"skipped {photos}/dog/02.jpg: " in done
    assert f"{tmp_path}/out holds 9 images of 2 classes" in done


def test_bad_arguments_end_with_2(tmp_path: Path, prepare: Prepare) -> None:
    gone = ("data=image_folder", "data.root=gone", f"output={tmp_path}/out")
    for arguments, text in ((("data=digits",), "output: "), (gone, "data.root=gone: ")):
        assert re.search(f"^error: {text}", prepare(*arguments, code=2), re.MULTILINE)
    assert not (tmp_path / "out").exists()
