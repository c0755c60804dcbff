"""`python -m trainer.prepare` as a process."""

import os
import subprocess
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from tests.data.images import fill_folder, noise

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.prepare", *arguments, f"runtime.cache_dir={cache}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cache, env=environment, check=False)


def test_an_image_folder_becomes_a_tfds_folder_and_that_one_another(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    (photos / "dog" / "blank.gif").write_bytes(noise(99, "GIF"))
    done = run("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", "data.shards=2", cache=tmp_path)
    assert done.returncode == 0, done.stderr
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
    again = run("data=tfds", f"data.root={tmp_path}/out", f"output={tmp_path}/second", cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert tfds.builder_from_directory(tmp_path / "second").info.splits["train"].num_examples == 33


def test_damaged_images_end_with_2_or_are_skipped(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    (photos / "dog" / "02.jpg").write_bytes(noise(1)[:400])
    arguments = ("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out")
    failed = run(*arguments, cache=tmp_path)
    assert failed.returncode == 2
    assert f"{photos}/dog/02.jpg: " in failed.stderr
    assert "data.on_error=skip" in failed.stderr
    done = run(*arguments, "data.on_error=skip", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"skipped {photos}/dog/02.jpg: " in done.stdout
    assert f"{tmp_path}/out holds 9 images of 2 classes" in done.stdout


def test_bad_arguments_end_with_2(tmp_path: Path) -> None:
    for arguments, text in (
        (("data=digits",), "output: "),
        (("data=image_folder", "data.root=gone"), "data.root=gone: "),
    ):
        output = (f"output={tmp_path}/out",) if text.startswith("data") else ()
        failed = run(*arguments, *output, cache=tmp_path)
        assert failed.returncode == 2
        assert f"error: {text}" in failed.stderr
    assert not (tmp_path / "out").exists()
