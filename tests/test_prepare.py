"""`python -m trainer.prepare` as a process, and again in this one."""

import subprocess
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tests.cli.verbs import exit_code_of
from tests.data.images import encode_noise, fill_folder
from tests.e2e.running import program
from tests.errors import raises
from trainer import prepare as command
from trainer.cli.compose import compose
from trainer.config.schema import validate_config
from trainer.data.prepare import prepare as prepare_here
from trainer.errors import DataError


def prepare(*arguments: str, cache: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return program("prepare", *arguments, f"runtime.cache_dir={cache}", code=code, cwd=cache)


def prepare_in_this_process(*arguments: str, output: Path, cache: Path) -> None:
    prepare_here(validate_config(compose([*arguments, f"runtime.cache_dir={cache}"]) or {}), str(output))


def test_an_image_folder_becomes_a_tfds_folder_and_that_one_another(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    (photos / "dog" / "blank.gif").write_bytes(encode_noise(99, "GIF"))
    done = prepare(
        "data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", "data.shards=2", cache=tmp_path
    )
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
    prepare_in_this_process("data=tfds", f"data.root={tmp_path}/out", output=tmp_path / "second", cache=tmp_path)
    assert tfds.builder_from_directory(tmp_path / "second").info.splits["train"].num_examples == 33


def test_damaged_images_end_with_2_or_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    (photos / "dog" / "02.jpg").write_bytes(encode_noise(1)[:400])
    arguments = ("data=image_folder", f"data.root={photos}")
    error = prepare(*arguments, f"output={tmp_path}/out", cache=tmp_path, code=2).stderr
    assert f"{photos}/dog/02.jpg: " in error
    assert "data.on_error=skip" in error
    prepare_in_this_process(*arguments, "data.on_error=skip", output=tmp_path / "out", cache=tmp_path)
    stdout = capsys.readouterr().out
    assert f"skipped {photos}/dog/02.jpg: " in stdout
    assert f"{tmp_path}/out holds 9 images of 2 classes" in stdout


def test_bad_arguments_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code of an error in the data is that of the damaged images above."""
    assert exit_code_of(command.main, "data=digits") == 2
    assert "error: output: " in capsys.readouterr().err
    with raises(DataError, key="data.root", value="gone"):
        prepare_in_this_process("data=image_folder", "data.root=gone", output=tmp_path / "out", cache=tmp_path)
    assert not (tmp_path / "out").exists()
