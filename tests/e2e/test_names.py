"""A whole run on data of nasty names: prepared, trained, evaluated, exported, compared and served."""

import csv
import json
import os
from pathlib import Path

import pytest

from tests.data.test_names import fill, image_names
from tests.e2e.running import ROOT, program, train
from tests.nasty import file_names
from trainer.evaluation.predictions import decode_cell
from trainer.names import normalize_class_name
from trainer.serving.export_files import find_export

TINY = (
    "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35", "model.image_size=32", "debug=fast",
    "export.formats=[saved_model,tflite]", "data=image_folder", "experiment_name='../../=1+1 `x` | <b>\\n'",
)  # fmt: skip


def tree_of(folder: Path) -> set[str]:
    return {os.path.relpath(Path(parent) / name, folder) for parent, _, names in os.walk(folder) for name in names}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_with_nasty_names(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    for name in file_names(5, 16):
        folders.setdefault(normalize_class_name(name), name)
    fill(tmp_path / "photos [2024]", list(folders.values()), image_names(6, 8))
    before, home = tree_of(tmp_path), tmp_path / "work"
    home.mkdir()
    cache = f"runtime.cache_dir={tmp_path}/cache"
    photos = f"'{tmp_path}/photos [2024]'"
    train(*TINY, f"data.root={photos}", "output_dir=run", cache, cwd=home)
    run, names = home / "run", sorted(folders)
    assert (run / "export" / "labels.txt").read_text("utf-8").split("\n")[:-1] == names
    assert find_export(str(run), tmp_path, pytest.fail).classes == tuple(names)
    assert json.loads((run / "report" / "report.json").read_text("utf-8"))["data"]["class_names"] == names
    rows = list(csv.DictReader((run / "report" / "predictions.csv").read_text("utf-8").splitlines()))
    assert {decode_cell(row["truth"]) for row in rows} <= set(names)
    for file in ("report/index.html", "report/predictions.csv", "export/model_card.md", "config.yaml", "run.json"):
        (run / file).read_bytes().decode()

    program("prepare", "data=image_folder", f"data.root={photos}", "output=prepared [2024]", cache, cwd=home)
    root = f"data.root='{home}/prepared [2024]'"
    program("evaluate", "run=run", "data=tfds", root, "split=train", cwd=home)
    evaluated = next((run / "evaluations").iterdir())
    assert json.loads((evaluated / "report.json").read_text("utf-8"))["data"]["class_names"] == names
    program("evaluate", "run=run", f"data.root={photos}", "split=validation", "output=again", cwd=home)
    program("compare", "run", "again", "output=comparison.html", cwd=home)
    assert {path.split("/")[0] for path in tree_of(tmp_path) - before} == {"work", "cache"}
    assert set(os.listdir(home)) == {"run", "prepared [2024]", "again", "comparison.html"}
    assert not (ROOT / "outputs" / "=1+1").exists()
