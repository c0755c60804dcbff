"""Render the page about a dataset, and draw the figures that are stored next to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from trainer.config.schema import RunConfig
from trainer.look.facts import Facts
from trainer.look.suggestions import Suggestion
from trainer.report.figures import (
    INK,
    SERIES,
    create_figure,
    draw_images,
    format_label,
    set_heading,
    style_axes,
)  # fmt: skip
from trainer.report.page import THUMBNAIL_PIXELS, embed_thumbnail, render

MAX_DRAWN = 60  # maximum number of images in examples.png
MAX_CAPTION = 16  # maximum number of characters of a caption
MAX_BARS = 60  # number of classes in counts.png
MAX_ROWS = 1_000  # number of classes in the table of counts
THUMBNAIL_SIDE = 80  # longest side, in pixels, of the images on a page with more than `MANY_CLASSES` classes
MANY_CLASSES = 60
# EXIF orientation -> name on the page.
ORIENTATIONS = {
    1: "upright", 2: "mirrored", 3: "upside down", 4: "upside down, mirrored", 5: "on its side, mirrored",
    6: "on its left side", 7: "on its side, mirrored", 8: "on its right side",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A training image, and its file or record."""

    file: str  # path, or PATH#RECORD
    pixels: np.ndarray  # uint8 [S, S, 3]


@dataclass(frozen=True)
class AugmentedImage:
    """A training image, and its augmented views in the first v epochs."""

    example: Example
    class_name: str
    index: int  # example index in the training split
    views: np.ndarray  # uint8 [v, S, S, 3]


@dataclass(frozen=True)
class PageImages:
    """The images on the page, decoded at the image size of training."""

    examples: Mapping[str, Sequence[Example]]  # class name -> examples
    augmented: Sequence[AugmentedImage]
    duplicates: Sequence[Sequence[np.ndarray]]  # some images of each of the first groups in `Facts.duplicates`


def draw_examples(examples: Mapping[str, Sequence[Example]]) -> Figure:
    """Draw at most `MAX_DRAWN` examples, grouped by class. `examples`: class name -> examples."""
    per_class = max(MAX_DRAWN // max(len(examples), 1), 1)
    named_pixels = [(name, e.pixels) for name, members in examples.items() for e in members[:per_class]][:MAX_DRAWN]
    if not named_pixels:
        figure = create_figure(height=1.0)
        figure.text(0.5, 0.5, "no example can be decoded", ha="center", va="center", color=INK)
        return figure
    captions = [format_label(name, MAX_CAPTION) for name, _ in named_pixels]
    return draw_images("Training examples", np.stack([pixels for _, pixels in named_pixels]), captions)


def draw_augmentation(augmented: Sequence[AugmentedImage]) -> Figure:
    """Draw a row per image: the original, and its augmented views. `augmented` has at least one image."""
    num_columns = 1 + len(augmented[0].views)
    images = np.concatenate([np.concatenate([a.example.pixels[None], a.views]) for a in augmented])
    captions = ["original", *(f"epoch {epoch}" for epoch in range(num_columns - 1))] * len(augmented)
    return draw_images("Augmented views of training examples", images, captions, num_columns)


def draw_counts(facts: Facts) -> Figure:
    """Draw the number of examples per class and split as stacked bars, for the `MAX_BARS` rarest classes."""
    train_counts = facts.counts["train"]
    order = sorted(range(len(train_counts)), key=lambda k: train_counts[k])[:MAX_BARS]
    figure = create_figure(height=1.1 + 0.24 * len(order))
    axes = figure.add_subplot()
    left = np.zeros(len(order))
    for color, (name, counts) in zip(SERIES, facts.counts.items(), strict=False):
        values = np.array([counts[k] for k in order])
        axes.barh(range(len(order)), values, left=left, color=color, height=0.7, label=name)
        left += values
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:,.0f}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(order)), [format_label(facts.class_names[k]) for k in order])
    axes.set(ylim=(len(order) - 0.4, -0.6), xlim=(0, 1.08 * max(left.max(), 1)))
    style_axes(axes, "x")
    selection = "" if len(order) == len(train_counts) else f", the rarest {len(order)} of {len(train_counts)}"
    set_heading(axes, f"Examples per class and split{selection}")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(facts.counts))
    return figure


def render_page(facts: Facts, suggestions: Sequence[Suggestion], images: PageImages, config: RunConfig) -> str:
    """Render the page as HTML that loads no other file."""
    side = THUMBNAIL_SIDE if len(images.examples) > MANY_CLASSES else THUMBNAIL_PIXELS
    groups = facts.duplicates["groups"]

    def embed(example: Example, alt: str) -> dict[str, Any]:
        return {"image": embed_thumbnail(example.pixels, side, alt), "file": example.file}

    augmented = [
        {
            "original": embed(a.example, f"{a.class_name}, original"),
            "class_name": a.class_name,
            "index": a.index,
            "views": [embed_thumbnail(view, side, f"{a.class_name}, epoch {e}") for e, view in enumerate(a.views)],
        }
        for a in images.augmented
    ]
    duplicates: list[list[Markup]] = [
        [
            embed_thumbnail(pixels, THUMBNAIL_PIXELS, member["file"])
            for pixels, member in zip(members, group["members"], strict=False)
        ]
        for members, group in zip(images.duplicates, groups, strict=False)
    ]
    train_counts = facts.counts["train"]
    rarest = sorted(range(len(train_counts)), key=lambda k: train_counts[k])
    changes = config.augmentation.model_dump(mode="json", exclude_defaults=True)
    return render(
        "look.html.j2",
        facts=facts,
        suggestions=suggestions,
        examples=[(name, [embed(e, name) for e in members]) for name, members in images.examples.items()],
        num_hidden_classes=sum(count > 0 for count in train_counts) - len(images.examples),
        listed_classes=sorted(rarest[:MAX_ROWS]),
        augmented=augmented,
        changes=changes,
        seed=config.seed,
        model=config.model,
        group_images=duplicates,
        orientation_names=ORIENTATIONS,
        config=config.model_dump(mode="json"),
    )
