"""The figures of a report: curves, tables and galleries, drawn with matplotlib. No pyplot, no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.evaluation.predictions import printable
from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

DPI = 110
COMPRESSION = 2  # of 9: photos take half the time of the usual 6, and a tenth more bytes
WIDTH = 8.0  # inches; 880 pixels
INK, MUTED, RULE = "#1f2937", "#6b7280", "#d1d5db"
TRAINING, VALIDATION = "#94a3b8", "#2563eb"
RIGHT, DOUBTFUL, WRONG = "#15803d", "#d97706", "#b91c1c"


def canvas(height: float, width: float = WIDTH, laid_out: bool = True) -> Figure:
    """An empty white figure; sizes in inches. Laid out, it finds room for its labels, which takes a second drawing."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained" if laid_out else None, facecolor="white")


def label(name: str, longest: int = 24) -> str:
    """A class or file name as text of a figure: one line, not mathematics, cut in the middle where too long."""
    name = printable(name)
    if len(name) > longest:
        tail = longest // 2
        name = name[: longest - tail - 1] + "…" + name[-tail:]
    return name.replace("$", r"\$")


def tidy(axes: Axes, grid: str | None = None) -> None:
    """Light frame, and grid lines along one axis ("x" or "y") behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    if grid in ("x", "y"):
        axes.grid(axis="x" if grid == "x" else "y", color=RULE, linewidth=0.6)


def heading(axes: Axes, title: str, pad: float = 8) -> None:
    """A title at the left edge."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, whole or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes; the page and the CSV show it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(content, format="png", dpi=DPI, pil_kwargs={"compress_level": COMPRESSION})
    write_whole(path, content.getvalue())
    return path


# ---------------------------------------------------------------------------------------------------------------
# Figures of numbers: curves, confusion, F1 and calibration. Each function draws one PNG and returns its path

MOST_BARS = 120  # classes in the F1 figure
_NUMBERED = 20  # classes up to which a confusion matrix can hold its numbers and names


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One value an epoch; NaN where the run has none, as without a validation split."""
    return np.array([math.nan if row.get(key) is None else float(row[key]) for row in history])


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, best: Sequence[int]) -> None:
    epochs = np.array([row["epoch"] for row in history])
    marker = "o" if len(epochs) <= 40 else ""
    for prefix, name, colour in (("", "training", TRAINING), ("val_", "validation", VALIDATION)):
        values = _series(history, prefix + key)
        if not np.isfinite(values).any():
            continue
        axes.plot(epochs, values, color=colour, marker=marker, markersize=3.5, linewidth=1.8, label=name)
        if prefix:
            chosen = np.isin(epochs, best) & np.isfinite(values)
            ring: dict[str, Any] = {"s": 95, "facecolors": "none", "edgecolors": WRONG, "linewidths": 1.6, "zorder": 4}
            axes.scatter(epochs[chosen], values[chosen], label="best epoch of a phase", **ring)


def _mark_phases(axes: Axes, history: Sequence[Mapping[str, Any]], named: bool) -> None:
    starts: dict[str, int] = {}
    for row in history:
        starts.setdefault(row["phase"], row["epoch"])
    for phase, epoch in list(starts.items())[1:]:
        axes.axvline(epoch - 0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if named:
            slanted: dict[str, Any] = (
                {"rotation": 25, "ha": "left"} if len(starts) > 3 else {"rotation": 0, "ha": "center"}
            )
            place: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "xytext": (0, 3),
            }
            text = f"{label(phase)} starts"
            axes.annotate(text, (epoch - 0.5, 1.0), fontsize=9, color=INK, va="bottom", **place, **slanted)


def draw_curves(
    path: Path, history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Loss and accuracy of training and validation over all phases.

    Args:
        path: the PNG to write.
        history: one row an epoch, at least one: phase, epoch (counted over the whole run), loss, accuracy, val_loss,
            val_accuracy (None or NaN where there is no validation).
        phases: `best_epoch` of each (counted over the whole run) is ringed.
    """
    best = [phase["best_epoch"] for phase in (phases or {}).values() if phase.get("best_epoch") is not None]
    figure = canvas(6.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key in ((upper, "loss"), (lower, "accuracy")):
        tidy(axes, "y")
        _draw_curve(axes, history, key, best)
        _mark_phases(axes, history, named=axes is upper)
        axes.set_ylabel("loss (nats)" if key == "loss" else "accuracy", color=INK)
    heading(upper, "Training and validation", pad=22)
    high = np.nanmax(np.concatenate([_series(history, "loss"), _series(history, "val_loss"), [1e-3]]))
    upper.set_ylim(0, 1.08 * high)
    low = np.nanmin(np.concatenate([_series(history, "accuracy"), _series(history, "val_accuracy"), [1.0]]))
    lower.set_ylim(max(0.0, low - 0.05 * (1 - low) - 0.01), 1.0 + 0.03 * (1 - low) + 0.002)
    lower.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    first, last = history[0]["epoch"], history[-1]["epoch"]
    lower.set_xlim(first - 0.6, last + 0.6)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lower.set_xlabel("epoch", color=INK)
    upper.legend(frameon=False, fontsize=9, loc="best")
    return save(figure, path)


def _shares(confusion: np.ndarray) -> np.ma.MaskedArray:
    """Each row as shares of its class; masked where the class has no example."""
    support = confusion.sum(axis=1, keepdims=True)
    return np.ma.masked_array(confusion / np.maximum(support, 1), np.broadcast_to(support == 0, confusion.shape))


def _draw_matrix(axes: Axes, confusion: np.ndarray, gamma: float) -> None:
    shares = _shares(confusion)
    blues = colormaps["Blues"].with_extremes(bad="#f3f4f6")  # classes without an example
    image = axes.imshow(shares, cmap=blues, norm=PowerNorm(gamma, 0, 1), interpolation="nearest", aspect="equal")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, format=PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("share of the true class", fontsize=9, color=INK)
    axes.set_xlabel("prediction", color=INK)
    axes.set_ylabel("truth", color=INK)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_color(RULE)


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str]) -> Path:
    """The confusion matrix, coloured by the share of each true class.

    Up to 20 classes it holds names and counts; with more, the most frequent confusions stand below it as bars.

    Args:
        path: the PNG to write.
        confusion: int [c, c]; rows: truth, columns: prediction.
        class_names: c names.
    """
    table = np.asarray(confusion)
    classes = len(class_names)
    if classes > _NUMBERED:
        return _draw_large_confusion(path, table, class_names)
    names = [label(name) for name in class_names]
    empty = table.sum(axis=1) == 0
    rows = [name + (" (no examples)" if none else "") for name, none in zip(names, empty, strict=True)]
    side = max(2.6, 0.42 * classes)  # inches of the matrix; around it the names need their room
    figure = canvas(
        height=side + 1.0 + 0.055 * max(map(len, names)),
        width=max(side + 1.7 + 0.085 * max(map(len, rows)), 5.2),
    )
    axes = figure.subplots()
    _draw_matrix(axes, table, gamma=0.8)
    heading(axes, "Confusion matrix")
    turn: dict[str, Any] = (
        {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    )
    axes.set_xticks(range(classes), names, **turn)
    axes.set_yticks(range(classes), rows)
    shares = _shares(table).filled(0)
    size = 10 if classes <= 10 else 8
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=size, color=colour)
    return save(figure, path)


def _draw_large_confusion(path: Path, table: np.ndarray, class_names: Sequence[str]) -> Path:
    wrong = table * (1 - np.eye(len(table), dtype=table.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:15]
    pairs = [(int(i) // len(table), int(i) % len(table)) for i in order if wrong.flat[i] > 0]
    heights = [6.4, 0.9 + 0.27 * max(len(pairs), 2)]
    figure = canvas(height=sum(heights))
    upper, lower = (part.subplots() for part in figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0])
    _draw_matrix(upper, table, gamma=0.5)
    heading(upper, f"Confusion matrix of {len(table)} classes, in their order")
    heading(lower, "Most frequent confusions")
    tidy(lower, "x")
    if not pairs:
        lower.set_axis_off()
        lower.text(0.5, 0.5, "no class is taken for another", ha="center", va="center", color=MUTED)
        return save(figure, path)
    counts = [int(wrong[pair]) for pair in pairs]
    lower.barh(range(len(pairs)), counts, color=WRONG, height=0.7)
    for place, ((truth, _), count) in enumerate(zip(pairs, counts, strict=True)):
        note = f" {count:,} of {table[truth].sum():,}"
        lower.text(count, place, note, va="center", fontsize=8.5, color=MUTED)
    texts = [f"{label(class_names[truth])} taken for {label(class_names[answer])}" for truth, answer in pairs]
    lower.set_yticks(range(len(pairs)), texts, fontsize=9)
    lower.set_ylim(len(pairs) - 0.4, -0.6)
    lower.set_xlim(0, max(counts) * 1.15)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlabel("examples", color=INK)
    return save(figure, path)


def draw_f1(path: Path, per_class: Sequence[Mapping[str, Any]], macro_f1: float) -> Path:
    """F1 of each class as bars, weakest first, in columns of 40; of more than 120 classes the weakest 120.

    Args:
        path: the PNG to write.
        per_class: name, f1, support of each class. Classes without an example come last, without a bar.
        macro_f1: drawn as a line.
    """
    ranked = sorted(per_class, key=lambda row: (row["support"] == 0, row["f1"]))
    shown = ranked[:MOST_BARS]
    columns = math.ceil(len(shown) / 40)
    height = math.ceil(len(shown) / columns)
    step = 0.3 if len(shown) <= 15 else 0.215
    figure = canvas(height=1.5 + step * height, width=WIDTH if columns == 1 else 1.5 + 3.3 * columns)
    all_axes = figure.subplots(1, columns, squeeze=False)[0]
    size = 9.5 if len(shown) <= 15 else 8
    for column, axes in enumerate(all_axes):
        rows = shown[column * height : (column + 1) * height]
        tidy(axes, "x")
        places = range(len(rows))
        axes.barh(places, [row["f1"] for row in rows], color=VALIDATION, height=0.68)
        for place, row in zip(places, rows, strict=True):
            if row["support"]:
                axes.text(1.02, place, f"{row['f1']:.3f}", va="center", fontsize=size, color=INK)
            else:
                axes.text(0.02, place, "no examples", va="center", fontsize=size, color=MUTED)
        axes.set_yticks(places, [f"{label(row['name'], 20)} ({row['support']:,})" for row in rows], fontsize=size)
        axes.set_ylim(height - 0.4, -0.6)
        axes.set_xlim(0, 1.2 if columns > 1 else 1.1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
        axes.axvline(macro_f1, color=WRONG, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("F1", color=INK)
    rest = "" if len(shown) == len(ranked) else f", the weakest {len(shown)} of {len(ranked)}"
    title = f"F1 of each class{rest} (number of examples); macro F1 {macro_f1:.3f} dashed"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return save(figure, path)


def draw_calibration(path: Path, bins: Sequence[Mapping[str, Any]], error: float) -> Path:
    """How often predictions of a given confidence are right, above a histogram of the confidence.

    Args:
        path: the PNG to write.
        bins: low, high, count, confidence, accuracy, as `metrics.calibration` gives them.
        error: the expected calibration error.
    """
    figure = canvas(height=6.4, width=6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    full = [b for b in bins if b["count"]]
    lows, widths = [b["low"] for b in full], [b["high"] - b["low"] for b in full]
    tidy(upper, "y")
    upper.bar(lows, [b["accuracy"] for b in full], widths, align="edge", color=VALIDATION, edgecolor="white", alpha=0.8)
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="perfectly calibrated")
    points = ([b["confidence"] for b in full], [b["accuracy"] for b in full])
    upper.plot(*points, color=INK, marker="o", markersize=4, linewidth=1, label="this model")
    upper.set_ylabel("share that is right", color=INK)
    upper.set_ylim(0, 1.02)
    upper.yaxis.set_major_formatter(PercentFormatter(1.0))
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    heading(upper, f"Calibration (expected error {error:.3f})")
    tidy(lower, "y")
    lower.bar(lows, [b["count"] for b in full], widths, align="edge", color=TRAINING, edgecolor="white")
    lower.set_ylabel("examples", color=INK)
    lower.set_xlabel("confidence: the probability of the prediction", color=INK)
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(PercentFormatter(1.0))
    lower.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return save(figure, path)


# ---------------------------------------------------------------------------------------------------------------
# Figures of pictures: samples, augmented views, predictions, mistakes. Each draws one PNG and returns its path

# Fetches pictures of the evaluated split by example index: uint8 [k, S, S, 3].
Images = Callable[[Sequence[int]], np.ndarray]

MOST_WRONG = 12
TOP = 0.36  # inches that the title takes


def _draw_grid(
    path: Path,
    title: str,
    pictures: np.ndarray,
    captions: Sequence[str],
    columns: int,
    colours: Sequence[str] | None = None,
) -> Path:
    """Pictures uint8 [k, S, S, 3] in rows, each with a caption of a few lines above it and a coloured frame.

    All in one pair of axes, in inches from the upper left corner: a pair a picture, which matplotlib lays out itself,
    takes three times as long.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    cell = WIDTH / max(columns, 3)
    above = 0.06 + 0.16 * max(caption.count("\n") + 1 for caption in captions)
    side, width = cell - 0.14, max(cell * columns, 5.0)
    height = TOP + rows * (side + above + 0.1)
    figure = canvas(height, width, laid_out=False)
    axes = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = (number % columns) * cell + (width - columns * cell + 0.14) / 2
        top = TOP + (number // columns) * (side + above + 0.1) + above
        colour = colours[number] if colours else RULE
        # A picture smaller than its cell keeps its pixels sharp; a larger one is averaged down.
        sharp = "nearest" if len(picture) <= 64 else "antialiased"
        axes.imshow(picture, interpolation=sharp, extent=(left, left + side, top + side, top), aspect="auto")
        frame = Rectangle((left, top), side, side, fill=False, color=colour, linewidth=2.5 if colours else 0.8)
        axes.add_patch(frame)
        axes.text(left + side / 2, top - 0.06, caption, fontsize=9 if columns <= 4 else 8, linespacing=1.2,
                  color=colour if colours else INK, ha="center", va="bottom")  # fmt: skip
    axes.text(0.08, 0.08, title, fontsize=11, fontweight="bold", color=INK, va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return save(figure, path)


def draw_samples(path: Path, pictures: np.ndarray, class_names: Sequence[str]) -> Path:
    """Training pictures with their class.

    Args:
        path: the PNG to write.
        pictures: uint8 [k, S, S, 3], k >= 1.
        class_names: the class of each picture.
    """
    captions = [label(name, 20) for name in class_names]
    return _draw_grid(path, "Training examples, as the model sees them", pictures, captions, 6)


def draw_augmentation(path: Path, original: np.ndarray, views: np.ndarray) -> Path:
    """One training picture and what augmentation makes of it in several epochs.

    Args:
        path: the PNG to write.
        original: uint8 [S, S, 3].
        views: uint8 [k, S, S, 3], k >= 1.
    """
    pictures = np.concatenate([original[None], views])
    captions = ["original"] + [f"view {i}" for i in range(1, len(views) + 1)]
    return _draw_grid(path, "One training example under augmentation", pictures, captions, 6)


def _captions(result: EvaluationResult, indices: Sequence[int], longest: int) -> tuple[list[str], list[str]]:
    captions, colours = [], []
    for index in indices:
        answer = int(result.probabilities[index].argmax())
        right = answer == result.labels[index]
        truth, said = (label(result.class_names[k], longest) for k in (int(result.labels[index]), answer))
        share = f"{100 * result.probabilities[index, answer]:.1f} %"
        captions.append(f"truth: {truth}\n{'✓' if right else '✗'} {said}, {share}")
        colours.append(RIGHT if right else WRONG)
    return captions, colours


def draw_predictions(path: Path, result: EvaluationResult, images: Images, seed: int) -> Path:
    """Nine examples drawn by the seed, with truth, prediction and probability; green is right, red is wrong."""
    indices = find_random(result, seed)
    captions, colours = _captions(result, indices, 28)
    title = f"Random {result.split} examples and the model's answers"
    return _draw_grid(path, title, images(indices), captions, 3, colours)


def find_most_wrong(result: EvaluationResult, most: int = MOST_WRONG) -> list[int]:
    """Indices of the wrong predictions, the surest first; equals by index."""
    answers = result.probabilities.argmax(axis=1)
    wrong = np.flatnonzero(answers != result.labels)
    order = np.argsort(-result.probabilities[wrong, answers[wrong]], kind="stable")
    return [int(i) for i in wrong[order][:most]]


def find_least_sure(result: EvaluationResult, most: int = MOST_WRONG) -> list[int]:
    """Indices of the examples whose two highest probabilities are closest, closest first; equals by index."""
    if result.probabilities.shape[1] < 2:
        return []
    highest = -np.partition(-result.probabilities, 1, axis=1)[:, :2]
    return [int(i) for i in np.argsort(highest[:, 0] - highest[:, 1], kind="stable")[:most]]


def find_random(result: EvaluationResult, seed: int) -> list[int]:
    """Indices of nine examples drawn by the seed."""
    n = len(result.labels)
    return [int(i) for i in np.random.default_rng([seed, n]).choice(n, min(9, n), replace=False)]


def draw_most_wrong(path: Path, result: EvaluationResult, images: Images) -> Path:
    """The wrong predictions with the highest probability, with their file names: label errors show up here."""
    indices = find_most_wrong(result)
    if not indices:
        figure = canvas(height=1.0)
        figure.text(0.5, 0.5, f"Every {result.split} example is right.", ha="center", va="center", color=MUTED)
        return save(figure, path)
    return _draw_named(path, "Wrong, and most sure of it", result, images, indices)


def draw_least_sure(path: Path, result: EvaluationResult, images: Images) -> Path:
    """The examples between two classes, with their file names."""
    return _draw_named(path, "Least sure", result, images, find_least_sure(result))


def _draw_named(path: Path, title: str, result: EvaluationResult, images: Images, indices: Sequence[int]) -> Path:
    captions, colours = _captions(result, indices, 16)
    names = [label(PurePosixPath(result.names[index]).name, 22) for index in indices]
    captions = [f"{name}\n{caption}" for name, caption in zip(names, captions, strict=True)]
    return _draw_grid(path, title, images(indices), captions, 4, colours)
