"""What a user gets wrong, and what a machine does: one sentence, the documented exit code, nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.running import ROOT, run

QUICK = (
    "data=image_folder", "model=glyphs_mobilenet_v2", "training.batch_size=8", "phases.head.epochs=1",
    "~phases.fine_tune", "export.formats=[saved_model]",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 15 small JPEGs: dark and light."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for name, low in (("dark", 0), ("light", 150)):
        (root / name).mkdir()
        for i in range(15):
            pixels = rng.integers(low, low + 100, (60, 80, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.jpg")
    return root


@pytest.fixture
def damaged(photos: Path) -> Path:
    """The same with one photo cut off in the middle; it is restored afterwards."""
    victim = photos / "light" / "07.jpg"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    yield photos
    victim.write_bytes(whole)


@pytest.mark.slow
def test_a_damaged_photo_is_named(damaged: Path, tmp_path: Path) -> None:
    result = run(*QUICK, f"data.root={damaged}", f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 2
    assert "error: cannot decode" in result.stderr
    assert "light/07.jpg" in result.stderr
    assert "repair or remove it, or set data.on_error=skip" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_damaged_photo_can_be_skipped_and_is_counted(damaged: Path, tmp_path: Path) -> None:
    result = run(*QUICK, f"data.root={damaged}", "data.on_error=skip", f"output_dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert "skipped " in result.stdout
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert len(report["data"]["undecodable"]) == 1
    assert "light/07.jpg" in report["data"]["undecodable"][0]


MISTAKES = [
    (["training.class_weights={grey:2}"], "training.class_weights names grey; the classes are dark, light"),
]
MORE_MISTAKES = [
    (["data.root=/nowhere/photos"], "/nowhere/photos"),
    (["model.weights=/nowhere/weights.h5"], "/nowhere/weights.h5"),
    (["model.backbone=MobileNetV7"], "MobileNetV"),
    (["warm_start=/nowhere/run"], "warm_start=/nowhere/run: there is no checkpoint; give the output_dir of a run"),
    (["phases.head.thaw=from_block:block_99"], "has no such block"),
    (["phases.second.thaw=last_blocks:99", "phases.second.epochs=1"], "phases.second: thaw=last_blocks:99: "),
    (["data.validation_fraction=0"], "there is nothing to validate on: set data.validation_fraction"),
    (["training.batch_size=7", "runtime.replicas=2"], "training.batch_size: 7 cannot be shared evenly by 2 replicas"),
]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [*MISTAKES, *(pytest.param(*mistake, marks=pytest.mark.slow) for mistake in MORE_MISTAKES)],
)
def test_mistakes_end_with_2_and_a_sentence(photos: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    result = run(*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}", *overrides)
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_full_disk_ends_with_75_and_the_run_goes_on_later(photos: Path, tmp_path: Path) -> None:
    """No file may grow beyond 1 MB: the first checkpoint does not fit, as on a full disk."""
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}"]
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "limited", sys.executable, "-m", "trainer", *arguments]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 75, result.stderr
    assert "interrupted:" in result.stderr
    assert "File too large; what was saved before is intact" in result.stderr
    assert run(*arguments).returncode == 0


@pytest.mark.slow
def test_other_data_under_a_run_is_refused(photos: Path, tmp_path: Path) -> None:
    arguments = [*QUICK, f"data.root={photos}", f"output_dir={tmp_path / 'run'}"]
    assert run(*arguments, "debug.max_steps=1").returncode == 0
    extra = photos / "dark" / "extra.jpg"
    Image.new("RGB", (60, 80)).save(extra)
    try:
        result = run(*arguments, "debug.max_steps=2")
    finally:
        extra.unlink()
    assert result.returncode == 2
    assert "was trained on other data (fingerprint" in result.stderr
