"""A whole run on data of nasty names: prepared, trained, evaluated, exported, compared and served."""

import csv
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import pytest

from tests.data.images import encode_noise
from tests.data.test_names import fill_classes
from tests.e2e.running import ROOT, program, train
from tests.nasty import file_names, mixed_names
from tests.serving.running import Served
from tests.storage.emulator import running
from tests.storage.test_foreign_names import put
from trainer.config.typed import quote_if_needed
from trainer.errors import DONE, DRIFTED
from trainer.names import decode_cell, normalize_class_name
from trainer.storage.path import storage_path

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


def measured(*arguments: str, cwd: Path) -> None:
    """Measure the drift of a few predictions: stable or shifted."""
    command = [sys.executable, "-m", "trainer.drift", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode in (DONE, DRIFTED), ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_with_nasty_names(tmp_path: Path) -> None:
    folders: dict[str, str] = {}
    for name in mixed_names(SEED, 16):
        folders.setdefault(normalize_class_name(name), name)
    files = [os.fsdecode(os.fsencode(name)[:251]) + ".jpg" for name in mixed_names(SEED + 1, 8)]
    fill_classes(tmp_path / "photos [2024]", list(folders.values()), files)
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
    log, figure = (f"{of_one_part(name)[:60]}{end}" for name, end in zip(files[-2:], (".jsonl", ".png"), strict=True))
    with Served(f"model={run}", f"cache_dir={tmp_path}/cache", f"log={home}/{log}") as served:
        served.ready()
        for name in files:
            assert sorted(posted(served, name, encode_noise(1))) == names
    measured(f"reference=./{run_name}", f"log=./{log}", f"output=./{figure}", cwd=home)
    assert {path.split("/")[0] for path in tree_of(tmp_path) - before} == {"work", "cache"}
    written = {run_name, "prepared [2024]", "again", "comparison.html", "exported", log, figure}
    assert set(os.listdir(home)) == written


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_with_nasty_names(tmp_path: Path) -> None:
    """Names of objects are UTF-8 without line breaks; some lead out of their folder, or could not be files."""

    def of_object(name: str) -> str:
        return name.encode(errors="ignore").decode().replace("\r", "").replace("\n", "")

    folders: dict[str, str] = {}
    for name in filter(lambda name: name.strip(". "), map(of_object, mixed_names(SEED + 3, 10))):
        folders.setdefault(normalize_class_name(name), name)
    files = [f"{number}{of_object(name)[:60]}.jpg" for number, name in enumerate(mixed_names(SEED + 4, 8))]
    root, run = "gs://bucket/photos [2024]", f"gs://bucket/{of_one_part(of_object(file_names(SEED + 5, 31)[-1]))}"
    evil = [f"/kubetune-{os.getpid()}/x.jpg", "../x.jpg", "../../../x.jpg", f"{next(iter(folders.values()))}//x.jpg"]
    home = tmp_path / "work"
    home.mkdir()
    with running(tmp_path / "unused", backend="memory"):
        folder = storage_path(root)
        for name in evil:
            put(folder, name, b"x")
        for number, (name, file) in enumerate(product(folders.values(), files)):
            put(folder, f"{name}/{file}", encode_noise(number))
        output, names = f"output_dir={quote_if_needed(run)}", sorted(folders)
        cache = f"runtime.cache_dir={tmp_path}/cache"
        out = train(*TINY, f"data.root={root}", output, cache, cwd=home).stdout
        assert f"{len(evil)} objects cannot be files and are left out" in out
        assert (storage_path(run) / "export" / "labels.txt").read().decode().split("\n")[:-1] == names
        rows = list(csv.DictReader((storage_path(run) / "report" / "predictions.csv").read().decode().splitlines()))
        assert {decode_cell(row["truth"]) for row in rows} <= set(names)
        assert all(decode_cell(row["file"]).startswith(f"{root}/") for row in rows)
        program("evaluate", f"run={run}", f"data.root={root}", "split=validation", "output=again", cache, cwd=home)
        line = {"time": datetime.now(UTC).isoformat(), "class": names[0], "confidence": 1.0}
        line["probabilities"] = {name: float(name == names[0]) for name in names}
        (storage_path(run) / "log.jsonl").write(f"{json.dumps(line)}\n" * 50)
        measured(f"reference={run}", f"log={run}/log.jsonl", f"output={run}/drift.png", cwd=home)
        assert (storage_path(run) / "drift.png").read().startswith(b"\x89PNG")
    assert set(os.listdir(home)) == {"again"}
    assert set(os.listdir(tmp_path)) <= {"work", "cache", "unused"}
    assert not Path(f"/kubetune-{os.getpid()}").exists()
