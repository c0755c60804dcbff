"""Draw the figure of `trainer.drift`: logged predictions next to the reference, and the measures of drift."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import CONFIDENCE_BINS, DriftMeasure, PredictionWindow
from trainer.report import figures
from trainer.report.figures import ACCENT, INK, PALE, create_figure, format_label, set_heading, style_axes

MAX_CLASSES = 15  # if there are more, only those whose fraction of the predictions changed most are drawn
LEVEL_COLORS = {"stable": figures.RIGHT, "moderate": figures.MODERATE, "shifted": figures.WRONG}


def draw(path: Path, reference: Mapping[str, Any], window: PredictionWindow, measures: Sequence[DriftMeasure]) -> None:
    """Draw the predicted classes, the largest probabilities, and each measure divided by its threshold for "shifted".

    Args:
        path: path of the PNG file to write.
        reference: content of reference.json.
        window: the logged predictions, at least one.
        measures: measures of the drift from the reference to the window.
    """
    reference_fractions = np.asarray(reference["class_frequencies"])
    log_fractions = window.classes / window.n
    classes = np.argsort(-np.abs(log_fractions - reference_fractions), kind="stable")[:MAX_CLASSES]
    figure = create_figure(2.4 + 0.3 * len(classes) + 2.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2 + 0.3 * len(classes), 3.6])
    axes = figure.add_subplot(grid[0, :])
    ys = np.arange(len(classes))
    axes.barh(ys - 0.2, reference_fractions[classes], 0.38, color=PALE, label=f"reference ({reference['n']:,})")
    axes.barh(ys + 0.2, log_fractions[classes], 0.38, color=ACCENT, label=f"log ({window.n:,})")
    axes.set_yticks(ys, [format_label(reference["classes"][i]) for i in classes])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    set_heading(
        axes,
        "Fraction of predictions per class" + (", largest changes" if len(reference_fractions) > MAX_CLASSES else ""),
    )
    style_axes(axes, "x")
    confidence_axes, measure_axes = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    counts = np.asarray(reference["confidence_histogram"]["counts"])
    edges, fractions = np.arange(CONFIDENCE_BINS) / CONFIDENCE_BINS, window.confidences / window.n
    confidence_axes.bar(edges, counts / counts.sum(), 1 / CONFIDENCE_BINS, align="edge", color=PALE)
    confidence_axes.step([*edges, 1.0], [*fractions, fractions[-1]], where="post", color=ACCENT)
    confidence_axes.set_xlim(0, 1)
    set_heading(confidence_axes, "Largest probability")
    style_axes(confidence_axes, "y")
    ratios = [min(measure.value / measure.shifted, 3.0) for measure in measures]
    ys = np.arange(len(measures))
    measure_axes.barh(ys, ratios, 0.5, color=[LEVEL_COLORS[measure.level] for measure in measures])
    measure_axes.axvline(1, color=INK, linewidth=1)
    measure_axes.set_yticks(ys, [measure.name for measure in measures])
    measure_axes.invert_yaxis()
    measure_axes.set_xlim(0, max(1.5, *ratios) * 1.1)
    set_heading(measure_axes, "Measure / limit of a shift (cut at 3)")
    style_axes(measure_axes, "x")
    figures.save(figure, path)
