"""Draw the figure of `trainer.drift`: logged predictions next to the reference, and the measures of drift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import CONFIDENCE_BINS, Measure, Window
from trainer.report import figures
from trainer.report.figures import ACCENT, INK, PALE, create_figure, format_label, set_heading, style_axes

MAX_CLASSES = 15  # in the figure, the ones whose fraction of the predictions changed most
LEVEL_COLORS = {"stable": figures.RIGHT, "moderate": figures.DOUBTFUL, "shifted": figures.WRONG}


def draw(path: Path, reference: Mapping[str, Any], window: Window, measures: Sequence[Measure]) -> None:
    """Draw a PNG: predicted classes, largest probabilities, and each measure divided by its threshold of a shift."""
    expected = np.asarray(reference["class_frequencies"])
    observed = window.classes / window.n
    shown = np.argsort(-np.abs(observed - expected), kind="stable")[:MAX_CLASSES]
    figure = create_figure(2.4 + 0.3 * len(shown) + 2.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2 + 0.3 * len(shown), 3.6])
    axes = figure.add_subplot(grid[0, :])
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, expected[shown], 0.38, color=PALE, label=f"reference ({reference['n']:,})")
    axes.barh(rows + 0.2, observed[shown], 0.38, color=ACCENT, label=f"log ({window.n:,})")
    axes.set_yticks(rows, [format_label(reference["classes"][i]) for i in shown])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    set_heading(
        axes, "Fraction of predictions per class" + (", largest changes" if len(expected) > MAX_CLASSES else "")
    )
    style_axes(axes, "x")
    left, right = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    counts = np.asarray(reference["confidence_histogram"]["counts"])
    edges, logged = np.arange(CONFIDENCE_BINS) / CONFIDENCE_BINS, window.confidences / window.n
    left.bar(edges, counts / counts.sum(), 1 / CONFIDENCE_BINS, align="edge", color=PALE)
    left.step([*edges, 1.0], [*logged, logged[-1]], where="post", color=ACCENT)
    left.set_xlim(0, 1)
    set_heading(left, "Largest probability")
    style_axes(left, "y")
    ratios, rows = [min(measure.value / measure.shifted, 3.0) for measure in measures], np.arange(len(measures))
    right.barh(rows, ratios, 0.5, color=[LEVEL_COLORS[measure.level] for measure in measures])
    right.axvline(1, color=INK, linewidth=1)
    right.set_yticks(rows, [measure.name for measure in measures])
    right.invert_yaxis()
    right.set_xlim(0, max(1.5, *ratios) * 1.1)
    set_heading(right, "Measure / limit of a shift (cut at 3)")
    style_axes(right, "x")
    figures.save(figure, path)
