"""Comparison of runs: common examples, verdicts, and what is refused."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.cli.verbs import exit_code_of
from tests.errors import raises
from tests.evaluation.examples import make_history
from tests.report.test_write import Page
from tests.waiting import PATIENCE
from trainer.compare import main
from trainer.data.records import frame_record, serialize_example
from trainer.errors import DataError
from trainer.evaluation.metrics import score_predictions
from trainer.evaluation.predictions import write_predictions
from trainer.report.compare import (
    _read_image,
    compare_configurations,
    compare_runs,
    describe_outcome,
    make_distinct_names,
    read_scored_run,
    write_comparison,
)

ROOT = Path(__file__).parents[2]
CLASSES = ("<b>cat", "dog", "owl")


def make_run(folder: Path, accuracy: float, n: int = 300, root: str = "photos", **config: Any) -> Path:
    """Write the files of a run with that accuracy that a comparison reads; the truths are always equal."""
    labels = np.random.default_rng(0).integers(0, 3, n).astype(np.int32)
    correct = np.random.default_rng([7, int(100 * accuracy)]).random(n) < accuracy
    probabilities = np.full((n, 3), 0.1, np.float32)
    probabilities[np.arange(n), np.where(correct, labels, (labels + 1) % 3)] = 0.8
    names = [f"{root}/{CLASSES[label]}/{k}.jpg" for k, label in enumerate(labels)]
    result = score_predictions("test", CLASSES, labels, probabilities, names)
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


def photo(seed: int) -> bytes:
    """A JPEG of 120 x 80 pixels."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (80, 120, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def compared(*folders: Path) -> Any:
    return compare_runs([read_scored_run(str(folder), folder.name) for folder in folders])


def test_a_better_run_is_called_better_and_an_equal_one_is_not(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, accuracy) for name, accuracy in (("a", 0.7), ("b", 0.9), ("c", 0.71))]
    comparison = compared(*runs)
    assert len(comparison.files) == 300
    tables = [(run / "report" / "predictions.csv").read_text() for run in runs[:2]]
    rows = [list(csv.DictReader(table.splitlines())) for table in tables]
    pairs = [(x["correct"], y["correct"]) for x, y in zip(*rows, strict=True)]
    lost, won = (pairs.count(pair) for pair in (("true", "false"), ("false", "true")))
    assert (comparison.pairs[0].lost, comparison.pairs[0].won) == (lost, won)
    verdicts = [describe_outcome(pair, p) for pair, p in zip(comparison.pairs, comparison.p, strict=True)]
    assert verdicts == ["better", "no significant difference"]
    assert comparison.p[0] >= comparison.pairs[0].p
    swapped = compared(runs[1], runs[0])
    assert describe_outcome(swapped.pairs[0], swapped.p[0]) == "worse"


@pytest.mark.parametrize(
    ("data", "is_turned"), [({"orientation": "exif"}, True), ({"orientation": "ignore"}, False), ({}, False)]
)
def test_an_image_is_shown_as_the_run_read_it(data: dict[str, str], is_turned: bool, tmp_path: Path) -> None:
    pixels = np.zeros((120, 120, 3), np.uint8)
    pixels[:60] = 255  # on the right when it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    run = replace(read_scored_run(str(make_run(tmp_path / "a", 0.7)), "a"), config={"data": data})
    shown = re.search(r"base64,([^\"]+)", str(_read_image(run, str(tmp_path / "x.png"))))
    assert shown
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[1]))).convert("L"))
    top, right = image[: len(image) // 2].mean(), image[:, image.shape[1] // 2 :].mean()
    assert (right > 200) == is_turned
    assert (top > 200) != is_turned


def test_only_common_examples_count(tmp_path: Path) -> None:
    comparison = compared(make_run(tmp_path / "a", 0.7), make_run(tmp_path / "b", 0.9, n=200))
    assert len(comparison.files) == 200  # 200 draws of the same generator are the first 200 of 300


def test_the_same_data_below_another_root_is_recognised(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", 0.7, root="/mnt/x/photos"), make_run(tmp_path / "b", 0.9, root="other")
    comparison = compared(*runs)
    assert (len(comparison.files), describe_outcome(comparison.pairs[0], comparison.p[0])) == (300, "better")


def test_runs_of_other_classes_examples_or_truths_are_refused(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "a", 0.7), make_run(tmp_path / "b", 0.7)
    report, table = other / "report" / "report.json", other / "report" / "predictions.csv"
    content, rows = report.read_text(), table.read_text()
    names = '"class_names": ["<b>cat", "dog", "owl"]'
    report.write_text(content.replace(names, names.replace("owl", "fox")))
    with raises(DataError, problem="classes differ .*'fox'", fix="same classes"):
        compared(first, other)
    report.write_text(content)
    table.write_text(rows.replace(".jpg", ".png"))
    with raises(DataError, problem="no example was scored in all", fix="trainer.evaluate"):
        compared(first, other)
    header, line, *rest = rows.splitlines()
    index, file, truth, *cells = line.split(",")
    table.write_text("\n".join([header, ",".join([index, file, "dog" if truth == "owl" else "owl", *cells]), *rest]))
    with raises(DataError, problem=r"label of photos/.*0\.jpg is '.*' in one and '.*' in the other", fix="same labels"):
        compared(first, other)
    with raises(DataError, problem="has no report", fix="output_dir of a finished run"):
        read_scored_run(str(tmp_path / "nothing"), "nothing")
    configuration = other / "config.yaml"
    for damaged, valid in ((report, content), (configuration, configuration.read_text())):
        damaged.write_text("{")
        with raises(DataError, problem="is corrupt", fix="evaluate the run again"):
            read_scored_run(str(other), "b")
        damaged.write_text(valid)


def test_only_different_settings_are_listed(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", 0.7, training={"batch_size": 32, "ema": None}, export={"formats": ["keras", "onnx"]})
    training = {"batch_size": 64, "ema": True}
    other = make_run(tmp_path / "b", 0.7, training=training, export={"formats": ["keras"]}, extra=1)
    runs = [read_scored_run(str(folder), folder.name) for folder in (one, other)]
    assert compare_configurations(runs) == [
        ("export.formats", ["[keras,onnx]", "[keras]"]),
        ("extra", ["–", "1"]),
        ("training.batch_size", ["32", "64"]),
        ("training.ema", ["null", "true"]),
    ]


def test_a_phase_that_only_one_run_has_is_one_row(tmp_path: Path) -> None:
    head, tuned = {"thaw": "none", "epochs": 2}, {"thaw": "all", "epochs": 3}
    folders = (
        make_run(tmp_path / "a", 0.7, phases={"head": head}),
        make_run(tmp_path / "b", 0.7, phases={"head": head | {"epochs": 5}, "tuned": tuned}),
    )
    runs = [read_scored_run(str(folder), folder.name) for folder in folders]
    assert compare_configurations(runs) == [
        ("phases", ["[head]", "[head,tuned]"]),
        ("phases.head.epochs", ["2", "5"]),
    ]


@pytest.mark.parametrize("as_records", [False, True])
def test_the_page_shows_the_images_whose_prediction_changed(as_records: bool, tmp_path: Path) -> None:
    """The readable ones; all are listed."""
    photos = tmp_path / "photos"
    runs = [
        make_run(tmp_path / "a", 0.7, n=40, root=str(photos)),
        make_run(tmp_path / "b", 0.9, n=40, root=str(photos)),
    ]
    comparison = compared(*runs)
    changed = np.flatnonzero(comparison.correct[0] != comparison.correct[1])
    assert 4 < len(changed) < 24
    if as_records:
        shard = tmp_path / "s.tfrecord"
        shard.write_bytes(b"".join(frame_record(serialize_example(photo(k), 0)) for k in range(40)))
        for run in runs:
            table = run / "report" / "predictions.csv"
            table.write_text(re.sub(rf"{photos}/[^,]*/(\d+)\.jpg", rf"{shard}#\1", table.read_text()))
        comparison = compared(*runs)
    else:
        for k in changed[1:]:
            file = Path(comparison.files[k])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(photo(k))
    write_comparison(tmp_path / "compare.html", comparison)
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert text.count("<img class=") == len(changed) - (not as_records)
    assert text.count('class="files"') == len([m for m in (comparison.correct[0] > comparison.correct[1],
                                                           comparison.correct[0] < comparison.correct[1]) if m.any()])  # fmt: skip


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    comparison = compared(make_run(tmp_path / "a", 0.7), make_run(tmp_path / "b & c", 0.9, training={"ema": 0.9}))
    write_comparison(tmp_path / "compare.html", comparison)
    page = Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    pair = comparison.pairs[0]
    numbers = [f"{100 * pair.difference:+.2f}", f"{pair.p:.3g}", f"{pair.won:,} correct here, wrong in the first"]
    texts = ["b & c", "better", "training.ema", "Validation accuracy", "last minus first", "<b>cat"]
    assert [text for text in texts + numbers if text not in page.text] == []


def test_names_are_the_shortest_distinct_ends() -> None:
    assert make_distinct_names(["outputs/a", "outputs/b/"]) == ["a", "b"]
    assert make_distinct_names(["x/1/run", "y/1/run"]) == ["x/1/run", "y/1/run"]
    assert make_distinct_names(["r", "r/evaluations/last"]) == ["r", "last"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "trainer.compare", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        program, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def test_a_reader_of_the_table_that_ends_early_does_not_end_the_command(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 0.7)
    make_run(tmp_path / "b", 0.9)
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "trainer.compare", "a", "b"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, stdout=writer, stderr=-1, env=environment, check=False, text=True, cwd=tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "compare.html").is_file()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", 0.7)
    make_run(tmp_path / "b", 0.9)
    done = command("a", "b", "output=out/page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 300 common examples" in done.stdout
    assert "better" in done.stdout
    assert "tensorflow" not in done.stderr
    assert (tmp_path / "out" / "page.html").is_file()
    (tmp_path / "link").symlink_to("a")
    same = dict.fromkeys(
        (f"a {spelling}" for spelling in ("./a/", "b/../a", str(tmp_path / "a"), "link")), "at least two"
    )
    wrong = same | {"a": "at least two", "a nowhere": "nowhere has no report", "a b output=x.txt": "output=x.txt:"}
    monkeypatch.chdir(tmp_path)
    for arguments, start in wrong.items():
        assert exit_code_of(main, *arguments.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {start}")
        assert error.count("\n") == 1


@pytest.mark.parametrize("content", [{}, {"test": 3}, {"test": {"per_class": [3]}}, {"data": {}}, {"timing": None}])
def test_a_report_of_another_shape_is_damaged(tmp_path: Path, content: dict[str, Any]) -> None:
    file = make_run(tmp_path / "a", 0.8) / "report" / "report.json"
    read_scored_run(str(tmp_path / "a"), "a")
    file.write_text(json.dumps(json.loads(file.read_text()) | content if content else content))
    with raises(DataError, problem="is corrupt", fix="evaluate the run again"):
        read_scored_run(str(tmp_path / "a"), "a")
