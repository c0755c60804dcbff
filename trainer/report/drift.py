"""Figure of drift: the predictions of a log next to those of the reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import BINS, Measure, Window
from trainer.report import figures
from trainer.report.figures import INK, TRAINING, VALIDATION, canvas, heading, label, tidy

SHOWN = 15  # classes in the figure, those that changed most
COLOURS = {"stable": figures.RIGHT, "moderate": figures.DOUBTFUL, "shifted": figures.WRONG}


def draw(path: Path, reference: Mapping[str, Any], window: Window, measured: Sequence[Measure]) -> None:
    """Draw predicted classes, confidence, and each measure over its limit, as PNG at `path`."""
    before = np.asarray(reference["class_frequencies"])
    now = window.classes / window.n
    shown = np.argsort(-np.abs(now - before), kind="stable")[:SHOWN]
    figure = canvas(2.4 + 0.3 * len(shown) + 2.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2 + 0.3 * len(shown), 3.6])
    axes = figure.add_subplot(grid[0, :])
    rows = np.arange(len(shown))
    axes.barh(rows - 0.2, before[shown], 0.38, color=TRAINING, label=f"reference ({reference['n']:,})")
    axes.barh(rows + 0.2, now[shown], 0.38, color=VALIDATION, label=f"log ({window.n:,})")
    axes.set_yticks(rows, [label(reference["classes"][i]) for i in shown])
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    heading(axes, "Fraction of predictions per class" + (", largest changes" if len(before) > SHOWN else ""))
    tidy(axes, "x")
    left, right = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    counts = np.asarray(reference["confidence_histogram"]["counts"])
    edges, logged = np.arange(BINS) / BINS, window.confidences / window.n
    left.bar(edges, counts / counts.sum(), 1 / BINS, align="edge", color=TRAINING)
    left.step([*edges, 1.0], [*logged, logged[-1]], where="post", color=VALIDATION)
    left.set_xlim(0, 1)
    heading(left, "Largest probability")
    tidy(left, "y")
    ratios, rows = [min(measure.value / measure.shifted, 3.0) for measure in measured], np.arange(len(measured))
    right.barh(rows, ratios, 0.5, color=[COLOURS[measure.level] for measure in measured])
    right.axvline(1, color=INK, linewidth=1)
    right.set_yticks(rows, [measure.name for measure in measured])
    right.invert_yaxis()
    right.set_xlim(0, max(1.5, *ratios) * 1.1)
    heading(right, "Measure / its limit (cut at 3)")
    tidy(right, "x")
    figures.save(figure, path)
