"""Distillation in whole runs: the log, kills, several workers, and teachers that are refused."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import assert_same_run, kill_after, train
from tests.e2e.workers import SHARED, start_workers, train_alone_and_by_two

pytestmark = pytest.mark.slow

KILLS = 2
# With augmentation the teacher runs in every step; without, its probabilities are computed once and cached.
MODES = {"live": ("augmentation=light",), "cached": ("augmentation=none",)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another image size and head."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(*SHARED, "model.image_size=40", "model.hidden=16", "~phases.fine_tune", f"output_dir={folder}")
    return folder


def student(teacher: Path | str, mode: str, *more: str) -> tuple[str, ...]:
    return (*SHARED, *MODES[mode], f"distillation.teacher={teacher}", "distillation.temperature=2", *more)


def test_a_student_logs_its_teacher_and_caches_the_probabilities(teacher: Path, tmp_path: Path) -> None:
    quick = student(teacher, "cached", f"runtime.cache_dir={tmp_path / 'cache'}", "debug.max_steps=2")
    output = train(*quick, "export.formats=[]", f"output_dir={tmp_path / 'run'}").stdout
    for text in (f"teacher: {teacher}", "step-000000", "0.1 x label + 0.9 x KL(teacher, student) at temperature 2"):
        assert text in output
    (cache,) = (tmp_path / "cache" / "teachers").iterdir()
    with np.load(cache) as arrays:
        (probabilities,) = (arrays[name] for name in arrays.files if arrays[name].shape == (90, 10))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert probabilities.std(0).min() > 0


def test_a_teacher_of_other_classes_is_rejected(teacher: Path, photos: Path, tmp_path: Path) -> None:
    error = train(
        "data=image_folder", f"data.root={photos}", "model=glyphs_mobilenet_v2", "debug=fast",
        f"distillation.teacher={teacher}", f"output_dir={tmp_path / 'run'}", code=2,
    ).stderr  # fmt: skip
    for text in (f"distillation.teacher={teacher}", "10 classes", "dark, light"):
        assert text in error


@pytest.mark.timeout(1200)
def test_a_restart_uses_the_cache_and_accepts_no_other_teacher(teacher: Path, tmp_path: Path) -> None:
    moved, cache = tmp_path / "teacher", tmp_path / "cache"
    shutil.copytree(teacher, moved)
    run = student(moved, "cached", f"runtime.cache_dir={cache}", "export.formats=[]", f"output_dir={tmp_path / 'run'}")
    train(*run, "debug.max_steps=2")
    (file,) = (cache / "teachers").iterdir()
    written = file.stat().st_mtime_ns
    train(*run, "debug.max_steps=3")
    assert file.stat().st_mtime_ns == written
    config = (moved / "config.yaml").read_text()
    assert "pooling: avg" in config
    (moved / "config.yaml").write_text(config.replace("pooling: avg", "pooling: max"))
    assert "fingerprint" in train(*run, "debug.max_steps=4", code=2).stderr


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
def test_kills_change_nothing(teacher: Path, tmp_path: Path, mode: str) -> None:
    calm, killed, cache = tmp_path / "calm", tmp_path / "killed", tmp_path / "cache"
    run = student(teacher, mode, "runtime.steps_per_call=3", "model.dropout=0.2", f"runtime.cache_dir={cache}")
    began = time.monotonic()
    train(*run, f"output_dir={calm}")
    duration = time.monotonic() - began
    assert (cache / "teachers").exists() == (mode == "cached")
    shutil.rmtree(cache / "teachers", ignore_errors=True)
    rng = np.random.default_rng(5)
    for _ in range(KILLS):
        if kill_after(rng.uniform(0.3, 0.8) * duration, *run, f"output_dir={killed}") == 0:
            break
    train(*run, f"output_dir={killed}")
    assert_same_run(calm, killed)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
def test_two_workers_train_as_one_in_two_micro_batches(teacher: Path, tmp_path: Path, mode: str) -> None:
    run = student(teacher, mode, "training.class_weights=balanced", "training.loss=focal")
    train_alone_and_by_two(tmp_path, *run)


@pytest.mark.timeout(600)
def test_two_workers_learn_from_a_saved_model(teacher: Path, tmp_path: Path) -> None:
    run = student(teacher / "export" / "saved_model" / "1", "live", "debug.max_steps=3", "export.formats=[]")
    workers = start_workers(tmp_path / "workers", 2, *run, f"output_dir={tmp_path / 'run'}")
    assert workers.wait(300) == [0, 0], workers.output(0)
