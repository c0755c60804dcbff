"""A disk that is really full: exit code 75 and a sentence that names the folder; with space again, the same bits."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import fill, small_disk
from tests.e2e.running import ROOT, SMALL, assert_same_run, kill_at, start_until, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

QUICK = (
    *SMALL, "debug.max_examples=60", "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35",
    "model.image_size=32", "phases.fine_tune.epochs=1", "runtime.log_every='1 steps'",
)  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64m") as folder:
        yield folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "run"
    train(*QUICK, f"output_dir={folder}")
    return folder


def assert_full(error: str, folder: Path) -> None:
    assert "Traceback" not in error, error
    assert "No space left on device" in error
    assert "MB free" in error
    assert str(folder) in error


def test_a_start_and_a_restart(disk: Path, calm: Path) -> None:
    run = disk / "run"
    filler = fill(disk)
    assert_full(train(*QUICK, f"output_dir={run}", code=75).stderr, disk)
    filler.unlink()
    kill_at("head  epoch 1 done", *QUICK, f"output_dir={run}")
    filler = fill(disk)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert_full(train(*QUICK, f"output_dir={run}", code=75).stderr, disk)
    assert {path: path.read_bytes() for path in before} == before
    filler.unlink()
    train(*QUICK, f"output_dir={run}")
    assert_same_run(calm, run)


@pytest.mark.parametrize("moment", ["head  epoch 1  step 2", "exporting", "writing the report"])
def test_while_it_runs(disk: Path, calm: Path, moment: str) -> None:
    run = disk / "run"
    child, _ = start_until(moment, *QUICK, f"output_dir={run}")
    filler = fill(disk)
    error: list[str] = []
    assert child.stderr
    assert child.stdout
    reader = threading.Thread(target=lambda: error.append(child.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    child.stdout.read()
    code = child.wait()
    reader.join()
    if code != 0:  # it had written everything before the disk was full
        assert code == 75, error
        assert_full(error[0], disk)
    filler.unlink()
    train(*QUICK, f"output_dir={run}")
    assert_same_run(calm, run)


@pytest.mark.parametrize("verb", ["prepare", "export"])
def test_other_commands(disk: Path, calm: Path, verb: str) -> None:
    arguments = {
        "prepare": ["data=digits", f"output={disk / 'out'}"],
        "export": [f"run={calm}", "formats=[keras,saved_model,tflite]", f"output={disk / 'out'}"],
    }[verb]
    filler = fill(disk, leave=300_000)
    command = [sys.executable, "-m", f"trainer.{verb}", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 75, ended.stderr
    assert_full(ended.stderr, disk)
    filler.unlink()
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
