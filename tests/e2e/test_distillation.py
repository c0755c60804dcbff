"""Whole runs that learn from a teacher: what they say, that kills and workers change no bit, and what is refused."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.running import assert_same_run, run, start
from tests.e2e.workers import SHARED, start_workers, train_alone_and_by_two

KILLS = 2
# Augmentation: the teacher answers in every step. Without: it answers once, beforehand.
WAYS = {"live": ("augmentation=light",), "kept": ("augmentation=none",)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another size and head."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    result = run(
        *SHARED, "model.image_size=40", "model.hidden=16", "~phases.fine_tune", f"output_dir={folder}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def student(teacher: Path | str, way: str, *more: str) -> tuple[str, ...]:
    return (*SHARED, *WAYS[way], f"distillation.teacher={teacher}", "distillation.temperature=2", *more)


@pytest.mark.slow
def test_a_student_says_what_it_learns_from(teacher: Path, tmp_path: Path) -> None:
    told = student(teacher, "kept", f"runtime.cache_dir={tmp_path / 'cache'}", "debug.max_steps=2", "export.formats=[]")
    first = run(*told, f"output_dir={tmp_path / 'run'}")
    assert first.returncode == 0, first.stderr
    assert f"teacher: {teacher} (MobileNetV2, checkpoint step-000000" in first.stdout
    assert "loss = 0.1 x label + 0.9 x KL(teacher, student) at temperature 2" in first.stdout
    assert "it answers for 90 training images at 40 px, once; kept in " in first.stdout
    (kept,) = (tmp_path / "cache" / "teachers").iterdir()
    with np.load(kept) as arrays:
        answers = arrays["answers"]
    assert (answers.shape, answers.dtype) == ((90, 10), np.float32)
    np.testing.assert_allclose(answers.sum(-1), 1, atol=1e-5)
    assert answers.std(0).min() > 0


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_refused(teacher: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(
                tmp_path / "photos" / name / f"{i}.png"
            )
    result = run(
        "data=image_folder", f"data.root={tmp_path / 'photos'}", "model=glyphs_mobilenet_v2", "debug=fast",
        f"distillation.teacher={teacher}", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 2
    assert (
        f"distillation.teacher={teacher} knows 10 classes, the data has 2: it alone has 0, 1, 2, 3, 4 and 5 more and "
        "the data alone has dark, light; give a teacher that was trained on these classes"
    ) in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_start_takes_kept_answers_and_no_other_teacher(teacher: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(teacher, moved)
    told = student(moved, "kept", f"runtime.cache_dir={tmp_path / 'cache'}", "export.formats=[]", f"output_dir={out}")
    assert run(*told, "debug.max_steps=2").returncode == 0
    longer = run(*told, "debug.max_steps=3")
    assert longer.returncode == 0, longer.stderr
    assert "its answers: taken from " in longer.stdout
    config = (moved / "config.yaml").read_text()
    assert "pooling: avg" in config
    (moved / "config.yaml").write_text(config.replace("pooling: avg", "pooling: max"))
    refused = run(*told, "debug.max_steps=4")
    assert refused.returncode == 2
    assert f"{out} learned from another teacher (fingerprint " in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_kills_change_nothing(teacher: Path, tmp_path: Path, way: str) -> None:
    calm, folder = tmp_path / "calm", tmp_path / "killed"
    cache = tmp_path / "cache"
    told = student(teacher, way, "runtime.steps_per_call=3", "model.dropout=0.2", f"runtime.cache_dir={cache}")
    began = time.monotonic()
    assert run(*told, f"output_dir={calm}").returncode == 0
    whole = time.monotonic() - began
    assert (cache / "teachers").exists() == (way == "kept")
    shutil.rmtree(cache / "teachers", ignore_errors=True)  # the others have to ask for themselves
    rng = np.random.default_rng(5)
    for _ in range(KILLS):
        child = start(*told, f"output_dir={folder}")
        time.sleep(rng.uniform(0.3, 0.8) * whole)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:
            break
    result = run(*told, f"output_dir={folder}")
    assert result.returncode == 0, result.stderr
    assert_same_run(calm, folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", WAYS)
def test_two_workers_learn_bit_for_bit_what_one_learns_in_two_pieces(teacher: Path, tmp_path: Path, way: str) -> None:
    told = student(teacher, way, "training.class_weights=balanced", "training.loss=focal")
    train_alone_and_by_two(tmp_path, *told)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_learn_from_a_saved_model(teacher: Path, tmp_path: Path) -> None:
    told = student(teacher / "export" / "saved_model" / "1", "live", "debug.max_steps=3", "export.formats=[]")
    workers = start_workers(tmp_path / "workers", 2, *told, f"output_dir={tmp_path / 'run'}")
    assert workers.wait(300) == [0, 0], workers.said(0)
