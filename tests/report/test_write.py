"""The report: the content of report.json, and a page that is safe and self-contained."""

import csv
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.evaluation.examples import HOSTILE, fetch, make_history, make_phases, make_result
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.report.figures import INK, Line, draw_line_chart, to_svg
from trainer.report.page import CATEGORY_COLORS, ReportImages, TrainingSamples
from trainer.report.write import VALIDATION_NOTE, describe_data, write_report
from trainer.runs import clock
from trainer.types import Dataset, EvaluationResult, Split

EXPORTED = {
    "path": "export/saved_model/1", "bytes": 4_858_377, "examples": 60, "accuracy": 0.8167, "trainer_accuracy": 0.825,
    "lost": 2, "gained": 1, "p": 1.0, "largest_difference": 2e-6, "timing": {"milliseconds_per_image": 9.5}, "refused": False,
}  # fmt: skip
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collect tags, attributes and text, and assert that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.ids = sum(name == "id" for name, _ in self.attributes)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += re.sub("[ \n]+", " ", data).strip(" ")


def facts(result: EvaluationResult) -> dict[str, Any]:
    """Return `run` as of `write_report`."""
    splits = {"train": Split("train", np.arange(len(result.class_names), dtype=np.int32))}
    splits["test"] = Split("test", result.labels, files=result.names)
    skipped, notes = ("a<script>.jpg: truncated",), ("class 2 is rare",)
    data = Dataset("tiny", result.class_names, splits, "f00d", skipped, notes)
    return {
        "title": f"run of {HOSTILE}",
        "seed": 7,
        "data": describe_data(data) | {"undecodable": ["b&.png: not an image"]},
        "export": {"saved_model": EXPORTED},
        "config": {"data": {"source": "digits"}, "phases": {"head": {"epochs": 3}}},
        "versions": {"python": "3.11"},
        "timing": {"total_seconds": 12.5},
    }


def text_of(folder: Path) -> str:
    """Return the text of the page in a folder."""
    return Page((folder / "index.html").read_text(encoding="utf-8")).text


def write(folder: Path, result: EvaluationResult, **more: Any) -> dict[str, Any]:
    """Write a report; `more` replaces its images, its `run` or values of it."""
    history, images = make_history(2, 3), fetch(range(4))
    shown = more.pop("images", ReportImages(fetch, TrainingSamples(images, [result.class_names[0]] * 4, images)))
    run = more.pop("run", facts(result))
    report = write_report(folder, result, {"history": history, "phases": make_phases(history), **run, **more}, shown)
    jsonschema.validate(json.loads((folder / "report.json").read_text()), SCHEMA)
    return dict(report)


def test_report_json(tmp_path: Path) -> None:
    result = make_result(7, 60)
    report = write(tmp_path, result)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    test = report["test"]
    right = int((result.probabilities.argmax(axis=1) == result.labels).sum())
    assert (test["split"], test["n"], test["accuracy"]) == ("test", 60, right / 60)
    assert test["interval"] == list(compute_wilson_interval(right, 60))
    assert "note" not in test
    assert list(report["phases"]) == ["phase_0", "phase_1"]
    last = report["phases"]["phase_1"]
    assert (last["epochs"], last["seconds"], last["val_accuracy"]) == (3, 1.5, pytest.approx(0.89))
    data = report["data"]
    assert (data["counts"], sum(data["class_counts"]["test"])) == ({"train": 7, "test": 60}, 60)
    assert data["skipped"] == ["a<script>.jpg: truncated"]
    assert report["export"] == {"saved_model": EXPORTED}
    assert report["timing"]["total_seconds"] == 12.5
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {*report["figures"].values(), "report.json", "index.html", "predictions.csv", "probabilities.npy"}
    assert len(report["figures"]) == 9
    probabilities = np.load(tmp_path / "probabilities.npy", allow_pickle=False)
    assert (probabilities.dtype, probabilities.tobytes()) == (np.float32, result.probabilities.tobytes())
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["prediction"] for row in rows] == [result.class_names[i] for i in probabilities.argmax(1)]
    assert [row["epoch"] for row in report["history"]] == [1, 2, 3, 4, 5]
    low, high = test["macro_f1_interval"]
    assert low < test["macro_f1"] < high
    assert report["label_errors"]["count"] >= len(report["label_errors"]["rows"])
    assert report["duplicates"] == {}
    lines = (tmp_path / "report.json").read_text().splitlines()  # a row of the confusion matrix is one line
    assert sum(bool(re.fullmatch(r"\s+\[ (\d+, ){6}\d+ \],?", line)) for line in lines) == 7
    text = text_of(tmp_path).partition("95 % interval")[2]  # below the links to the sections
    order = ["top-5 accuracy", "Training", "precision", "Data", "Configuration", "Versions"]
    assert order == sorted(order, key=text.index)


def test_equal_inputs_give_equal_files_except_for_timing(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, make_result(3, 40)) for name in ("first", "second"))
    assert json.dumps(first | {"timing": None}) == json.dumps(second | {"timing": None})
    for file in [*first["figures"].values(), "predictions.csv", "probabilities.npy"]:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_report_on_validation_has_a_note(tmp_path: Path) -> None:
    report = write(tmp_path, replace(make_result(3, 40), split="validation"))
    assert report["test"]["split"] == "validation"
    assert report["test"]["note"] == VALIDATION_NOTE
    assert "also selected the checkpoint" in VALIDATION_NOTE
    text = text_of(tmp_path)
    assert VALIDATION_NOTE in text
    assert "validation accuracy" in text
    assert "test accuracy" not in text


def test_the_scores_of_a_teacher_have_their_interval_and_number(tmp_path: Path) -> None:
    scores = {"split": "test", "n": 1200, "accuracy": 0.9, "interval": [0.88, 0.92], "same_data": True}
    assert write(tmp_path, make_result(3, 40), teacher=scores)["teacher"] == scores
    assert (
        "teacher of this run, by its own report: test accuracy 90.00\u202f% (95 % interval 88.0\u201392.0"
        in text_of(tmp_path)
    )
    assert "1,200 examples)" in text_of(tmp_path)
    write(tmp_path, make_result(3, 40), teacher=scores | {"same_data": False, "split": HOSTILE})
    assert "1,200 examples, of other data)" in text_of(tmp_path)
    assert "teacher" not in write(tmp_path, make_result(3, 40), teacher=None)
    assert "teacher" not in text_of(tmp_path)


def test_label_errors_are_left_out_for_examples_that_the_model_was_trained_on(tmp_path: Path) -> None:
    result = replace(make_result(3, 40), split="train")
    assert write(tmp_path / "others", result)["label_errors"]["count"] > 0
    assert "Possible label errors" in text_of(tmp_path / "others")
    assert write(tmp_path / "own", result, trained_on=True)["label_errors"] == {}
    assert "Possible label errors" not in text_of(tmp_path / "own")


@pytest.mark.parametrize("classes", [3, 120])
def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path, classes: int) -> None:
    result = make_result(classes, 60, empty=(2,))
    write(tmp_path, result)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "b" not in page.tags
    assert page.tags.count("script") == 1
    assert "link" not in page.tags
    references = [value for name, value in page.attributes if name in ("src", "srcset", "action", "data")]
    assert len(references) > 30
    assert all(value.startswith("data:image/") for value in references)
    anchors = [value for name, value in page.attributes if name == "href" and not value.startswith("data:image/")]
    named = {value for name, value in page.attributes if name == "id"}
    assert anchors
    assert {value.removeprefix("#") for value in anchors} <= named
    assert page.ids == len(named)  # those of every chart too
    without_images = re.sub(r"data:image/[^'\x22]*", "", source)
    assert [outside for outside in ("http:", "https:", "url(", "@import", "xmlns") if outside in without_images] == []
    texts = [HOSTILE, "could not be read: 2 examples", "a<script>.jpg: truncated", "b&.png: not an image"]
    texts += [f"{100 * result.metrics['accuracy']:.2f}\u202f%", "phases.head.epochs"]  # type: ignore[operator]
    assert [text for text in texts if text not in page.text] == []
    assert "viewport" in [value for _, value in page.attributes]
    assert "prefers-color-scheme: dark" in source


def test_a_report_without_history_samples_or_facts(tmp_path: Path) -> None:
    result = make_result(3, 10, right=True)
    report = write(tmp_path, result, history=[], phases={}, run={}, images=ReportImages(fetch))
    assert set(report["figures"]) == {"predictions", "most_wrong", "least_sure", "confusion", "f1", "calibration"}
    assert report["phases"] == {}
    assert text_of(tmp_path)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    history = [row | {"val_loss": float("nan"), "val_accuracy": None} for row in make_history(1)]
    phases = {"phase_0": {"val_accuracy": float("nan"), "val_loss": np.float32("inf"), "best_epoch": np.int64(1)}}
    report = write(tmp_path, make_result(3, 10), history=history, phases=phases)
    phase = report["phases"]["phase_0"]
    assert (phase["val_accuracy"], phase["val_loss"], phase["best_epoch"]) == (None, None, 1)
    assert (phase["epochs"], phase["seconds"]) == (1, 0.5)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_headline_has_the_scores_after_each_phase(tmp_path: Path) -> None:
    head = {"val_accuracy": 0.5, "val_n": 100, "val_macro_f1": 0.4}
    phases = {"head": head, "rest": {"val_accuracy": 0.9, "val_n": 100}}
    report = write(tmp_path, make_result(3, 10), phases=phases)
    assert report["phases"]["rest"]["val_interval"] == list(compute_wilson_interval(90, 100))
    text = text_of(tmp_path)
    assert "validation after head: 50.00\u202f% (40.4–59.6\u202f%); rest: 90.00\u202f% (82.6–94.5\u202f%)" in text
    assert "validation after head: 0.400" in text


def test_a_phase_shows_that_its_score_is_of_the_whole_validation_split(tmp_path: Path) -> None:
    head = {"val_accuracy": 0.5, "val_n": 1000, "epoch_val_accuracy": 0.52, "epoch_val_n": 100}
    phases = {"head": head, "rest": {"val_accuracy": 0.9, "val_n": 1000}}
    report = write(tmp_path, make_result(3, 10), phases=phases)
    assert report["phases"]["head"]["val_interval"] == list(compute_wilson_interval(500, 1000))
    text = text_of(tmp_path)
    assert text.count("whole split; after its best epoch 52.00\u202f% of 100") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_phase_that_retained_earlier_weights_shows_its_own_score(tmp_path: Path) -> None:
    history = make_history(2, 3)
    phases = make_phases(history)
    first = phases["phase_0"] | {"val_n": 100}
    same = {"val_accuracy": first["val_accuracy"], "val_loss": first["val_loss"], "val_n": 100}
    phases["phase_1"] |= same | {"kept_from": "phase_0", "own_val_accuracy": 0.7}
    write(tmp_path, make_result(3, 40), history=history, phases=phases | {"phase_0": first})
    text = text_of(tmp_path)
    assert "phase_0: 74.00\u202f% (64.6–81.6\u202f%); phase_1: 74.00\u202f% (weights of phase_0)" in text
    assert "70.00\u202f%retained the weights of phase_0–" in text  # the row of the phase, without a loss


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, "saved_modelexport/saved_model/14.8681.67\u202f%212e-069.50"),
        ({"refused": True}, "saved_modeldeleted: it lost too much accuracy4.86"),
        ({"largest_difference": None}, "21–9.50"),
    ],
)
def test_each_export_is_a_row(tmp_path: Path, changes: dict[str, Any], row: str) -> None:
    result = make_result(3, 40)
    write(tmp_path, result, run=facts(result) | {"export": {"saved_model": EXPORTED | changes}})
    text = text_of(tmp_path)
    assert row in text
    assert "scored on 60 examples; the accuracy of the trainer on them is 82.50\u202f%" in text


def test_every_category_of_time_has_its_own_colour() -> None:
    assert set(clock.CATEGORIES) <= set(CATEGORY_COLORS)
    assert len({colour for _, colour in CATEGORY_COLORS.values()}) == len(CATEGORY_COLORS)


def test_ticks_of_a_learning_rate_are_its_values() -> None:
    chart = draw_line_chart("Learning rate", [Line("learning rate", INK, [1, 2], [1e-3, 1e-5])])
    assert chart
    drawn = to_svg("rate", chart)
    assert [tick for tick in ("0", "2.5e-4", "5e-4", "7.5e-4", "1e-3") if f">{tick}</text>" not in drawn] == []


@pytest.mark.parametrize("examples", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_thousand_classes_and_many_examples_stay_a_page(tmp_path: Path, examples: int) -> None:
    """The size is bounded by images and classes, not by the number of examples."""

    def large(indices: Sequence[int]) -> np.ndarray:
        return np.stack([np.random.default_rng(i).integers(0, 256, (224, 224, 3), dtype=np.uint8) for i in indices])

    result = make_result(1000, examples)
    began = time.process_time()
    write(tmp_path, result, images=ReportImages(large))
    spent, size = time.process_time() - began, (tmp_path / "index.html").stat().st_size
    print(f"1,000 classes x {examples:,} examples: {spent:.0f} s of CPU time, {size / 1e6:.1f} MB")
    assert size < 8e6
    assert spent < 300
