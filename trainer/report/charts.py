"""Charts drawn as SVG: they take the colours of the page, light or dark, and stay sharp on every screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from trainer.report.markup import percent, text

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 36, 36
SERIES = 6  # colours that lines of different runs have


@dataclass(frozen=True)
class Line:
    """One value for each place; NaN or None where there is none. `kind` is a class of the style sheet."""

    name: str
    kind: str
    places: Sequence[float]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Frame:
    """The axes: from data to pixels."""

    left: float
    right: float
    low: float
    high: float
    height: int = HEIGHT

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / max(self.right - self.left, 1e-9) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = self.height - TOP - BOTTOM
        return self.height - BOTTOM - (value - self.low) / max(self.high - self.low, 1e-9) * span


def _ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    found = MaxNLocator(nbins=most, integer=whole, min_n_ticks=1 if whole else 2).tick_values(low, high)
    return [float(v) for v in found if low - 1e-9 <= v <= high + 1e-9]


def _small(value: float) -> str:
    """7.5e-4."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def _axes(frame: Frame, title: str, below: str, show: Callable[[float], str]) -> list[str]:
    bottom = frame.height - BOTTOM
    parts = [f'<text class="head" x="4" y="16">{text(title)}</text>']
    for value in _ticks(frame.low, frame.high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(value)}</text>')
    for value in _ticks(frame.left, frame.right, 8, whole=frame.right > 1.5):
        parts.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
        )
    end = f'x="{WIDTH - RIGHT}" y="{frame.height - 4}" text-anchor="end"'
    parts.append(f'<text class="tick" {end}>{text(below)}</text>')
    return parts


def _svg(parts: Sequence[str], words: str, height: int = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(words)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _real(values: Sequence[float | None]) -> list[float]:
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    shares: bool = False,
    marks: Mapping[str, float] | None = None,
    rings: Sequence[tuple[float, float]] = (),
    below: str = "epoch",
) -> str:
    """Lines over epochs.

    Args:
        title: above the chart.
        lines: those without any value are left out.
        shares: values are 0..1 and shown in percent; else the axis begins at 0.
        marks: name -> place where something begins, drawn as a vertical line.
        rings: (place, value) around points that count.
        below: what the horizontal axis counts.
    """
    lines = [line for line in lines if _real(line.values)]
    if not lines:
        return ""
    places = [p for line in lines for p in line.places]
    values = [v for line in lines for v in _real(line.values)]
    low, high = (min(values), 1.0) if shares else (0.0, max(values))
    room = 0.06 * max(high - low, 1e-6)
    frame = Frame(min(places) - 0.5, max(places) + 0.5, max(0.0, low - room), high if shares else high + room)
    show = (lambda v: f"{100 * v:.4g}%") if shares else (_small if 0 < high < 0.01 else lambda v: f"{v:.3g}")
    parts = _axes(frame, title, below, show)
    for name, place in (marks or {}).items():
        x = frame.x(place)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x + 3:.1f}" y="{TOP - 5}">{text(name)}</text>')
    for line in lines:
        points = [
            (frame.x(p), frame.y(v), p, v)
            for p, v in zip(line.places, line.values, strict=True)
            if v is not None and math.isfinite(v)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in points)
        parts.append(f'<polyline class="line {line.kind}" points="{path}"/>')
        if len(points) <= 60:
            parts += [
                f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{text(line.name)}, {below} {p:g}: {percent(v, 2) if shares else f'{v:.4g}'}</title></circle>"
                for x, y, p, v in points
            ]
    parts += [f'<circle class="ring" cx="{frame.x(p):.1f}" cy="{frame.y(v):.1f}" r="7"/>' for p, v in rings]
    return _svg(parts, f"{title}: {', '.join(line.name for line in lines)}")


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(kind, name) of lines that several charts share; names are escaped here."""
    items = "".join(f'<span><i class="key {kind}"></i>{text(name)}</span>' for kind, name in entries)
    return f'<p class="legend">{items}</p>'


def history_charts(history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]]) -> str:
    """Loss, accuracy and learning rate of all phases, joined."""
    if not history:
        return ""
    epochs = [float(row["epoch"]) for row in history]
    starts: dict[str, float] = {}
    for row in history:
        starts.setdefault(str(row["phase"]), row["epoch"] - 0.5)
    marks = starts if len(starts) > 1 else None
    best = [phase["best_epoch"] for phase in phases.values() if phase.get("best_epoch") is not None]

    def chart(title: str, key: str, shares: bool) -> str:
        lines = [
            Line(name, kind, epochs, [row.get(prefix + key) for row in history])
            for prefix, name, kind in (("", "training", "training"), ("val_", "validation", "validation"))
        ]
        rings = [
            (float(row["epoch"]), float(row["val_" + key]))
            for row in history
            if row["epoch"] in best and _real([row.get("val_" + key)])
        ]
        return line_chart(title, lines, shares=shares, marks=marks, rings=rings)

    entries = [("training", "training"), ("validation", "validation"), ("ring", "best epoch of a phase")]
    rate = line_chart(
        "Learning rate",
        [Line("learning rate", "training", epochs, [row.get("learning_rate") for row in history])],
        marks=marks,
    )
    charts = [chart("Loss (nats)", "loss", False), chart("Accuracy", "accuracy", True), rate]
    return legend(entries) + '<div class="charts">' + "\n".join(c for c in charts if c) + "</div>"


def calibration_chart(bins: Sequence[Mapping[str, Any]]) -> str:
    """How often predictions of a given confidence are right; the width of a dot says how many there are."""
    frame = Frame(0.0, 1.0, 0.0, 1.0, height=300)
    full = [b for b in bins if b["count"]]
    most = max((b["count"] for b in full), default=1)
    parts = _axes(frame, "Share that is right", "confidence", lambda v: f"{100 * v:.0f}%")
    parts.append(
        f'<line class="mark" x1="{frame.x(0):.1f}" y1="{frame.y(0):.1f}" x2="{frame.x(1):.1f}" y2="{frame.y(1):.1f}"/>'
    )
    for b in full:
        x, width = frame.x(b["low"]), frame.x(b["high"]) - frame.x(b["low"])
        height = 60 * b["count"] / most
        parts.append(
            f'<rect class="count" x="{x + 1:.1f}" y="{frame.y(0) - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}"><title>{b["count"]:,} examples</title></rect>'
        )
    points = " ".join(f"{frame.x(b['confidence']):.1f},{frame.y(b['accuracy']):.1f}" for b in full)
    parts.append(f'<polyline class="line validation" points="{points}"/>')
    parts += [
        f'<circle class="dot validation" cx="{frame.x(b["confidence"]):.1f}" cy="{frame.y(b["accuracy"]):.1f}" '
        f'r="{3 + 5 * math.sqrt(b["count"] / most):.1f}"><title>confidence {percent(b["confidence"])}, right '
        f"{percent(b['accuracy'])}, {b['count']:,} examples</title></circle>"
        for b in full
    ]
    return _svg(parts, "Calibration: the share that is right over the confidence", height=300)
