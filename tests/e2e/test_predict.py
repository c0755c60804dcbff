"""`python -m trainer.predict` on a run: the probabilities of an evaluation, and kills."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.running import ROOT, program, train
from trainer.errors import INTERRUPTED, UNREADABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos of other sizes than the network's, cropped and some turned by EXIF."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(1)
    for name, low in (("dark", 0), ("light <b>", 100)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(24):
            image = Image.fromarray(rng.integers(low, low + 130, (6, 9, 3)).astype(np.uint8)).resize((90, 60 + i))
            exif = Image.Exif()
            exif[0x0112] = i % 9 or 1
            image.save(folder / "photos" / name / f"{i:02d}.jpg", exif=exif)
    train("data=image_folder", f"data.root={folder / 'photos'}", "model=glyphs_mobilenet_v2", "model.resize=crop",
          "training.batch_size=8", "phases.head.epochs=2", "phases.fine_tune.epochs=1",
          "data.test_fraction=0.25", "export.formats=[saved_model]", f"output_dir={folder / 'run'}")  # fmt: skip
    return folder / "run"


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_probabilities_are_those_of_an_evaluation(trained: Path, tmp_path: Path) -> None:
    photos = trained.parent / "photos"
    program("evaluate", f"run={trained}", f"data.root={photos}", "data.validation_fraction=0", "data.test_fraction=0",
            f"output={tmp_path / 'scored'}")  # fmt: skip
    done = program("predict", f"run={trained}", f"images={photos}", "tta=flip", f"output={tmp_path / 'flipped'}")
    assert "tta=flip on 12 test examples of the run" in done.stdout
    program("predict", f"run={trained}", f"images={photos}", f"output={tmp_path / 'predicted'}")
    program("predict", f"export={trained}", f"images={photos}", f"output={tmp_path / 'exported'}")
    truth = {row["file"]: row["index"] for row in table(tmp_path / "scored")}
    rows = table(tmp_path / "predicted")
    order = [int(truth[row["file"]]) for row in rows]
    assert sorted(order) == list(range(48))
    scored, predicted, flipped, exported = (
        np.load(tmp_path / name / "probabilities.npy") for name in ("scored", "predicted", "flipped", "exported")
    )
    assert predicted.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(predicted, scored[order], rtol=0, atol=1e-6)
    np.testing.assert_allclose(exported, predicted, rtol=0, atol=1e-5)
    assert np.abs(flipped - predicted).max() > 1e-6
    distances = [[float(row["distance"]) for row in table(tmp_path / name)] for name in ("predicted", "exported")]
    np.testing.assert_allclose(*distances, rtol=1e-3)
    print(f"largest difference from the evaluation: {np.abs(predicted - scored[order]).max():.2g}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_prediction_continues_with_the_same_bits(
    number: signal.Signals, trained: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    small, rng = sorted((trained.parent / "photos").rglob("*.jpg")), np.random.default_rng(2)
    large = tmp_path / "large.jpg"  # slow, so that the second part takes long enough
    Image.fromarray(rng.integers(0, 256, (3000, 4000, 3)).astype(np.uint8)).save(large)
    for i in range(900):
        (images / f"{i:04d}.jpg").symlink_to(small[i % len(small)] if i < 512 or i % 2 else large)
    (images / "0100 corrupt.jpg").write_bytes(b"\xff\xd8\xff")
    arguments = (f"run={trained}", f"images={images}")
    program("predict", *arguments, f"output={tmp_path / 'calm'}", code=UNREADABLE)
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "trainer.predict", *arguments, f"output={output}"]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stderr=subprocess.PIPE)
    while not list(output.glob(".parts-*/000000.npz")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    child.communicate()
    assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else INTERRUPTED)
    assert not (output / "predictions.csv").exists()
    again = program("predict", *arguments, f"output={output}", code=UNREADABLE)
    assert "resuming after 512 of 901 images" in again.stdout
    for name in ("predictions.csv", "probabilities.npy"):
        assert (output / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in (tmp_path / "calm").iterdir())
