"""Draw the figures of a report with matplotlib: SVG for the page, PNG for the folder and TensorBoard.

Figures are created without pyplot, which would register them globally and select a display.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from trainer.names import escape_unprintable
from trainer.storage.local import write_atomically
from trainer.types import EvaluationResult

DPI = 110  # of PNG files
PNG_COMPRESSION = 2  # of 9; for photos it takes half the time of the default 6, and a tenth more bytes
WIDTH = 8.0  # inches; 880 pixels
MAX_NUMBERED_CLASSES = 20  # a confusion matrix of more classes has neither counts nor class names
MAX_BARS = 120  # classes in the F1 figure; if there are more, only the weakest are drawn
MAX_EXAMPLES = 12  # images in a figure of examples
MAX_MARKERS = 60  # a line with more epochs has neither markers nor tooltips
INK, MUTED, GRID_LINE = "#1f2937", "#6b7280", "#d1d5db"  # text, secondary text, lines behind the data
PALE, ACCENT = "#94a3b8", "#2563eb"  # secondary and primary data
RIGHT, MODERATE, WRONG = "#15803d", "#d97706", "#b91c1c"
TOP_5_COLOR = "#7e22ce"  # line of top-5 accuracy; a color of SERIES, so that it has a custom property
SERIES = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490")  # lines of compared runs

# Custom properties of report.css that replace colors in the page, so that charts follow its light or dark theme.
CSS_PROPERTIES = {
    INK: "--ink", MUTED: "--soft", GRID_LINE: "--rule", PALE: "--faint", ACCENT: "--lead", WRONG: "--wrong",
    **{color: f"--s{i}" for i, color in enumerate(SERIES)},
}  # fmt: skip


def create_figure(height: float, width: float = WIDTH, fit_labels: bool = True) -> Figure:
    """Create an empty white figure. Sizes are in inches.

    With `fit_labels`, matplotlib arranges the axes so that all labels fit, which takes a second drawing pass.
    """
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained" if fit_labels else None, facecolor="white")


def shorten_name(name: str, max_length: int) -> str:
    """Make a name printable, and replace its middle by an ellipsis if it has more than `max_length` characters."""
    name = escape_unprintable(name)
    tail_length = max_length // 2
    return name if len(name) <= max_length else name[: max_length - tail_length - 1] + "…" + name[-tail_length:]


def format_label(name: str, max_length: int = 24) -> str:
    """Shorten a class or file name for a figure, and escape $, which begins a formula in matplotlib."""
    return shorten_name(name, max_length).replace("$", r"\$")


def style_axes(axes: Axes, grid: Literal["x", "y"] | None = None, size: float = 9, color: str = INK) -> None:
    """Style axes: frame lines only at the left and bottom, tick labels, and grid lines at the ticks of axis `grid`.

    `size`, in points, and `color` apply to the tick labels.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID_LINE)
    axes.tick_params(colors=color, length=0, labelsize=size)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID_LINE, linewidth=0.6)


def set_heading(axes: Axes, title: str) -> None:
    """Set a bold, left-aligned title."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """Ignore warnings about glyphs that matplotlib's font lacks: boxes in a PNG, but the page uses other fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figures: Figure | Sequence[Figure], path: Path) -> Path:
    """Write a figure, or several of them stacked vertically, to a PNG file atomically. Return `path`."""
    arrays = []
    for figure in [figures] if isinstance(figures, Figure) else figures:
        canvas = FigureCanvasAgg(figure)
        with _ignore_missing_glyphs():
            canvas.draw()
        arrays.append(np.asarray(canvas.buffer_rgba())[..., :3])
    width = max(pixels.shape[1] for pixels in arrays)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in arrays]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(padded)).save(content, "PNG", compress_level=PNG_COMPRESSION, dpi=(DPI, DPI))
    write_atomically(path, content.getvalue())
    return path


@dataclass(frozen=True)
class Chart:
    """A figure that the page shows as SVG. One matplotlib point (1/72 inch) is one unit of the SVG."""

    figure: Figure
    alt_text: str
    # An artist's gid -> its tooltips: one per marker of a line, or one for an artist without markers.
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for artist in self.figure.findobj():
            artist.set_clip_on(False)  # markers at the edge of the axes are drawn completely


def to_svg(name: str, chart: Chart) -> Markup:
    """Convert a chart to an <svg> element for the page, with tooltips.

    Text remains text, in the page's font, and colors become custom properties (`CSS_PROPERTIES`). The ids in the
    element are derived from `name`, so that equal charts give equal bytes.
    """
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _ignore_missing_glyphs():
        chart.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(svg.getvalue())
    for element in list(root.iter()):
        element.tag = element.tag.partition("}")[2]
        if element.tag == "g" and (tips := chart.tips.get(element.attrib.pop("id", ""))):
            markers = element.findall(".//{*}use") or [element]
            for marker, tip in zip(markers, tips, strict=True):
                ElementTree.SubElement(marker, "title").text = tip
        if href := element.attrib.pop("{http://www.w3.org/1999/xlink}href", None):
            element.set("href", href)
        if style := element.get("style"):
            style = re.sub(r"font-family: [^;]*;? ?", "", style)
            for color, css_property in CSS_PROPERTIES.items():
                style = style.replace(color, f"var({css_property})")
            element.set("style", style)
        element.text, element.tail = (element.text or "").strip() or None, None
    view_box = root.attrib["viewBox"]
    attributes = {"viewBox": view_box, "width": view_box.split()[2]}
    root.attrib = {"class": "chart", **attributes, "role": "img", "aria-label": chart.alt_text}
    for child in [child for child in root if child.tag == "metadata" or child.find("style") is not None]:
        root.remove(child)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def create_plot(
    title: str, width: float, height: float, *, left: float, top: float, right: float = 10, bottom: float = 36
) -> tuple[Figure, Axes]:
    """Create a figure with a title and one Axes. Sizes and margins are in points, which are units of the SVG."""
    figure = create_figure(height / 72, width / 72, fit_labels=False)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    style_axes(axes, size=11, color=MUTED)
    _draw_title(figure, title)
    return figure, axes


def _draw_title(figure: Figure, title: str, size: float = 13) -> None:
    height = figure.get_figheight() * 72
    figure.text(4 / 72 / figure.get_figwidth(), 1 - 16 / height, title, fontsize=size, fontweight="bold", color=INK)


@dataclass(frozen=True)
class Line:
    """A line of a chart: a series of values over epochs."""

    name: str  # shown in the legend and in tooltips
    color: str
    epochs: Sequence[float]
    values: Sequence[float | None]  # one per epoch; None or NaN if it is missing

    @property
    def points(self) -> list[tuple[float, float]]:
        """The (epoch, value) pairs whose value is not missing."""
        pairs = zip(self.epochs, self.values, strict=True)
        return [(epoch, float(value)) for epoch, value in pairs if value is not None and math.isfinite(value)]


def _format_scientific(value: float) -> str:
    """Format a number in 0..1 like 7.5e-4."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"


def draw_line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    fractions: bool = False,
    phase_starts: Mapping[str, float] | None = None,
    best_points: Sequence[tuple[float, float]] = (),
    legend: bool = False,
) -> Chart | None:
    """Draw lines over the epochs; return None if all values are missing.

    Args:
        lines: the lines; one without values is left out.
        fractions: whether the values are fractions; then the y axis is in percent and ends at 100. Otherwise the y axis
            starts at 0, and values must not be negative.
        phase_starts: phase -> x coordinate of its start, drawn as a vertical line with the phase's name.
        best_points: (epoch, value) of each phase's best epoch, marked with a ring.
        legend: whether the chart has a legend.
    """
    drawn_lines = [(line, line.points) for line in lines if line.points]
    if not drawn_lines:
        return None
    epochs, values = zip(*(point for _, points in drawn_lines for point in points), strict=True)
    first, last = min(epochs) - 0.5, max(epochs) + 0.5
    low, high = (min(values), 1.0) if fractions else (0.0, max(values))
    padding = 0.06 * max(high - low, 1e-6)
    width, left, right = 400, 46, 10  # points
    phase_starts = phase_starts or {}
    step = (width - left - right) / (last - first)  # points per epoch
    # A character is about 6.5 points wide.
    names_overlap = any(
        (end - start) * step < 6.5 * len(name) + 4 for (name, start), (_, end) in pairwise(phase_starts.items())
    )
    top = 78 if names_overlap else 44
    figure, axes = create_plot(title, width, 204 + top, left=left, top=top, right=right)
    axes.grid(axis="y", color=GRID_LINE, linewidth=1)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(first, last), ylim=(max(0.0, low - padding), high if fractions else high + padding))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    format_value = (
        (lambda v: f"{100 * v:.4g}%")
        if fractions
        else (_format_scientific if 0 < high < 0.01 else lambda v: f"{v:.3g}")
    )
    axes.yaxis.set_major_formatter(lambda value, _: format_value(value))
    axes.set_xlabel("epoch", loc="right", fontsize=11, color=MUTED, labelpad=1)
    for name, epoch in phase_starts.items():
        axes.axvline(epoch, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), gid=f"mark {name}")
        rotation: dict[str, Any] = {"rotation": 30 if names_overlap else 0, "rotation_mode": "anchor"}
        axes.annotate(format_label(name, 12 if names_overlap else 24), (epoch, 1), xycoords=("data", "axes fraction"),
                      xytext=(3, 5), textcoords="offset points", fontsize=11, color=MUTED, **rotation)  # fmt: skip
    tips = {f"mark {name}": [f"{name} starts"] for name in phase_starts}
    for i, (line, points) in enumerate(drawn_lines):
        marker_style: dict[str, Any] = {"marker": "o", "markersize": 6} if len(points) <= MAX_MARKERS else {}
        axes.plot(*zip(*points, strict=True), color=line.color, linewidth=2, label=format_label(line.name),
                  gid=str(i), **marker_style)  # fmt: skip
        if marker_style:
            labels = [(epoch, f"{100 * v:.2f} %" if fractions else f"{v:.4g}") for epoch, v in points]
            tips[str(i)] = [f"{escape_unprintable(line.name)}, epoch {epoch:g}: {value}" for epoch, value in labels]
    if best_points:
        axes.plot(*zip(*best_points, strict=True), linestyle="", marker="o", markersize=13, markerfacecolor="none",
                  markeredgecolor=WRONG, markeredgewidth=1.6, label="best epoch of a phase", gid="rings")  # fmt: skip
        tips["rings"] = [f"best epoch of a phase: {epoch:g}" for epoch, _ in best_points]
    if legend:
        axes.legend(frameon=False, fontsize=11, loc="lower right" if fractions else "upper right", labelcolor=MUTED)
    return Chart(figure, f"{title}: {', '.join(escape_unprintable(line.name) for line in lines)}", tips)


def draw_curves(history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Draw loss, accuracy and learning rate over the epochs of all phases, and mark each phase's best epoch.

    The accuracy chart has a line for top-5 accuracy if the history contains it. A chart without values is left out.

    Args:
        history: one row per epoch (`trainer.report.schema.Epoch`); val_ scores can be missing, None or NaN.
        phases: results by phase (`trainer.report.schema.Phase`); only `best_epoch` is used.
    """
    epochs = [float(row["epoch"]) for row in history]
    best_epochs = [phase["best_epoch"] for phase in phases.values() if phase.get("best_epoch") is not None]
    phase_starts: dict[str, float] = {}
    for row in history:
        phase_starts.setdefault(str(row["phase"]), row["epoch"] - 0.5)
    options: dict[str, Any] = {"phase_starts": phase_starts if len(phase_starts) > 1 else None}

    def line(name: str, color: str, key: str) -> Line:
        return Line(name, color, epochs, [row.get(key) for row in history])

    charts = []
    for title, key in (("Loss (nats)", "loss"), ("Accuracy", "accuracy")):
        lines = [line("training", PALE, key), line("validation", ACCENT, f"val_{key}")]
        lines += [line("validation, top 5", TOP_5_COLOR, "val_top_5")] if key == "accuracy" else []
        best_points = [point for point in lines[1].points if point[0] in best_epochs]
        fractions = key == "accuracy"
        charts.append(
            draw_line_chart(title, lines, fractions=fractions, best_points=best_points, legend=True, **options)
        )
    charts.append(draw_line_chart("Learning rate", [line("learning rate", PALE, "learning_rate")], **options))
    return [chart for chart in charts if chart]


def zero_diagonal(confusion: np.ndarray) -> np.ndarray:
    """Return a copy of a confusion matrix, int [c, c], with zeros on the diagonal."""
    return confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))


def find_top_confusions(confusion: np.ndarray, max_count: int = 15) -> list[tuple[int, int, int]]:
    """Return (truth, prediction, count) of the `max_count` most frequent confusions; ties are ordered by truth."""
    wrong_counts = zero_diagonal(confusion)
    order = np.argsort(-wrong_counts, axis=None, kind="stable")[: min(max_count, np.count_nonzero(wrong_counts))]
    truth, prediction = np.unravel_index(order, wrong_counts.shape)
    return list(zip(truth.tolist(), prediction.tolist(), wrong_counts[truth, prediction].tolist(), strict=True))


def _draw_matrix(axes: Axes, confusion: np.ndarray) -> np.ndarray:
    """Draw a confusion matrix: a blue (correct) or red (wrong) pixel per cell, gray rows for classes without examples.

    Return each cell's opacity, float [c, c] in 0..1, which grows with the cell's fraction of the true class's examples.
    """
    support = confusion.sum(axis=1, keepdims=True)
    opacity = np.where(confusion > 0, 0.15 + 0.85 * (confusion / np.maximum(support, 1)) ** 0.5, 0)
    right, wrong = (matplotlib.colors.to_rgb(color) for color in (ACCENT, WRONG))
    colors = np.where(np.eye(len(confusion), dtype=bool)[..., None], right, wrong)
    pixels = np.dstack([colors, opacity])
    pixels[support[:, 0] == 0] = (0.5, 0.5, 0.5, 0.15)
    axes.imshow(np.rint(255 * pixels).astype(np.uint8), interpolation="none")
    axes.set_xlabel("prediction", color=MUTED, fontsize=11)
    axes.set_ylabel("truth", color=MUTED, fontsize=11)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GRID_LINE)
    return opacity


def draw_confusion(confusion: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str]) -> list[Chart]:
    """Draw a confusion matrix, int [c, c], whose rows are the truth; opacity grows with the fraction of the true class.

    With up to `MAX_NUMBERED_CLASSES` classes, the chart has class names and counts. With more classes it has neither,
    and a second chart shows the most frequent confusions.
    """
    matrix = np.asarray(confusion)
    num_classes = len(class_names)
    if num_classes > MAX_NUMBERED_CLASSES:
        title = f"Confusion matrix of {num_classes} classes, in their order"
        figure, axes = create_plot(title, 560, 580, left=56, top=30)
        _draw_matrix(axes, matrix)
        return [Chart(figure, title), _draw_top_confusions(matrix, class_names)]
    names, support = [format_label(name) for name in class_names], matrix.sum(axis=1)
    row_labels = [name if count else f"{name} (no examples)" for name, count in zip(names, support, strict=True)]
    side = max(190, 32 * num_classes)  # points; excludes the names around the matrix
    # A character takes 6.6 points, or 5 points of height in slanted names.
    left, bottom = 36 + 6.6 * max(map(len, row_labels)), 40 + 5 * max(map(len, names))
    width, height, right = max(left + side + 20, 340), side + bottom + 36, max(20, 320 - left - side)
    figure, axes = create_plot("Confusion matrix", width, height, left=left, top=36, right=right, bottom=bottom)
    opacity = _draw_matrix(axes, matrix)
    has_long_name = max(map(len, names)) > 3
    tick_style: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if has_long_name else {}
    axes.set_xticks(range(num_classes), names, **tick_style)
    axes.set_yticks(range(num_classes), row_labels)
    tips = {}
    for row, column in np.argwhere(matrix):
        count, gid = matrix[row, column], f"cell {row} {column}"
        color = "white" if opacity[row, column] > 0.7 else INK
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=11, color=color, gid=gid)
        tips[gid] = [f"{100 * count / support[row]:.1f} % of {escape_unprintable(class_names[row])}"]
    return [Chart(figure, "Confusion matrix", tips)]


def _draw_top_confusions(matrix: np.ndarray, class_names: Sequence[str]) -> Chart:
    """Draw the most frequent confusions of a confusion matrix, int [c, c], as bars."""
    pairs, title = find_top_confusions(matrix), "Most frequent confusions"
    figure, axes = create_plot(title, 560, 66 + 20 * max(len(pairs), 2), left=330, top=30, right=70)
    if not pairs:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no class is confused with another", ha="center", va="center", color=MUTED)
        return Chart(figure, "No class is confused with another")
    axes.grid(axis="x", color=GRID_LINE, linewidth=0.6)
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=WRONG, height=0.7)
    for y, (truth, _, count) in enumerate(pairs):
        axes.text(count, y, f" {count:,} of {matrix[truth].sum():,}", va="center", fontsize=9, color=MUTED)
    names = [f"{format_label(class_names[t], 22)} predicted as {format_label(class_names[p], 22)}" for t, p, _ in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=9)
    axes.set(xlim=(0, pairs[0][2]), ylim=(len(pairs) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("examples", color=MUTED)
    return Chart(figure, title)


def draw_f1(per_class: Sequence[Mapping[str, Any]], macro_f1: float) -> Chart:
    """Draw F1 per class as bars, in columns of up to 40 classes, and macro F1 as a dashed line.

    The `MAX_BARS` weakest classes are drawn, weakest first. Classes without examples come last, and have no bar.

    `per_class` has the rows of `per_class` in report.json (`trainer.report.schema.ClassScores`).
    """
    ranked = sorted(per_class, key=lambda row: (row["support"] == 0, row["f1"]))
    drawn_classes = ranked[:MAX_BARS]
    labels = [f"{format_label(row['name'], 20)} ({row['support']:,})" for row in drawn_classes]
    num_columns = math.ceil(len(drawn_classes) / 40)
    num_rows = math.ceil(len(drawn_classes) / num_columns)
    left = 12 + 6.6 * max(map(len, labels))  # in points, like all sizes below
    width, height = 570 if num_columns == 1 else left + 145, 72 + (22 if num_rows <= 15 else 17) * num_rows
    total_width = num_columns * width
    figure = create_figure(height / 72, total_width / 72, fit_labels=False)
    for column in range(num_columns):
        column_slice = slice(column * num_rows, (column + 1) * num_rows)
        rows = drawn_classes[column_slice]
        ys = range(len(rows))
        box = ((column * width + left) / total_width, 36 / height, (width - left - 8) / total_width, 1 - 66 / height)
        axes = figure.add_axes(box)
        style_axes(axes, "x", size=11)
        axes.barh(ys, [row["f1"] for row in rows], color=ACCENT, height=0.68)
        for y, row in zip(ys, rows, strict=True):
            x, text, color = (1.02, f"{row['f1']:.3f}", INK) if row["support"] else (0.02, "no examples", MUTED)
            axes.text(x, y, text, va="center", fontsize=11, color=color)
        axes.set_yticks(ys, labels[column_slice])
        axes.set(xlim=(0, 1.35 if num_columns > 1 else 1.1), ylim=(num_rows - 0.4, -0.6))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
        axes.axvline(macro_f1, color=WRONG, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("F1", fontsize=11, color=INK)
    selection = "" if len(drawn_classes) == len(ranked) else f", the weakest {len(drawn_classes)} of {len(ranked)}"
    title = f"F1 per class{selection} (number of examples); macro F1 {macro_f1:.3f} dashed"
    _draw_title(figure, title, 11)
    return Chart(figure, title)


def draw_calibration(bins: Sequence[Mapping[str, Any]], error: float) -> Chart:
    """Draw a reliability diagram (accuracy over confidence) above a histogram of the confidence. Omit empty bins.

    `bins` has the rows of `calibration_bins` in report.json (`trainer.report.schema.CalibrationBin`), and `error` is
    the expected calibration error.
    """
    nonempty = [b for b in bins if b["count"]]
    title = f"Accuracy (expected calibration error {error:.3f})"
    figure, upper = create_plot(title, 400, 400, left=50, top=36, right=20, bottom=124)
    lower = figure.add_axes((50 / 400, 40 / 400, 330 / 400, 70 / 400), sharex=upper)
    style_axes(lower, size=11, color=MUTED)
    lower.tick_params(pad=5)
    for axes in (upper, lower):
        axes.grid(axis="y", color=GRID_LINE, linewidth=1)
    upper.tick_params(labelbottom=False)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (lower.xaxis, upper.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="perfectly calibrated")
    points = ([b["confidence"] for b in nonempty], [b["accuracy"] for b in nonempty])
    upper.plot(*points, color=ACCENT, marker="o", markersize=6, linewidth=2, label="this model", gid="model")
    upper.legend(frameon=False, fontsize=11, loc="best", labelcolor=MUTED)
    lows, widths = [b["low"] for b in nonempty], [0.94 * (b["high"] - b["low"]) for b in nonempty]
    bars = lower.bar(lows, [b["count"] for b in nonempty], widths, align="edge", color=PALE)
    tips = {f"bar {i}": [f"{b['count']:,} examples"] for i, b in enumerate(nonempty)}
    for bar, gid in zip(bars, tips, strict=True):
        bar.set_gid(gid)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlabel("confidence, and number of examples", loc="right", fontsize=11, color=MUTED)
    tips["model"] = [
        f"confidence {100 * b['confidence']:.1f} %, accuracy {100 * b['accuracy']:.1f} %, {b['count']:,} examples"
        for b in nonempty
    ]
    return Chart(figure, "Calibration: accuracy over confidence", tips)


# Function from k rows of an `EvaluationResult` to their images, uint8 [k, S, S, 3].
FetchImages = Callable[[Sequence[int]], np.ndarray]

_TITLE_HEIGHT = 0.36  # inches


def draw_images(
    title: str, images: np.ndarray, captions: Sequence[str], columns: int = 6, colors: Sequence[str] | None = None
) -> Figure:
    """Draw a grid of images, each with a caption above it and a frame.

    All images are drawn on one Axes, with its origin in the upper left corner and inches as the unit. One Axes per
    image would take three times as long.

    Args:
        images: uint8 [k, S, S, 3] with k >= 1.
        captions: one per image; may have several lines.
        columns: maximum number of images in a row.
        colors: color of each image's frame and caption; by default frames are gray.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cell = WIDTH / max(columns, 3)
    caption_height = 0.06 + 0.16 * max(caption.count("\n") + 1 for caption in captions)
    side, width = cell - 0.14, max(cell * columns, 5.0)
    height = _TITLE_HEIGHT + rows * (side + caption_height + 0.1)
    figure = create_figure(height, width, fit_labels=False)
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = (i % columns) * cell + (width - columns * cell + 0.14) / 2
        top = _TITLE_HEIGHT + (i // columns) * (side + caption_height + 0.1) + caption_height
        color = colors[i] if colors else GRID_LINE
        interpolation = "nearest" if len(image) <= 64 else "antialiased"  # pixels of a tiny image have sharp edges
        axes.imshow(image, interpolation=interpolation, extent=(left, left + side, top + side, top), aspect="auto")
        line_width = 2.5 if colors else 0.8
        axes.add_patch(Rectangle((left, top), side, side, fill=False, color=color, linewidth=line_width))
        axes.text(left + side / 2, top - 0.06, caption, fontsize=9 if columns <= 4 else 8, linespacing=1.2,
                  color=color if colors else INK, ha="center", va="bottom")  # fmt: skip
    axes.text(0.08, 0.08, title, fontsize=11, fontweight="bold", color=INK, va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def draw_examples(
    title: str, result: EvaluationResult, fetch: FetchImages, indices: Sequence[int], show_files: bool = True
) -> Figure:
    """Draw examples with truth, prediction and probability. Correct predictions are green, wrong ones red.

    Args:
        fetch: function that reads the images of rows of `result`.
        indices: rows of `result` to draw; if there are none, the figure only has the text "TITLE: none".
        show_files: whether captions include the file name.
    """
    if not indices:
        figure = create_figure(height=1.0)
        figure.text(0.5, 0.5, f"{title}: none", ha="center", va="center", color=MUTED)
        return figure
    max_length, columns = (16, 4) if show_files else (28, 3)
    captions, colors = [], []
    for index in indices:
        k = int(result.probabilities[index].argmax())
        correct = k == result.labels[index]
        truth, prediction = (format_label(result.class_names[i], max_length) for i in (int(result.labels[index]), k))
        percent = f"{100 * result.probabilities[index, k]:.1f} %"
        file = format_label(PurePosixPath(result.names[index]).name, 22) + "\n" if show_files else ""
        captions.append(f"{file}truth: {truth}\n{'✓' if correct else '✗'} {prediction}, {percent}")
        colors.append(RIGHT if correct else WRONG)
    return draw_images(title, fetch(indices), captions, columns, colors)


def select_most_wrong(result: EvaluationResult, max_count: int = MAX_EXAMPLES) -> list[int]:
    """Return the rows of the wrong predictions with the highest probabilities, highest first."""
    predictions = result.probabilities.argmax(axis=1)
    wrong_rows = np.flatnonzero(predictions != result.labels)
    order = np.argsort(-result.probabilities[wrong_rows, predictions[wrong_rows]], kind="stable")
    return wrong_rows[order][:max_count].tolist()


def select_least_confident(result: EvaluationResult, max_count: int = MAX_EXAMPLES) -> list[int]:
    """Return the rows with the smallest margins between the two highest probabilities, smallest first."""
    if result.probabilities.shape[1] < 2:
        return []  # no margin is defined
    highest = -np.partition(-result.probabilities, 1, axis=1)[:, :2]
    return np.argsort(highest[:, 0] - highest[:, 1], kind="stable")[:max_count].tolist()


def select_random(result: EvaluationResult, seed: int) -> list[int]:
    """Return nine random rows, or all if there are fewer. The same seed and number of examples give the same rows."""
    n = len(result.labels)
    return np.random.default_rng([seed, n]).choice(n, min(9, n), replace=False).tolist()
