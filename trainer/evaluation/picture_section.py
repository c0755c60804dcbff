"""The sections that show pictures: the gallery, labels that may be wrong, pictures that occur more than once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from trainer.contracts import EvaluationResult
from trainer.evaluation.markup import encoded, fold, percent, plural, short, table, text, thumbnail

SHOT, SMALL = 224, 112  # longest sides of thumbnails, pixels
SHOWN = 12  # label errors and groups of duplicates that are shown with their pictures
MEMBERS_SHOWN = 4  # pictures of a group
HEAT_SIDE = 28  # pixels of an overlay, which the browser enlarges smoothly

TITLES = {
    "most_wrong": ("Most wrong", "The mistakes the model was most sure of. Wrong labels show up here first."),
    "least_sure": ("Least sure", "The examples whose two most probable classes are closest."),
    "random": ("Random", "Drawn by the seed."),
}


@dataclass(frozen=True)
class PagePictures:
    """What the page shows of the images, all uint8 [S, S, 3]; every part may be empty.

    Attributes:
        gallery: tab -> indices into the result, as `TITLES` names the tabs.
        of_index: the pictures of the gallery and of the first label errors.
        heat: where the model looked, float [h, w] in 0..1, for the gallery.
        duplicates: the first pictures of the first groups.
    """

    gallery: Mapping[str, Sequence[int]] = field(default_factory=dict)
    of_index: Mapping[int, np.ndarray] = field(default_factory=dict)
    heat: Mapping[int, np.ndarray] = field(default_factory=dict)
    duplicates: Sequence[Sequence[np.ndarray]] = ()


def _overlay(heat: np.ndarray) -> str:
    """A heatmap as a coloured picture, opaque where the model looked most."""
    size = (HEAT_SIDE, HEAT_SIDE)
    smooth = Image.fromarray(np.asarray(heat, np.float32)).resize(size, Image.Resampling.BICUBIC)
    level = np.clip(np.asarray(smooth), 0, 1)
    pixels = colormaps["inferno"](0.25 + 0.75 * level, bytes=True)
    pixels[..., 3] = np.rint(255 * (0.25 + 0.5 * level))
    return f'<img class="heat" alt="" src="{encoded(Image.fromarray(pixels), "png", optimize=True)}">'


def _file(name: str) -> str:
    """The last part of an address; the whole is its tooltip."""
    return f'<span title="{text(name)}">{short(PurePosixPath(name).name or name, 34)}</span>'


def _shot(result: EvaluationResult, pictures: PagePictures, index: int) -> str:
    truth, answer = int(result.labels[index]), int(result.probabilities[index].argmax())
    right = truth == answer
    names = result.class_names
    heat = _overlay(pictures.heat[index]) if index in pictures.heat else ""
    words = f"{names[answer]}, truth {names[truth]}"
    of_truth = "" if right else f" ({percent(float(result.probabilities[index, truth]))})"
    said = f'<strong class="{"yes" if right else "no"}">{"✓" if right else "✗"} {short(names[answer])}</strong>'
    how = "" if not heat else ' title="where the model looked"'
    return (
        f'<figure class="shot"><button type="button" class="picture {"right" if right else "wrong"}" '
        f'aria-pressed="false"{how}>{thumbnail(pictures.of_index[index], SHOT, words)}{heat}</button><figcaption>'
        f"{said} {percent(float(result.probabilities[index, answer]))}<br>truth: {short(names[truth])}{of_truth}<br>"
        f"{_file(result.names[index])}</figcaption></figure>"
    )


def gallery_part(result: EvaluationResult, pictures: PagePictures) -> str:
    """Tabs of examples with truth, prediction, probability and file; the overlay shows on hover, tap or focus."""
    tabs, panels = [], []
    for name, indices in pictures.gallery.items():
        title, words = TITLES[name]
        tabs.append(f'<button type="button" aria-pressed="false" data-shows="tab-{name}">{title}</button>')
        shots = "\n".join(_shot(result, pictures, index) for index in indices)
        if not indices:
            words = f"Every {text(result.split)} example is right."
        panels.append(f'<div id="tab-{name}"><p><small>{words}</small></p><div class="shots">\n{shots}\n</div></div>')
    hint = (
        "<p><small>Point at a picture, or tap it, to see where the model looked for its answer (Grad-CAM)."
        "</small></p>" if pictures.heat else ""
    )  # fmt: skip
    return f'{hint}<div class="tabs" hidden>{"".join(tabs)}</div>{"".join(panels)}' if tabs else ""


def label_part(found: Mapping[str, Any], pictures: PagePictures, n: int) -> str:
    """Labels that may be wrong, the least likely first."""
    count, rows = found["count"], found["rows"]
    if not count:
        return "<p>Confident learning finds no label that looks wrong.</p>"
    parts = [
        f"<p>{plural(count, 'example')} of {n:,} may be labelled wrongly: the model confidently places them in "
        "another class (confident learning, Northcutt et al. 2021). The weaker the model, the more of these are only "
        "its own mistakes.</p>"
    ]
    shots = []
    for row in rows[:SHOWN]:
        if row["index"] in pictures.of_index:
            seen = thumbnail(pictures.of_index[row["index"]], SMALL, row["label"])
            shots.append(
                f'<figure class="shot"><div class="picture">{seen}</div><figcaption>'
                f"<strong>{short(row['suggestion'])}</strong>? "
                f"{percent(row['suggestion_probability'])}<br>label: {short(row['label'])} "
                f"{percent(row['label_probability'])}<br>{_file(row['file'])}</figcaption></figure>"
            )
    parts.append(f'<div class="shots">{"".join(shots)}</div>')
    cells = [
        (
            f"<code>{text(row['file'])}</code>",
            text(row["label"]),
            text(row["suggestion"]),
            percent(row["label_probability"]),
            percent(row["suggestion_probability"]),
        )
        for row in rows
    ]
    head = ("file", "label", "rather", "label's probability", "other's")
    listed = f"The first {len(rows)}" if count > len(rows) else plural(len(rows), "file")
    parts.append(fold(f"{listed} as a list", table(head, cells, numeric_from=3)))
    return "".join(parts)


def duplicate_part(found: Mapping[str, Any], pictures: PagePictures) -> str:
    """Pictures that occur more than once, with their files."""
    whole = ", ".join(f"{count:,} of {text(split)}" for split, count in found["compared"].items())
    across, relabelled = found["across_splits"], found["different_labels"]
    harmless = found["within_one_split_and_class"]
    words = f"Compared by perceptual hash: {whole}."
    if harmless:
        words += f" Not listed: {plural(harmless, 'group')} inside one split and class."
    if not (across or relabelled):
        return f"<p>No picture occurs in two splits or with two labels. <small>{words}</small></p>"
    parts = [
        f"<p><strong>{plural(across, 'picture')}</strong> in more than one split (which makes scores look better than "
        f"they are) and <strong>{plural(relabelled, 'picture')}</strong> with more than one label (one of them is "
        f"wrong). <small>{words}</small></p>"
    ]
    blocks = []
    for place, group in enumerate(found["groups"]):
        shown = pictures.duplicates[place] if place < len(pictures.duplicates) else ()
        seen = "".join(
            thumbnail(picture, SMALL, member["file"]) for picture, member in zip(shown, group["members"], strict=False)
        )
        tags = '<span class="tag">across splits</span>' if group["across_splits"] else ""
        tags += '<span class="tag">different labels</span>' if len(group["labels"]) > 1 else ""
        files = "".join(
            f"<li><code>{text(m['file'])}</code> <small>{text(m['split'])}, {text(m['label'])}</small></li>"
            for m in group["members"]
        )
        more = group["count"] - len(group["members"])
        files += f"<li>and {more:,} more</li>" if more else ""
        blocks.append(f'<div class="found"><p>{tags}</p>{seen}<ul>{files}</ul></div>')
    parts += blocks[:SHOWN]
    if len(blocks) > SHOWN:
        parts.append(fold(f"{len(blocks) - SHOWN} more", "".join(blocks[SHOWN:])))
    return "".join(parts)
