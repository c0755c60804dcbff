"""Every figure is drawn, is not empty, and fits a screen, for few and for many classes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.examples import fetch, make_history, make_phases, make_result
from tests.processes import run_python
from trainer.report import figures
from trainer.report.page import TEMPLATES


def png(drawn: Any, path: Path) -> np.ndarray:
    """Return the saved pixels of figures or charts, uint8 [h, w, 3]."""
    parts = drawn if isinstance(drawn, list) else [drawn]
    return np.asarray(Image.open(figures.save([getattr(part, "figure", part) for part in parts], path)))


def ink(drawn: Any, folder: Path) -> float:
    """Return the fraction of pixels that are not white; asserts that the size fits a screen."""
    pixels = png(drawn, folder / "drawn.png")
    assert 400 <= pixels.shape[1] <= 1400
    assert 100 <= pixels.shape[0] <= 2000
    return float((pixels < 250).any(axis=-1).mean())


def holds(pixels: np.ndarray, colour: str) -> bool:
    """Return True if at least 50 pixels have exactly this colour."""
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum()) >= 50


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (3, 4), (30, 40), (2, 1, 2, 1, 3)])
def test_curves(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    history = make_history(*lengths)
    assert ink(figures.draw_curves(history, make_phases(history)), tmp_path) > 0.01


def test_curves_mark_the_start_of_later_phases(tmp_path: Path) -> None:
    one, two = make_history(6), make_history(3, 3)
    pixels = [png(figures.draw_curves(h, {}), tmp_path / "curves.png").astype(int).mean(axis=-1) for h in (one, two)]
    columns = (np.abs(pixels[0] - pixels[1]) > 60).sum(axis=0)
    middle = int(0.4 * len(columns))
    line = middle + int(columns[middle:].argmax())
    assert columns[line] > 200  # a dashed line through each chart
    assert line / len(columns) < 0.7  # between epochs 3 and 4 of 6


def test_the_top_5_accuracy_is_a_line_of_the_accuracy_if_there_is_one() -> None:
    def names(history: list[dict[str, Any]]) -> list[list[str]]:
        charts = [chart.figure.axes[0].lines for chart in figures.draw_curves(history, {})]
        return [
            [str(line.get_label()) for line in lines if not str(line.get_label()).startswith("_")] for lines in charts
        ]

    history = make_history(3)
    plain = [["training", "validation"], ["training", "validation"], ["learning rate"]]
    assert names(history) == plain
    assert names([row | {"val_top_5": 0.99} for row in history]) == [
        plain[0],
        [*plain[1], "validation, top 5"],
        plain[2],
    ]


def test_curves_without_validation(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [row | {"val_loss": None, "val_accuracy": float("nan")} for row in make_history(2)]
    assert ink(figures.draw_curves(history, {}), tmp_path) > 0.01


@pytest.mark.parametrize(
    ("classes", "right"), [(3, True), (3, False), (20, True), (20, False), (120, False), (300, False)]
)
def test_figures_of_scores(tmp_path: Path, classes: int, right: bool) -> None:
    result = make_result(classes, 4 * classes, right=right, empty=(2,))
    scores: dict[str, Any] = result.metrics
    assert ink(figures.draw_confusion(scores["confusion"], result.class_names), tmp_path) > 0.02
    assert ink(figures.draw_f1(scores["per_class"], scores["macro_f1"]), tmp_path) > 0.02
    assert ink(figures.draw_calibration(scores["calibration_bins"], scores["calibration_error"]), tmp_path) > 0.01


@pytest.mark.parametrize(
    ("classes", "n", "right"), [(3, 200, False), (120, 2, False), (120, 200, False), (3, 2, True), (3, 20, True)]
)
def test_galleries_of_predictions(tmp_path: Path, classes: int, n: int, right: bool) -> None:
    result = make_result(classes, n, right=right)
    random, wrong = figures.select_random(result, 42), figures.select_most_wrong(result)
    drawn = figures.draw_examples("random", result, fetch, random, show_files=False)
    assert ink(drawn, tmp_path) > 0.3
    mistakes = figures.draw_examples("wrong", result, fetch, wrong)
    assert ink(mistakes, tmp_path) > (0.3 if wrong else 0.002)  # without mistakes a line of text
    assert bool(wrong) is not right
    pixels = png(drawn if right else mistakes, tmp_path / "drawn.png")
    assert (holds(pixels, figures.RIGHT), holds(pixels, figures.WRONG)) == (right, not right)


def test_the_random_examples_are_nine_different_ones_and_follow_the_seed() -> None:
    first, again, other = (figures.select_random(make_result(3, 50), seed) for seed in (1, 1, 2))
    assert len(set(first)) == 9
    assert first == again != other


def test_the_most_wrong_are_the_mistakes_of_highest_confidence_in_order() -> None:
    result = make_result(5, 300)
    indices = figures.select_most_wrong(result)
    confidence = result.probabilities.max(axis=1)
    wrong = np.flatnonzero(result.probabilities.argmax(axis=1) != result.labels)
    assert len(indices) == 12
    assert set(indices) <= set(wrong.tolist())
    assert [confidence[i] for i in indices] == sorted((confidence[i] for i in wrong), reverse=True)[:12]


@pytest.mark.parametrize("side", [8, 48, 200])
@pytest.mark.parametrize("count", [1, 18])
def test_images_of_all_sizes(tmp_path: Path, side: int, count: int) -> None:
    images = np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    assert ink(figures.draw_images("title", images, ["class"] * count), tmp_path) > 0.2


def test_small_images_are_enlarged_without_blur(tmp_path: Path) -> None:
    board = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, axis=-1)
    pixels = png(figures.draw_images("title", board, ["a"]), tmp_path / "samples.png")
    assert np.isin(pixels[120:-60, 200:-200], (0, 255)).mean() > 0.99


def test_a_chart_of_the_page_is_text_in_the_colours_of_the_page_and_equal_inputs_give_equal_bytes() -> None:
    def drawn(name: str) -> str:
        lines = [
            figures.Line(f"<b>{i} $x$", colour, [1, 2], [0.1, None if i else 0.2])
            for i, colour in enumerate(figures.SERIES)
        ]
        starts = {"<head>": 0.5, "rest": 1.5}
        chart = figures.draw_line_chart("A & <i>", lines, fractions=True, phase_starts=starts, legend=True)
        assert chart
        return figures.to_svg(name, chart)

    first = drawn("a")
    assert first == drawn("a")
    texts = ("A &amp; &lt;i&gt;", "&lt;b&gt;0 $x$", "&lt;head&gt; starts", "&lt;b&gt;0 $x$, epoch 2: 20.00 %")
    assert [text for text in texts if text not in first] == []
    style = (TEMPLATES / "report.css").read_text()
    counts = {style.count(f"{name}: #") for name in figures.CSS_PROPERTIES.values()}
    assert counts == {2}  # in light, and in dark
    assert set(re.findall(r"var\((--\w+)\)", first)) == {"--ink", "--soft", "--rule", *(f"--s{i}" for i in range(6))}
    assert re.findall("#[0-9a-f]{6}", first) == []
    assert set(re.findall(' id="(.*?)"', first)).isdisjoint(re.findall(' id="(.*?)"', drawn("b")))
    assert set(re.findall('href="#(.*?)"', first)) <= set(re.findall(' id="(.*?)"', first))
    assert figures.draw_line_chart("nothing", [figures.Line("a", figures.INK, [1], [None])]) is None


def test_names_become_plain_short_text() -> None:
    assert figures.format_label("$x$") == r"\$x\$"
    assert figures.format_label("a\nb") == r"a\nb"
    assert figures.format_label("x" * 20 + "y" * 20, 11) == "x" * 5 + "…" + "y" * 5
    assert figures.format_label("bad \udcff") == r"bad \xff"


def test_drawing_imports_neither_pyplot_nor_tensorflow() -> None:
    program = "import sys, trainer.report.write; print(sorted({'matplotlib.pyplot', 'tensorflow'} & set(sys.modules)))"
    assert run_python(program).stdout == "[]\n"
