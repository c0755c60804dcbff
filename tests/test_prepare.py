"""`python -m trainer.prepare`, as a person types it."""

import os
import subprocess
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from tests.data.pictures import fill_folder, picture

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.prepare", *arguments, f"runtime.cache_dir={cache}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cache, env=environment, check=False)


def test_an_image_folder_becomes_a_tfds_folder_and_that_one_another(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    (photos / "dog" / "blank.gif").write_bytes(picture(99, "GIF"))
    done = run("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", "data.shards=2", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "validation has only 8 examples: each is 12.5 points of accuracy" in done.stdout
    assert "wrote 41 of 41 images" in done.stdout
    assert f"{tmp_path}/out holds 41 images of 2 classes in 3 shards" in done.stdout
    assert f"python -m trainer data=tfds data.root={tmp_path}/out" in done.stdout
    info = tfds.builder_from_directory(tmp_path / "out").info
    assert info.splits["train"].num_examples == 33
    assert info.splits["validation"].num_examples == 8
    assert info.features["label"].names == ["cat", "dog"]
    again = run("data=tfds", f"data.root={tmp_path}/out", f"output={tmp_path}/second", cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert tfds.builder_from_directory(tmp_path / "second").info.splits["train"].num_examples == 33


def test_damaged_images_end_with_2_or_are_skipped(tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    (photos / "dog" / "02.jpg").write_bytes(picture(1)[:400])
    failed = run("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", cache=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith(
        f"error: 1 image cannot be decoded; repair or remove it, or set data.on_error=skip:\n  {photos}/dog/02.jpg: "
    )
    arguments = ("data=image_folder", f"data.root={photos}", f"output={tmp_path}/out", "data.on_error=skip")
    done = run(*arguments, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"skipped {photos}/dog/02.jpg: " in done.stdout
    assert f"{tmp_path}/out holds 9 images of 2 classes" in done.stdout


def test_bad_arguments_end_with_2(tmp_path: Path) -> None:
    nowhere = run("data=digits", cache=tmp_path)
    assert nowhere.returncode == 2
    assert nowhere.stderr == "error: output: is missing; write python -m trainer.prepare data=... output=FOLDER\n"
    missing = run("data=image_folder", "data.root=gone", f"output={tmp_path}/out", cache=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr == (
        f"error: data.root=gone does not exist (seen from {tmp_path}): expected are ROOT/<class>/*.jpg, or "
        "ROOT/train/<class>/*.jpg with validation/ and test/ beside train/\n"
    )
    assert not (tmp_path / "out").exists()
