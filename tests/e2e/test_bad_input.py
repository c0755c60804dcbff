"""Mistakes of a user and failures of a machine: the documented exit code, the key at fault, nothing lost."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.e2e.running import ROOT, program, train

QUICK = (
    "data=image_folder", "model=glyphs_mobilenet_v2", "training.batch_size=8", "phases.head.epochs=1",
    "~phases.fine_tune", "export.formats=[saved_model]",
)  # fmt: skip


@pytest.fixture
def damaged(photos: Path) -> Path:
    """The photos with one that is truncated."""
    photo = photos / "light" / "07.jpg"
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    return photos


@pytest.mark.slow
def test_a_damaged_photo_is_named(damaged: Path, tmp_path: Path) -> None:
    error = train(*QUICK, f"data.root={damaged}", f"output_dir={tmp_path / 'run'}", code=2).stderr
    for text in ("error: ", "light/07.jpg", "data.on_error=skip"):
        assert text in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_damaged_photo_can_be_skipped_and_is_counted(damaged: Path, tmp_path: Path) -> None:
    result = train(*QUICK, f"data.root={damaged}", "data.on_error=skip", f"output_dir={tmp_path / 'run'}")
    assert "skipped " in result.stdout
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert len(report["data"]["undecodable"]) == 1
    assert "light/07.jpg" in report["data"]["undecodable"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "features"), [("memory", "live"), ("none", "live"), ("auto", "cached")])
@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        ("validation/*", ("none of the 10 validation images can be decoded", "no example of validation could be read")),
        ("train/light", ("none of the 15 training images of light can be decoded",)),
    ],
)
def test_nothing_is_left_of_a_split_or_class(
    photos: Path, tmp_path: Path, damaged: str, text: tuple[str, ...], cache: str, features: str
) -> None:
    root = tmp_path / "splits"
    shutil.copytree(photos, root / "train")
    for name in ("dark", "light"):
        (root / "validation" / name).mkdir(parents=True)
        for file in sorted((photos / name).iterdir())[:5]:
            shutil.copy(file, root / "validation" / name / f"other-{file.name}")
    for file in root.glob(f"{damaged}/*"):
        file.write_bytes(file.read_bytes()[:-200])
    arguments = [*QUICK, f"data.root={root}", f"output_dir={tmp_path / 'run'}", "data.on_error=skip"]
    error = train(*arguments, f"data.cache={cache}", f"phases.head.features={features}", code=2).stderr
    assert any(line in error for line in text), error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_test_split_that_cannot_be_decoded_leaves_a_run_that_can_be_exported(photos: Path, tmp_path: Path) -> None:
    root, run = tmp_path / "splits", tmp_path / "run"
    for name in ("train", "validation", "test"):
        shutil.copytree(photos, root / name)
    intact = {file: file.read_bytes() for file in (root / "test").glob("*/*")}
    for file, content in intact.items():
        file.write_bytes(content[:-200] + file.name.encode())
    error = train(*QUICK, f"data.root={root}", f"output_dir={run}", "debug.max_steps=2", code=2).stderr
    assert f"accepts no other data: then export it with python -m trainer.export run={run} data.on_error=skip" in error
    for file, content in intact.items():
        file.write_bytes(content)
    program("export", f"run={run}", "data.on_error=skip", "formats=[saved_model]", f"output={tmp_path / 'out'}")
    assert (tmp_path / "out" / "saved_model").exists()


@pytest.mark.slow
def test_a_phase_that_reads_no_image_is_named(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "splits" / "validation")
    shutil.copytree(photos, tmp_path / "splits" / "train")
    for number, file in enumerate(sorted((tmp_path / "splits" / "train").glob("*/*"))):
        file.write_bytes(file.read_bytes()[: None if number % 15 == 0 else -200] + bytes([number]))
    arguments = [*QUICK, f"data.root={tmp_path / 'splits'}", f"output_dir={tmp_path / 'run'}", "data.on_error=skip"]
    short = ["training.batch_size=1", "phases.head.epochs=null", "phases.head.steps=1", "phases.head.features=live"]
    error = train(*arguments, *short, "data.cache=none", code=2).stderr
    assert (
        "error: no image of epoch 1 (phase head, 1 steps) could be read; repair the images, or make phases.head"
        in error
    )


QUICK_MISTAKE = (["training.class_weights={grey:2}"], "training.class_weights: the data has no class grey")
SLOW_MISTAKES = [
    (["data.root=/nowhere/photos"], "/nowhere/photos"),
    (["model.weights=/nowhere/weights.h5"], "model.weights=/nowhere/weights.h5: "),
    (["model.backbone=MobileNetV7"], "model.backbone=MobileNetV7: "),
    (["warm_start=/nowhere/run"], "warm_start=/nowhere/run: "),
    (["phases.head.thaw=from_block:block_99"], "thaw=from_block:block_99: "),
    (["phases.second.thaw=last_blocks:99", "phases.second.epochs=1"], "phases.second"),
    (["data.validation_fraction=0"], "data.validation_fraction"),
    (["training.batch_size=7", "runtime.replicas=2"], "training.batch_size"),
]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [QUICK_MISTAKE, *(pytest.param(*mistake, marks=pytest.mark.slow) for mistake in SLOW_MISTAKES)],
)
def test_mistakes_end_with_2_and_the_key(photos: Path, tmp_path: Path, overrides: list[str], text: str) -> None:
    error = train(*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}", *overrides, code=2).stderr
    assert text in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_run_that_has_diverged_ends_with_2_and_exports_nothing(photos: Path, tmp_path: Path) -> None:
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}"]
    error = train(*arguments, "phases.head.optimizer.learning_rate=1e6", code=2).stderr
    assert re.search(
        r"error: the (validation )?loss is [\d,]+ at step \d+ \(phase head, epoch 1\): at most 208 is", error
    )
    assert "lower phases.head.optimizer.learning_rate" in error
    assert not (tmp_path / "run" / "export").exists()
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
def test_a_batch_larger_than_the_data_is_an_epoch_and_is_logged(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={run}", "training.batch_size=5000"]
    result = train(*arguments)
    count = int(re.search(r"classes, (\d+) train", result.stdout)[1])
    assert f"training.batch_size=5000 is more than the {count} examples: a batch has {count}" in result.stderr
    assert "phase head: 1 steps (1 epochs)" in result.stdout
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["batch_size"] == 5000
    train(*arguments)  # the same command: finished already
    scored = json.loads((run / "report" / "report.json").read_text())["test"]["n"]
    assert f"n = {scored})" in program("evaluate", f"run={run}").stdout


@pytest.mark.slow
def test_a_full_disk_ends_with_75_and_the_run_resumes_later(photos: Path, tmp_path: Path) -> None:
    """Limit files to 1 MB: writing the first checkpoint fails as on a full disk."""
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}"]
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "limited", sys.executable, "-m", "trainer", *arguments]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 75, result.stderr
    for text in ("interrupted:", "File too large", "intact", f"output_dir={tmp_path / 'run'}"):
        assert text in result.stderr
    train(*arguments)


@pytest.mark.slow
def test_other_data_under_a_run_is_rejected(photos: Path, tmp_path: Path) -> None:
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}"]
    train(*arguments, "debug.max_steps=1")
    Image.new("RGB", (60, 80)).save(photos / "dark" / "extra.jpg")
    assert "fingerprint" in train(*arguments, "debug.max_steps=2", code=2).stderr
