"""Runs side by side: what is shared, who is better, and what is refused."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.evaluation.examples import make_history
from tests.report.test_write import Page
from trainer.errors import DataError
from trainer.evaluation.metrics import evaluate_arrays
from trainer.evaluation.predictions import write_predictions
from trainer.report.compare import compare_runs, configuration_differences, verdict, write_comparison
from trainer.report.compare_runs import names_of, read_scored

ROOT = Path(__file__).parents[2]
CLASSES = ("<b>cat", "dog", "owl")


def make_run(folder: Path, right: float, seed: int = 0, n: int = 300, root: str = "photos", **config: Any) -> Path:
    """What a run with that accuracy leaves behind, as far as a comparison reads it; equal seeds, equal truths."""
    labels = np.random.default_rng(seed).integers(0, 3, n).astype(np.int32)
    answers = np.where(np.random.default_rng([7, int(100 * right)]).random(n) < right, labels, (labels + 1) % 3)
    probabilities = np.full((n, 3), 0.1, np.float32)
    probabilities[np.arange(n), answers] = 0.8
    names = [f"{root}/{CLASSES[label]}/{k}.jpg" for k, label in enumerate(labels)]
    result = evaluate_arrays("test", CLASSES, labels, probabilities, names)
    report = {
        "test": {"split": "test", **result.metrics},
        "data": {"class_names": list(CLASSES)},
        "history": make_history(2, 3),
        "timing": {"images_per_second": 10.0, "goodput": 0.5},
    }
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.json").write_text(json.dumps(report))
    write_predictions(folder / "report" / "predictions.csv", result)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "output_dir": str(folder), **config}))
    return folder


def compared(*folders: Path) -> Any:
    return compare_runs([read_scored(str(folder), folder.name) for folder in folders])


def test_a_better_run_is_called_better_and_an_equal_one_is_not(tmp_path: Path) -> None:
    found = compared(*(make_run(tmp_path / name, right) for name, right in (("a", 0.7), ("b", 0.9), ("c", 0.71))))
    assert len(found.files) == 300
    tables = [(tmp_path / name / "report" / "predictions.csv").read_text() for name in "ab"]
    rows = [list(csv.DictReader(table.splitlines())) for table in tables]
    lost = sum(x["correct"] == "true" and y["correct"] == "false" for x, y in zip(*rows, strict=True))
    won = sum(x["correct"] == "false" and y["correct"] == "true" for x, y in zip(*rows, strict=True))
    assert (found.pairs[0].lost, found.pairs[0].won) == (lost, won)
    assert verdict(found.pairs[0], found.p[0]) == "better"
    assert verdict(found.pairs[1], found.p[1]) == "no difference shown"
    assert found.p[0] >= found.pairs[0].p
    back = compared(tmp_path / "b", tmp_path / "a")
    assert verdict(back.pairs[0], back.p[0]) == "worse"


def test_only_what_all_were_scored_on_counts(tmp_path: Path) -> None:
    found = compared(make_run(tmp_path / "a", 0.7), make_run(tmp_path / "b", 0.9, n=200))
    # 200 draws of the same generator are the first 200 of 300
    assert len(found.files) == 200


def test_the_same_data_in_another_place_is_recognised(tmp_path: Path) -> None:
    found = compared(make_run(tmp_path / "a", 0.7, root="/mnt/x/photos"), make_run(tmp_path / "b", 0.9, root="other"))
    assert len(found.files) == 300
    assert verdict(found.pairs[0], found.p[0]) == "better"


def damage(folder: Path, **changes: Any) -> Path:
    file = folder / "report" / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", 0.7)
    other = damage(make_run(tmp_path / "classes", 0.7), data={"class_names": ["<b>cat", "dog", "fox"]})
    with pytest.raises(DataError, match="cannot be compared: they know other classes \\('fox'"):
        compared(one, other)
    others = make_run(tmp_path / "files", 0.7)
    table = others / "report" / "predictions.csv"
    table.write_text(table.read_text().replace(".jpg", ".png"))
    with pytest.raises(DataError, match="cannot be compared: no example was scored in all of them"):
        compared(one, others)
    with pytest.raises(DataError, match="holds no report"):
        read_scored(str(tmp_path / "nothing"), "nothing")
    relabelled = make_run(tmp_path / "truth", 0.7)
    table = relabelled / "report" / "predictions.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[2] = "owl" if cells[2] != "owl" else "dog"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"cannot be compared: photos/.*0\.jpg is '.*' in one and '.*' in the other"):
        compared(one, relabelled)


def test_configurations_differ_where_they_do(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", 0.7, training={"batch_size": 32, "ema": None}, export={"formats": ["keras", "onnx"]})
    training = {"batch_size": 64, "ema": True}
    other = make_run(tmp_path / "b", 0.7, training=training, export={"formats": ["keras"]}, extra=1)
    runs = [read_scored(str(folder), folder.name) for folder in (one, other)]
    assert configuration_differences(runs) == [
        ("export.formats", ["[keras,onnx]", "[keras]"]),
        ("extra", ["–", "1"]),
        ("training.batch_size", ["32", "64"]),
        ("training.ema", ["null", "true"]),
    ]


def test_the_page_stands_alone(tmp_path: Path) -> None:
    found = compared(make_run(tmp_path / "a", 0.7), make_run(tmp_path / "b & c", 0.9, training={"ema": 0.9}))
    page = Page(write_comparison(tmp_path / "compare.html", found).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    for words in ("b & c", "better", "training.ema", "Validation accuracy", "last minus first", "<b>cat"):
        assert words in page.text
    pair = found.pairs[0]
    assert f"{100 * pair.difference:+.2f}" in page.text
    assert f"{pair.p:.3g}" in page.text
    assert f"{pair.won:,} right now, wrong in the first" in page.text


def test_names_are_the_shortest_that_tell_runs_apart() -> None:
    assert names_of(["outputs/a", "outputs/b/"]) == ["a", "b"]
    assert names_of(["x/1/run", "y/1/run"]) == ["x/1/run", "y/1/run"]
    assert names_of(["r", "r/evaluations/last"]) == ["r", "last"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "trainer.compare", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.7)
    make_run(tmp_path / "b", 0.9)
    done = command("a", "b", "output=out/page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 300 shared examples" in done.stdout
    assert "better" in done.stdout
    assert "tensorflow" not in done.stderr
    assert (tmp_path / "out" / "page.html").is_file()
    for arguments, sentence in (
        (("a",), "error: name at least two runs, each once"),
        (("a", "nowhere"), "error: nowhere holds no report"),
        (("a", "b", "output=x.txt"), "error: output=x.txt: give the name of a page"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(sentence)
        assert done.stderr.count("\n") == 1
