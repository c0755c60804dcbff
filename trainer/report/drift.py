"""The figure of drift: what a log of predictions holds beside the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.drift import BINS, Measure, Window
from trainer.report.figures import (
    DOUBTFUL,
    INK,
    RIGHT,
    TRAINING,
    VALIDATION,
    WRONG,
    canvas,
    heading,
    label,
    save,
    tidy,
)

SHOWN = 15  # classes in the figure, those that moved most
COLOURS = {"stable": RIGHT, "moderate": DOUBTFUL, "shifted": WRONG}


def draw(path: Path, reference: Mapping[str, Any], window: Window, found: Sequence[Measure]) -> None:
    """The figure: predicted classes, confidence, and each measure beside its limit."""
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
    heading(axes, "Share of each predicted class" + (", those that moved most" if len(before) > SHOWN else ""))
    tidy(axes, "x")
    left, right = (figure.add_subplot(grid[1, column]) for column in (0, 1))
    counts = np.asarray(reference["confidence_histogram"]["counts"])
    edges = np.arange(BINS) / BINS
    left.bar(edges, counts / counts.sum(), 1 / BINS, align="edge", color=TRAINING)
    left.step([*edges, 1.0], [*(now_ := window.confidences / window.n), now_[-1]], where="post", color=VALIDATION)
    left.set_xlim(0, 1)
    heading(left, "Largest probability")
    tidy(left, "y")
    shares = [min(measure.value / measure.shifted, 3.0) for measure in found]
    right.barh(range(len(found)), shares, 0.5, color=[COLOURS[measure.level] for measure in found])
    right.axvline(1, color=INK, linewidth=1)
    right.set_yticks(range(len(found)), [measure.name for measure in found])
    right.invert_yaxis()
    right.set_xlim(0, max(1.5, *shares) * 1.1)
    heading(right, "Measure / its limit (cut at 3)")
    tidy(right, "x")
    save(figure, path)
