"""Figures of pictures: samples, augmented views, predictions, mistakes. Each draws one PNG and returns its path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.patches import Rectangle

from trainer.contracts import EvaluationResult
from trainer.evaluation.drawing import INK, MUTED, RIGHT, RULE, WIDTH, WRONG, canvas, label, save

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
