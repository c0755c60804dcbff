"""Every figure is drawn, holds something, and fits a screen: for few and for many classes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.examples import make_history, make_phases, make_result
from trainer.report.figures import (
    RIGHT,
    WRONG,
    draw_augmentation,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_f1,
    draw_most_wrong,
    draw_predictions,
    draw_samples,
    find_most_wrong,
    label,
)

Fetch = Callable[[Sequence[int]], np.ndarray]


def ink(path: Path) -> float:
    """The share of pixels that are not white; checks that the size fits a screen."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert 400 <= pixels.shape[1] <= 1400
    assert 100 <= pixels.shape[0] <= 2000
    return float((pixels < 250).any(axis=-1).mean())


def holds(path: Path, colour: str) -> bool:
    """Whether at least 50 pixels have just this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(axis=-1).sum()) >= 50


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (3, 4), (30, 40), (2, 1, 2, 1, 3)])
def test_curves(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    history = make_history(*lengths)
    assert ink(draw_curves(tmp_path / "curves.png", history, make_phases(history))) > 0.01


def test_curves_mark_the_start_of_later_phases(tmp_path: Path) -> None:
    one, two = make_history(6), make_history(3, 3)
    pixels = [
        np.asarray(Image.open(draw_curves(tmp_path / f"{len(h)}.png", h)).convert("L")).astype(int) for h in (one, two)
    ]
    columns = (np.abs(pixels[0] - pixels[1]) > 60).sum(axis=0)
    line = int(columns.argmax())
    assert columns[line] > 200  # a dashed line from top to bottom
    assert 0.4 < line / len(columns) < 0.7  # between epochs 3 and 4 of 6


def test_curves_without_validation(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [row | {"val_loss": None, "val_accuracy": float("nan")} for row in make_history(2)]
    assert ink(draw_curves(tmp_path / "curves.png", history)) > 0.01


@pytest.mark.parametrize("classes", [3, 20, 120])
@pytest.mark.parametrize("right", [True, False])
def test_figures_of_scores(tmp_path: Path, classes: int, right: bool) -> None:
    result = make_result(classes, 4 * classes, right=right, empty=(2,))
    scores: dict[str, Any] = result.metrics
    assert ink(draw_confusion(tmp_path / "confusion.png", scores["confusion"], result.class_names)) > 0.02
    assert ink(draw_f1(tmp_path / "f1.png", scores["per_class"], scores["macro_f1"])) > 0.02
    path = draw_calibration(tmp_path / "calibration.png", scores["calibration_bins"], scores["calibration_error"])
    assert ink(path) > 0.02


def test_f1_of_more_classes_than_fit(tmp_path: Path) -> None:
    scores: dict[str, Any] = make_result(300, 900).metrics
    assert ink(draw_f1(tmp_path / "f1.png", scores["per_class"], scores["macro_f1"])) > 0.02


@pytest.mark.parametrize("classes", [3, 120])
@pytest.mark.parametrize("n", [2, 200])
def test_galleries_of_predictions(tmp_path: Path, pictures: Fetch, classes: int, n: int) -> None:
    result = make_result(classes, n)
    assert ink(draw_predictions(tmp_path / "predictions.png", result, pictures, 42)) > 0.3
    path = draw_most_wrong(tmp_path / "most_wrong.png", result, pictures)
    if find_most_wrong(result):
        assert ink(path) > 0.3
        assert holds(path, WRONG)
        assert not holds(path, RIGHT)


def test_right_is_green_and_no_mistake_is_said_so(tmp_path: Path, pictures: Fetch) -> None:
    result = make_result(3, 20, right=True)
    path = draw_predictions(tmp_path / "predictions.png", result, pictures, 42)
    assert holds(path, RIGHT)
    assert not holds(path, WRONG)
    assert find_most_wrong(result) == []
    assert ink(draw_most_wrong(tmp_path / "most_wrong.png", result, pictures)) > 0.002


def test_the_random_predictions_are_nine_different_ones_and_follow_the_seed(tmp_path: Path, pictures: Fetch) -> None:
    asked: list[list[int]] = []

    def fetch(indices: Sequence[int]) -> np.ndarray:
        asked.append(list(indices))
        return pictures(indices)

    result = make_result(3, 50)
    paths = [draw_predictions(tmp_path / f"{k}.png", result, fetch, seed) for k, seed in enumerate((1, 1, 2))]
    assert len(set(asked[0])) == 9
    assert asked[0] == asked[1] != asked[2]
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_the_most_wrong_are_the_surest_mistakes_in_order() -> None:
    result = make_result(5, 300)
    found = find_most_wrong(result)
    surest = result.probabilities.max(axis=1)
    wrong = np.flatnonzero(result.probabilities.argmax(axis=1) != result.labels)
    assert len(found) == 12
    assert set(found) <= set(wrong.tolist())
    assert [surest[i] for i in found] == sorted((surest[i] for i in wrong), reverse=True)[:12]


@pytest.mark.parametrize("side", [8, 48, 200])
@pytest.mark.parametrize("count", [1, 18])
def test_samples_and_augmentation(tmp_path: Path, side: int, count: int) -> None:
    images = np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    assert ink(draw_samples(tmp_path / "samples.png", images, ["class"] * count)) > 0.2
    assert ink(draw_augmentation(tmp_path / "augmentation.png", images[0], images)) > 0.2


def test_small_pictures_are_enlarged_without_blur(tmp_path: Path) -> None:
    board = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    pixels = np.asarray(Image.open(draw_samples(tmp_path / "samples.png", board, ["a"])).convert("L"))
    inside = pixels[120:-60, 200:-200]
    assert np.isin(inside, (0, 255)).mean() > 0.99


def test_names_become_plain_short_text() -> None:
    assert label("$x$") == r"\$x\$"
    assert label("a\nb") == r"a\nb"
    assert label("x" * 20 + "y" * 20, 11) == "x" * 5 + "…" + "y" * 5
    assert label("bad \udcff") == r"bad \udcff"


def test_drawing_touches_neither_pyplot_nor_tensorflow() -> None:
    code = "import sys, trainer.report.write; print(sorted({'matplotlib.pyplot', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
