"""Draw charts whose x axis is logarithmic: accuracy over the time per image, and the loss over the learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from trainer.names import escape_unprintable
from trainer.report.figures import ACCENT, GRID_LINE, MUTED, PALE, WRONG, Chart, create_plot, format_label

WIDTH, HEIGHT = 560, 320  # size of each chart in points


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot of fractions over milliseconds."""

    name: str
    x: float  # milliseconds, above 0
    y: float  # fraction, 0 to 1
    interval: tuple[float, float]  # bounds of the interval of y
    color: str


def _use_log_axis(axes: Axes, ticks: tuple[float, ...]) -> None:
    """Make the x axis logarithmic, with ticks at the multiples `ticks` of the powers of ten and plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_scatter(title: str, points: Sequence[Point], x_label: str) -> Chart:
    """Draw at least one point, each with its name and interval, over a logarithmic x axis."""
    figure, axes = create_plot(title, WIDTH, HEIGHT, left=50, top=30, right=20, bottom=44)
    axes.grid(color=GRID_LINE, linewidth=0.6)
    _use_log_axis(axes, (1, 2, 5))
    tips = {}
    for i, point in enumerate(points):
        axes.plot([point.x] * 2, point.interval, color=point.color, linewidth=2, alpha=0.5)
        axes.plot([point.x], [point.y], color=point.color, marker="o", markersize=8, linestyle="", gid=f"point {i}")
        low, high = (100 * bound for bound in point.interval)
        name = escape_unprintable(point.name)
        tips[f"point {i}"] = [f"{name}: {100 * point.y:.1f} % ({low:.1f} to {high:.1f}), {point.x:.3g} ms"]
        axes.annotate(format_label(point.name), (point.x, point.y), xytext=(7, 3), textcoords="offset points",
                      fontsize=10, color=MUTED)  # fmt: skip
    xs = [point.x for point in points]
    bounds = [bound for point in points for bound in point.interval]
    axes.set_xlim(min(xs) / 1.5, max(xs) * 3)  # names are at the right of the points
    axes.set_ylim(max(min(bounds) - 0.03, 0.0), min(max(bounds) + 0.03, 1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(x_label, loc="right", fontsize=11, color=MUTED)
    return Chart(figure, f"{title}: {', '.join(escape_unprintable(point.name) for point in points)}", tips)


def draw_rates(
    title: str, rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, marks: Sequence[tuple[str, float]]
) -> Chart:
    """Draw the loss of each step, and the smoothed losses, over the learning rate.

    Args:
        title: title above the chart.
        rates: learning rate of each step, float [n], increasing, n >= 2.
        losses: loss of each step, float [n]; values outside the y axis, which fits the smoothed losses, are clipped.
        smoothed: smoothed losses, float [n].
        marks: (name, learning rate) of each vertical line.
    """
    figure, axes = create_plot(title, WIDTH, HEIGHT, left=50, top=30 + 16 * len(marks), right=20, bottom=44)
    axes.grid(color=GRID_LINE, linewidth=0.6)
    _use_log_axis(axes, (1,))
    padding = 0.1 * max(float(np.ptp(smoothed)), 1e-6)
    low, high = float(smoothed.min()) - padding, float(smoothed.max()) + padding
    axes.plot(rates, np.clip(losses, low, high), color=PALE, linewidth=1, label="each step")
    axes.plot(rates, smoothed, color=ACCENT, linewidth=2, label="smoothed")
    axes.set(xlim=(rates[0], rates[-1]), ylim=(low, high))
    for i, (name, rate) in enumerate(marks):
        axes.axvline(rate, color=WRONG, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(f"{name}: {rate:.2g}", (rate, 1), xycoords=("data", "axes fraction"), xytext=(4, 4 + 14 * i),
                      textcoords="offset points", fontsize=10, color=MUTED)  # fmt: skip
    axes.set_xlabel("learning rate", loc="right", fontsize=11, color=MUTED)
    axes.legend(frameon=False, fontsize=10, loc="lower left", labelcolor=MUTED)
    return Chart(figure, title)
