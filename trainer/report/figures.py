"""Figures of a report, drawn with matplotlib: SVG for the page, PNG for the folder and TensorBoard.

Uses neither pyplot nor global state.
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

from trainer.evaluation.predictions import printable
from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

DPI = 110
COMPRESSION = 2  # of 9: half the time of the default 6 for photos, a tenth more bytes
WIDTH = 8.0  # inches; 880 pixels
NUMBERED = 20  # classes up to which a confusion matrix has counts and names
MAX_BARS = 120  # classes in the F1 figure
MAX_EXAMPLES = 12  # in a figure of examples
INK, MUTED, RULE = "#1f2937", "#6b7280", "#d1d5db"
TRAINING, VALIDATION = "#94a3b8", "#2563eb"
RIGHT, DOUBTFUL, WRONG = "#15803d", "#d97706", "#b91c1c"
SERIES = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490")  # of compared runs

# The custom properties of report.css that replace colours, so that charts in the page follow light and dark.
PROPERTIES = {
    INK: "--ink", MUTED: "--soft", RULE: "--rule", TRAINING: "--faint", VALIDATION: "--lead", WRONG: "--wrong",
    **{colour: f"--s{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip


def canvas(height: float, width: float = WIDTH, laid_out: bool = True) -> Figure:
    """Create an empty white figure; sizes in inches. `laid_out` fits it to its labels, which draws it twice."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained" if laid_out else None, facecolor="white")


def shortened(name: str, longest: int) -> str:
    """Return a printable name, cut in the middle if it is too long."""
    name, tail = printable(name), longest // 2
    return name if len(name) <= longest else name[: longest - tail - 1] + "…" + name[-tail:]


def label(name: str, longest: int = 24) -> str:
    """Return a class or file name as text of a figure: one line, without mathtext, cut in the middle if too long."""
    return shortened(name, longest).replace("$", r"\$")


def tidy(axes: Axes, grid: Literal["x", "y"] | None = None) -> None:
    """Give axes a light frame, and grid lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=RULE, linewidth=0.6)


def heading(axes: Axes, title: str) -> None:
    """Put a title at the left edge of axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)


@contextmanager
def _any_script() -> Iterator[None]:
    """Ignore warnings of glyphs that matplotlib's font lacks: boxes in a PNG, correct in the page and the CSV."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save(figures: Figure | Sequence[Figure], path: Path) -> Path:
    """Write a figure, or several below each other, as PNG atomically."""
    drawn = []
    for figure in [figures] if isinstance(figures, Figure) else figures:
        agg = FigureCanvasAgg(figure)
        with _any_script():
            agg.draw()
        drawn.append(np.asarray(agg.buffer_rgba())[..., :3])
    width = max(pixels.shape[1] for pixels in drawn)
    whole = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in drawn]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(whole)).save(content, "PNG", compress_level=COMPRESSION, dpi=(DPI, DPI))
    write_whole(path, content.getvalue())
    return path


@dataclass(frozen=True)
class Chart:
    """A figure that the page shows as SVG, in units of its pixels."""

    figure: Figure
    alt_text: str
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)  # gid of an artist -> tooltips of its marks

    def __post_init__(self) -> None:
        for artist in self.figure.findobj():
            artist.set_clip_on(False)  # marks on the edge of the axes are drawn whole


def svg(name: str, chart: Chart) -> Markup:
    """Convert a chart to <svg> for an HTML page: real text, colours of the page, identifiers unique to `name`."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _any_script():
        chart.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    box = root.attrib["viewBox"]
    for element in list(root.iter()):
        element.tag = element.tag.partition("}")[2]
        if element.tag == "g" and (tips := chart.tips.get(element.attrib.pop("id", ""))):
            marks = element.findall(".//{*}use") or [element]
            for mark, tip in zip(marks, tips, strict=True):
                ElementTree.SubElement(mark, "title").text = tip
        if address := element.attrib.pop("{http://www.w3.org/1999/xlink}href", None):
            element.set("href", address)
        if style := element.get("style"):
            style = re.sub(r"font-family: [^;]*;? ?", "", style)
            for colour, name_of in PROPERTIES.items():
                style = style.replace(colour, f"var({name_of})")
            element.set("style", style)
        element.text, element.tail = (element.text or "").strip() or None, None
    root.attrib = {"class": "chart", "viewBox": box, "role": "img", "aria-label": chart.alt_text}
    for group in [part for part in root if part.tag == "metadata" or part.find("style") is not None]:
        root.remove(group)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _plot(
    title: str, width: float, height: float, *, left: float, top: float, right: float = 10, bottom: float = 36
) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes; size and fixed margins in pixels of the page."""
    figure = canvas(height / 72, width / 72, laid_out=False)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    tidy(axes)
    axes.tick_params(colors=MUTED, labelsize=11)
    _title(figure, title)
    return figure, axes


def _title(figure: Figure, title: str, size: float = 13) -> None:
    height = figure.get_figheight() * 72
    figure.text(4 / 72 / figure.get_figwidth(), 1 - 16 / height, title, fontsize=size, fontweight="bold", color=INK)


@dataclass(frozen=True)
class Line:
    """A series of values over epochs; a missing value is NaN or None."""

    name: str
    colour: str
    epochs: Sequence[float]
    values: Sequence[float | None]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Return (epoch, value) of the values that are not missing."""
        pairs = zip(self.epochs, self.values, strict=True)
        return [(epoch, float(value)) for epoch, value in pairs if value is not None and math.isfinite(value)]


def _scientific(value: float) -> str:
    """Format a number below 1 as 7.5e-4."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    fractions: bool = False,
    marks: Mapping[str, float] | None = None,
    rings: Sequence[tuple[float, float]] = (),
    keys: bool = False,
) -> Chart | None:
    """Draw lines over the epochs; None if there is nothing to draw.

    Args:
        fractions: the values are fractions, shown in percent up to 100; otherwise the axis begins at 0.
        marks: vertical lines, name -> epoch.
        rings: (epoch, value) of the best epochs of phases.
        keys: True for a legend.
    """
    drawn = [(line, line.points) for line in lines if line.points]
    if not drawn:
        return None
    epochs, values = zip(*(point for _, points in drawn for point in points), strict=True)
    first, last = min(epochs) - 0.5, max(epochs) + 0.5
    low, high = (min(values), 1.0) if fractions else (0.0, max(values))
    room = 0.06 * max(high - low, 1e-6)
    marks = marks or {}
    step = (400 - 46 - 10) / (last - first)
    crowded = any((b - a) * step < 6.5 * len(name) + 4 for (name, a), (_, b) in pairwise(marks.items()))
    top = 78 if crowded else 44
    figure, axes = _plot(title, 400, 204 + top, left=46, top=top)
    axes.grid(axis="y", color=RULE, linewidth=1)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(first, last), ylim=(max(0.0, low - room), high if fractions else high + room))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    form = (lambda v: f"{100 * v:.4g}%") if fractions else (_scientific if 0 < high < 0.01 else lambda v: f"{v:.3g}")
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    axes.set_xlabel("epoch", loc="right", fontsize=11, color=MUTED, labelpad=1)
    for name, epoch in marks.items():
        axes.axvline(epoch, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), gid=f"mark {name}")
        turn: dict[str, Any] = {"rotation": 30 if crowded else 0, "rotation_mode": "anchor"}
        axes.annotate(label(name, 12 if crowded else 24), (epoch, 1), xycoords=("data", "axes fraction"),
                      xytext=(3, 5), textcoords="offset points", fontsize=11, color=MUTED, **turn)  # fmt: skip
    tips = {f"mark {name}": [f"{name} starts"] for name in marks}
    for number, (line, points) in enumerate(drawn):
        dots: dict[str, Any] = {"marker": "o", "markersize": 6} if len(points) <= 60 else {}
        axes.plot(*zip(*points, strict=True), color=line.colour, linewidth=2, label=label(line.name), gid=str(number),
                  **dots)  # fmt: skip
        if dots:
            shown = [(epoch, f"{100 * v:.2f} %" if fractions else f"{v:.4g}") for epoch, v in points]
            tips[str(number)] = [f"{printable(line.name)}, epoch {epoch:g}: {value}" for epoch, value in shown]
    if rings:
        axes.plot(*zip(*rings, strict=True), linestyle="", marker="o", markersize=13, markerfacecolor="none",
                  markeredgecolor=WRONG, markeredgewidth=1.6, label="best epoch of a phase", gid="rings")  # fmt: skip
        tips["rings"] = [f"best epoch of a phase: {epoch:g}" for epoch, _ in rings]
    if keys:
        axes.legend(frameon=False, fontsize=11, loc="lower right" if fractions else "upper right", labelcolor=MUTED)
    return Chart(figure, f"{title}: {', '.join(printable(line.name) for line in lines)}", tips)


def draw_curves(
    history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Chart]:
    """Draw charts of loss, accuracy and learning rate over all phases, with rings at the best epoch of each phase.

    Args:
        history: as `write_report`; at least one row. Without validation its scores are None or NaN.
        phases: as `write_report`.
    """
    epochs = [float(row["epoch"]) for row in history]
    best = [phase["best_epoch"] for phase in (phases or {}).values() if phase.get("best_epoch") is not None]
    starts: dict[str, float] = {}
    for row in history:
        starts.setdefault(str(row["phase"]), row["epoch"] - 0.5)
    marks = starts if len(starts) > 1 else None

    def line(name: str, colour: str, key: str) -> Line:
        return Line(name, colour, epochs, [row.get(key) for row in history])

    charts = []
    for title, key in (("Loss (nats)", "loss"), ("Accuracy", "accuracy")):
        lines = [line("training", TRAINING, key), line("validation", VALIDATION, f"val_{key}")]
        rings = [point for point in lines[1].points if point[0] in best]
        charts.append(line_chart(title, lines, fractions=key == "accuracy", marks=marks, rings=rings, keys=True))
    charts.append(line_chart("Learning rate", [line("learning rate", TRAINING, "learning_rate")], marks=marks))
    return [chart for chart in charts if chart]


def mistakes(confusion: np.ndarray) -> np.ndarray:
    """Return the confusion matrix, int [c, c], with zeros in the diagonal."""
    return confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))


def top_confusions(confusion: np.ndarray, most: int = 15) -> list[tuple[int, int, int]]:
    """Return (truth, prediction, examples) of the most frequent mistakes of int [c, c]; ties by class."""
    wrong = mistakes(confusion)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(cell), len(wrong)) for cell in order]
    return [(truth, other, int(wrong[truth, other])) for truth, other in pairs if wrong[truth, other]]


def _draw_matrix(axes: Axes, confusion: np.ndarray) -> np.ndarray:
    """Draw one pixel per cell: blue if correct, red if wrong, grey rows for classes without examples.

    Returns the opacity, float [c, c] in 0..1, which grows with the fraction of the true class.
    """
    support = confusion.sum(axis=1, keepdims=True)
    opacity = np.where(confusion > 0, 0.15 + 0.85 * (confusion / np.maximum(support, 1)) ** 0.5, 0)
    pixels = np.zeros((*confusion.shape, 4))
    pixels[..., :3] = matplotlib.colors.to_rgb(WRONG)
    np.einsum("iij->ij", pixels)[:, :3] = matplotlib.colors.to_rgb(VALIDATION)
    pixels[..., 3] = opacity
    pixels[support[:, 0] == 0] = (0.5, 0.5, 0.5, 0.15)
    axes.imshow(np.rint(255 * pixels).astype(np.uint8), interpolation="none")
    axes.set_xlabel("prediction", color=MUTED, fontsize=11)
    axes.set_ylabel("truth", color=MUTED, fontsize=11)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(RULE)
    return opacity


def draw_confusion(confusion: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str]) -> list[Chart]:
    """Draw the confusion matrix, int [c, c] (rows: truth), coloured by the fraction of the true class.

    Up to `NUMBERED` classes it has names and counts; with more, a second chart has the most frequent confusions.
    """
    table, classes = np.asarray(confusion), len(class_names)
    if classes > NUMBERED:
        title = f"Confusion matrix of {classes} classes, in their order"
        figure, axes = _plot(title, 560, 580, left=56, top=30)
        _draw_matrix(axes, table)
        return [Chart(figure, title), _draw_confusions(table, class_names)]
    names = [label(name) for name in class_names]
    rows = [
        name + ("" if support else " (no examples)") for name, support in zip(names, table.sum(axis=1), strict=True)
    ]
    side = max(190, 32 * classes)  # of the matrix, without the names around it
    left, bottom = 36 + 6.6 * max(map(len, rows)), 40 + 5 * max(map(len, names))
    width, height, right = max(left + side + 20, 340), side + bottom + 36, max(20, 320 - left - side)
    figure, axes = _plot("Confusion matrix", width, height, left=left, top=36, right=right, bottom=bottom)
    opacity = _draw_matrix(axes, table)
    long = max(map(len, names)) > 3
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(classes), names, **slant)
    axes.set_yticks(range(classes), rows)
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if opacity[row, column] > 0.7 else INK
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=10, color=colour)
    return [Chart(figure, "Confusion matrix")]


def _draw_confusions(table: np.ndarray, class_names: Sequence[str]) -> Chart:
    pairs, title = top_confusions(table), "Most frequent confusions"
    figure, axes = _plot(title, 560, 66 + 20 * max(len(pairs), 2), left=330, top=30, right=70)
    if not pairs:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no class is confused with another", ha="center", va="center", color=MUTED)
        return Chart(figure, "No class is confused with another")
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=WRONG, height=0.7)
    for y, (truth, _, count) in enumerate(pairs):
        axes.text(count, y, f" {count:,} of {table[truth].sum():,}", va="center", fontsize=9, color=MUTED)
    texts = [f"{label(class_names[t], 22)} predicted as {label(class_names[p], 22)}" for t, p, _ in pairs]
    axes.set_yticks(range(len(pairs)), texts, fontsize=9)
    axes.set(xlim=(0, pairs[0][2]), ylim=(len(pairs) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("examples", color=MUTED)
    return Chart(figure, title)


def draw_f1(per_class: Sequence[Mapping[str, Any]], macro_f1: float) -> Figure:
    """Draw F1 per class as bars, weakest first, in columns of 40; of more than 120 classes the weakest 120.

    Classes without examples come last, without a bar; macro F1 is a dashed line.
    """
    ranked = sorted(per_class, key=lambda row: (row["support"] == 0, row["f1"]))
    shown = ranked[:MAX_BARS]
    texts = [f"{label(row['name'], 20)} ({row['support']:,})" for row in shown]
    columns = math.ceil(len(shown) / 40)
    length = math.ceil(len(shown) / columns)
    size, step = (9.5, 22) if len(shown) <= 15 else (8, 15.5)
    left = 12 + 0.66 * size * max(map(len, texts))
    width, height = left + (570 - left if columns == 1 else 150), 72 + step * length
    figure = canvas(height / 72, columns * width / 72, laid_out=False)
    for column in range(columns):
        part = slice(column * length, (column + 1) * length)
        rows, ys = shown[part], range(len(shown[part]))
        low, high = (column * width + left) / (columns * width), ((column + 1) * width - 8) / (columns * width)
        axes = figure.add_axes((low, 36 / height, high - low, 1 - 66 / height))
        tidy(axes, "x")
        axes.barh(ys, [row["f1"] for row in rows], color=VALIDATION, height=0.68)
        for y, row in zip(ys, rows, strict=True):
            x, text, colour = (1.02, f"{row['f1']:.3f}", INK) if row["support"] else (0.02, "no examples", MUTED)
            axes.text(x, y, text, va="center", fontsize=size, color=colour)
        axes.set_yticks(ys, texts[part], fontsize=size)
        axes.set(xlim=(0, 1.25 if columns > 1 else 1.1), ylim=(length - 0.4, -0.6))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
        axes.axvline(macro_f1, color=WRONG, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("F1", color=INK)
    rest = "" if len(shown) == len(ranked) else f", the weakest {len(shown)} of {len(ranked)}"
    _title(figure, f"F1 per class{rest} (number of examples); macro F1 {macro_f1:.3f} dashed", 11)
    return figure


def draw_calibration(bins: Sequence[Mapping[str, Any]], error: float) -> Chart:
    """Draw a reliability diagram, accuracy over confidence, above a histogram of the confidence (`calibration`)."""
    full = [b for b in bins if b["count"]]
    title = f"Accuracy (expected calibration error {error:.3f})"
    figure, upper = _plot(title, 400, 400, left=50, top=36, right=20, bottom=124)
    lower = figure.add_axes((50 / 400, 40 / 400, 330 / 400, 70 / 400), sharex=upper)
    tidy(lower)
    lower.tick_params(colors=MUTED, labelsize=11, pad=5)
    for axes in (upper, lower):
        axes.grid(axis="y", color=RULE, linewidth=1)
    upper.tick_params(labelbottom=False)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="perfectly calibrated")
    points = ([b["confidence"] for b in full], [b["accuracy"] for b in full])
    upper.plot(*points, color=VALIDATION, marker="o", markersize=6, linewidth=2, label="this model", gid="model")
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.legend(frameon=False, fontsize=11, loc="best", labelcolor=MUTED)
    lows, widths = [b["low"] for b in full], [0.94 * (b["high"] - b["low"]) for b in full]
    bars = lower.bar(lows, [b["count"] for b in full], widths, align="edge", color=TRAINING)
    tips = {f"bar {number}": [f"{b['count']:,} examples"] for number, b in enumerate(full)}
    for bar, gid in zip(bars, tips, strict=True):
        bar.set_gid(gid)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlabel("confidence, and number of examples", loc="right", fontsize=11, color=MUTED)
    tips["model"] = [
        f"confidence {100 * b['confidence']:.1f} %, accuracy {100 * b['accuracy']:.1f} %, {b['count']:,} examples"
        for b in full
    ]
    return Chart(figure, "Calibration: accuracy over confidence", tips)


# Fetches images of the scored split by example index: uint8 [k, S, S, 3].
Images = Callable[[Sequence[int]], np.ndarray]

TOP = 0.36  # inches above the images, for the title


def _draw_grid(
    title: str, images: np.ndarray, captions: Sequence[str], columns: int, colours: Sequence[str] | None = None
) -> Figure:
    """Draw images uint8 [k, S, S, 3] in rows, each with a caption above it and a coloured frame.

    One pair of axes, in inches from the upper left corner, takes a third of the time of one pair per image.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cell = WIDTH / max(columns, 3)
    above = 0.06 + 0.16 * max(caption.count("\n") + 1 for caption in captions)
    side, width = cell - 0.14, max(cell * columns, 5.0)
    height = TOP + rows * (side + above + 0.1)
    figure = canvas(height, width, laid_out=False)
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = (number % columns) * cell + (width - columns * cell + 0.14) / 2
        top = TOP + (number // columns) * (side + above + 0.1) + above
        colour = colours[number] if colours else RULE
        # An image smaller than its cell retains sharp pixels; a larger one is averaged.
        sharp = "nearest" if len(image) <= 64 else "antialiased"
        axes.imshow(image, interpolation=sharp, extent=(left, left + side, top + side, top), aspect="auto")
        frame = Rectangle((left, top), side, side, fill=False, color=colour, linewidth=2.5 if colours else 0.8)
        axes.add_patch(frame)
        axes.text(left + side / 2, top - 0.06, caption, fontsize=9 if columns <= 4 else 8, linespacing=1.2,
                  color=colour if colours else INK, ha="center", va="bottom")  # fmt: skip
    axes.text(0.08, 0.08, title, fontsize=11, fontweight="bold", color=INK, va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def draw_samples(images: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw training images, uint8 [k, S, S, 3], k >= 1, with the class of each."""
    captions = [label(name, 20) for name in class_names]
    return _draw_grid("Training examples, as the input of the model", images, captions, 6)


def draw_augmentation(original: np.ndarray, views: np.ndarray) -> Figure:
    """Draw a training image, uint8 [S, S, 3], and its augmented views, uint8 [k, S, S, 3], k >= 1."""
    captions = ["original"] + [f"view {i}" for i in range(1, len(views) + 1)]
    return _draw_grid("One training example under augmentation", np.stack([original, *views]), captions, 6)


def draw_examples(
    title: str, result: EvaluationResult, images: Images, indices: Sequence[int], named: bool = True
) -> Figure:
    """Draw examples with truth, prediction and probability, green or red, and if `named` with their file names."""
    if not indices:
        figure = canvas(height=1.0)
        figure.text(0.5, 0.5, f"{title}: none", ha="center", va="center", color=MUTED)
        return figure
    longest, columns = (16, 4) if named else (28, 3)
    captions, colours = [], []
    for index in indices:
        k = int(result.probabilities[index].argmax())
        correct = k == result.labels[index]
        truth, prediction = (label(result.class_names[i], longest) for i in (int(result.labels[index]), k))
        percent = f"{100 * result.probabilities[index, k]:.1f} %"
        file = label(PurePosixPath(result.names[index]).name, 22) + "\n" if named else ""
        captions.append(f"{file}truth: {truth}\n{'✓' if correct else '✗'} {prediction}, {percent}")
        colours.append(RIGHT if correct else WRONG)
    return _draw_grid(title, images(indices), captions, columns, colours)


def find_most_wrong(result: EvaluationResult, most: int = MAX_EXAMPLES) -> list[int]:
    """Return indices of the wrong predictions, highest probability first; ties by index."""
    predictions = result.probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predictions != result.labels)
    order = np.argsort(-result.probabilities[wrong, predictions[wrong]], kind="stable")
    return [int(i) for i in wrong[order][:most]]


def find_least_sure(result: EvaluationResult, most: int = MAX_EXAMPLES) -> list[int]:
    """Return indices of the examples with the smallest margin of the two highest probabilities; ties by index."""
    if result.probabilities.shape[1] < 2:
        return []
    highest = -np.partition(-result.probabilities, 1, axis=1)[:, :2]
    return [int(i) for i in np.argsort(highest[:, 0] - highest[:, 1], kind="stable")[:most]]


def find_random(result: EvaluationResult, seed: int) -> list[int]:
    """Draw the indices of nine examples by the seed."""
    n = len(result.labels)
    return [int(i) for i in np.random.default_rng([seed, n]).choice(n, min(9, n), replace=False)]
