"""A start that is refused leaves the folder of a run as it was, and the corrected command continues."""

import shutil
from pathlib import Path

import pytest

from tests.e2e.running import train
from tests.e2e.test_bad_input import QUICK
from trainer.models.weights import GLYPHS_WEIGHTS

pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder by name, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_mistake_before_the_first_start(photos: Path, tmp_path: Path) -> None:
    command = [*QUICK, f"output_dir={tmp_path / 'run'}", "debug.max_steps=1", "export.formats=[]"]
    assert "data.root=/typo" in train(*command, "data.root=/typo", "seed=7", code=2).stderr
    assert not (tmp_path / "run").exists()
    train(*command, f"data.root={photos}")


@pytest.mark.timeout(1200)
def test_mistakes_in_a_start_on_a_finished_run(photos: Path, tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    command = [*QUICK, f"data.root={photos}", "export.formats=[]"]
    train(*command, f"output_dir={teacher}", "debug.max_steps=2")
    student = [*command, "augmentation=light", f"distillation.teacher={teacher}", f"output_dir={run}"]
    train(*student)
    finished = contents(run)
    assert "DONE" in finished

    def refused(text: str, *overrides: str) -> None:
        assert text in train(*student, *overrides, code=2).stderr
        assert contents(run) == finished

    refused("/typo", "data.root=/typo")
    refused("seed: 42 -> 5", "seed=5")
    refused("/typo.h5", "model.weights=/typo.h5", "phases.head.epochs=2")
    weights = next((teacher / "checkpoints").glob("step-*/variables.npz"))
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-100] + bytes(100))
    refused("variables.npz does not match its size or checksum", "phases.head.epochs=2")
    assert "finished already" in train(*student).stdout  # the first command is accepted as before
    weights.write_bytes(intact)
    train(*student, "phases.head.epochs=2")


@pytest.mark.timeout(1200)
def test_a_run_that_resumes_needs_neither_its_weights_file_nor_its_warm_start(photos: Path, tmp_path: Path) -> None:
    earlier, run, weights = tmp_path / "earlier", tmp_path / "run", tmp_path / "backbone.weights.h5"
    shutil.copy(GLYPHS_WEIGHTS, weights)
    command = [*QUICK, f"data.root={photos}", f"model.weights={weights}", "export.formats=[]"]
    train(*command, "debug.max_steps=1", f"output_dir={earlier}")
    command += [f"output_dir={run}"]
    train(*command, f"warm_start={earlier}", "debug.max_steps=1")
    shutil.move(earlier, tmp_path / "moved")
    weights.unlink()
    output = train(*command, f"warm_start={tmp_path / 'moved'}", "debug.max_steps=2").stdout
    assert "weights: this run's checkpoint at step 1" in output
    assert f"warm_start: {earlier} -> {tmp_path / 'moved'}: not read, the weights are those of the checkpoint" in output
    assert "does not exist" in train(*command[:-1], f"output_dir={tmp_path / 'other'}", code=2).stderr
