"""A whole run on data of nasty names: prepared, trained, evaluated, exported, compared and served."""

import csv
import json
import os
from pathlib import Path

import pytest

from tests.data.images import noise
from tests.data.test_names import fill
from tests.e2e.running import program, train
from tests.nasty import file_names, mixed_names
from tests.serving.running import Served
from trainer.config.typed import quote_if_needed
from trainer.evaluation.predictions import decode_cell
from trainer.names import normalize_class_name

SEED = 5
TINY = (
    "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35", "model.image_size=32", "debug=fast",
    "export.formats=[saved_model]", "data=image_folder",
)  # fmt: skip


def tree_of(folder: Path) -> set[str]:
    return {os.path.relpath(Path(parent) / name, folder) for parent, _, names in os.walk(folder) for name in names}


def of_one_part(name: str) -> str:
    """A name of a run, which has to be UTF-8."""
    return name.encode(errors="ignore").decode()[:80]


def posted(served: Served, name: str, image: bytes) -> list[str]:
    """The classes of an image with this file name, as a browser posts it."""
    shown = os.fsencode(name)
    for character, code in ((b'"', b"%22"), (b"\r", b"%0D"), (b"\n", b"%0A")):
        shown = shown.replace(character, code)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + shown + b'"\r\n\r\n'
    body, kind = head + image + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    response = served.client.post("/predict", content=body, headers=kind, params={"top_k": 99})
    assert response.status_code == 200, response.text
    (entry,) = response.json()["predictions"]
    return [each["class"] for each in entry["classes"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_with_nasty_names(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    for name in mixed_names(SEED, 16):
        folders.setdefault(normalize_class_name(name), name)
    files = [os.fsdecode(os.fsencode(name)[:251]) + ".jpg" for name in mixed_names(SEED + 1, 8)]
    fill(tmp_path / "photos [2024]", list(folders.values()), files)
    before, home = tree_of(tmp_path), tmp_path / "work"
    home.mkdir()
    cache = f"runtime.cache_dir={tmp_path}/cache"
    photos = f"data.root={tmp_path}/photos [2024]"
    run_name, title = map(of_one_part, file_names(SEED + 2, 30)[-2:])
    output = [
        f"{key}={quote_if_needed(text)}" for key, text in (("output_dir", f"./{run_name}"), ("experiment_name", title))
    ]
    train(*TINY, photos, *output, cache, cwd=home)
    run, address, names = home / run_name, f"run=./{run_name}", sorted(folders)
    assert (run / "export" / "labels.txt").read_text("utf-8").split("\n")[:-1] == names
    assert json.loads((run / "report" / "report.json").read_text("utf-8"))["data"]["class_names"] == names
    rows = list(csv.DictReader((run / "report" / "predictions.csv").read_text("utf-8").splitlines()))
    assert {decode_cell(row["truth"]) for row in rows} <= set(names)
    for file in ("report/index.html", "report/predictions.csv", "export/model_card.md", "config.yaml", "run.json"):
        (run / file).read_bytes().decode()

    program("prepare", "data=image_folder", photos, "output=prepared [2024]", cache, cwd=home)
    program("evaluate", address, "data=tfds", f"data.root={home}/prepared [2024]", "split=train", cwd=home)
    evaluated = next((run / "evaluations").iterdir())
    assert json.loads((evaluated / "report.json").read_text("utf-8"))["data"]["class_names"] == names
    program("evaluate", address, photos, "split=validation", "output=again", cwd=home)
    program("compare", f"./{run_name}", "again", "output=comparison.html", cwd=home)
    program("export", address, "formats=[keras]", "output=exported", cwd=home)
    assert (home / "exported" / "labels.txt").read_text("utf-8").split("\n")[:-1] == names
    with Served(f"model={run}", f"cache_dir={tmp_path}/cache") as served:
        served.ready()
        for name in files:
            assert sorted(posted(served, name, noise(1))) == names
    assert {path.split("/")[0] for path in tree_of(tmp_path) - before} == {"work", "cache"}
    assert set(os.listdir(home)) == {run_name, "prepared [2024]", "again", "comparison.html", "exported"}
