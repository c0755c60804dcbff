"""The sections of a report page: classes, pictures, and the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from trainer.report.markup import (
    NONE,
    bar,
    card,
    duration,
    encoded,
    facts,
    fold,
    number,
    percent,
    plural,
    short,
    span,
    table,
    text,
    thumbnail,
)
from trainer.types import EvaluationResult

NUMBERED = 20  # classes up to which the matrix holds names and counts
MOST_CONFUSED = 15  # pairs that are listed
_ROWS_SHOWN = 20  # a longer table scrolls and can be filtered


def top_confusions(confusion: np.ndarray, most: int = MOST_CONFUSED) -> list[tuple[int, int, int]]:
    """(truth, prediction, examples) of the most frequent mistakes, int [c, c] given; equals by class."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    return [(truth, answer, int(wrong[truth, answer])) for truth, answer in pairs if wrong[truth, answer]]


def _confusions(confusion: np.ndarray, names: Sequence[str], pairs: Sequence[tuple[int, int, int]]) -> str:
    if not pairs:
        return "<p>No class is taken for another.</p>"
    most, support = pairs[0][2], confusion.sum(axis=1)
    rows = [
        (short(names[truth]), short(names[answer]), f"{count:,} of {support[truth]:,}{bar(count / most, 'bad')}")
        for truth, answer, count in pairs
    ]
    return "<h3>Most frequent confusions</h3>" + table(("truth", "taken for", "examples"), rows, numeric_from=2)


def _matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Names, counts, and colours by the share of the true class."""
    support = confusion.sum(axis=1)
    head = "".join(f"<th><span>{short(name, 20)}</span></th>" for name in names)
    rows = []
    for truth, name in enumerate(names):
        cells = []
        for answer in range(len(names)):
            count = int(confusion[truth, answer])
            share = count / support[truth] if count else 0.0
            kind = "hit" if truth == answer else "miss"
            deep = " deep" if share > 0.55 else ""
            cells.append(
                f'<td class="{kind}{deep}" style="--p:{100 * share**0.7:.0f}%" title="{percent(share)} of '
                f'{text(name)}">{count:,}</td>' if count else "<td></td>"
            )  # fmt: skip
        none = "" if support[truth] else " <small>(no examples)</small>"
        rows.append(f"<tr><th>{short(name, 20)}{none}</th>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return (
        '<h3>Confusion matrix</h3><p><small>Rows are the truth, columns the predictions.</small></p><div class="wide">'
        f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _pixel_matrix(confusion: np.ndarray) -> str:
    """One pixel a cell, the stronger the larger its share of the true class; transparent where there is none."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = np.zeros((*confusion.shape, 4), np.uint8)
    pixels[...] = (220, 38, 38, 0)
    np.einsum("iij->ij", pixels)[:] = (59, 130, 246, 0)
    pixels[..., 3] = np.rint(255 * np.where(confusion > 0, 0.15 + 0.85 * shares**0.5, 0)).astype(np.uint8)
    source = encoded(Image.fromarray(pixels), "png", optimize=True)
    words = f"Confusion matrix of {len(confusion)} classes, in their order"
    note = "rows are the truth, columns the predictions; blue is right, red is wrong."
    return (
        f'<h3>Confusion matrix</h3><p><small>{words}: {note}</small></p><img class="matrix" alt="{words}" '
        f'src="{source}">'
    )


def confusion_part(table_of: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The matrix and the most frequent confusions; these first where classes are many."""
    confusion = np.asarray(table_of)
    few = len(names) <= NUMBERED
    pairs = _confusions(confusion, names, top_confusions(confusion, 8 if few else MOST_CONFUSED))
    return _matrix(confusion, names) + pairs if few else pairs + _pixel_matrix(confusion)


def class_table(per_class: Sequence[Mapping[str, Any]], confusion: Sequence[Sequence[int]]) -> str:
    """Scores of each class, the lowest F1 first; the script sorts it by any column."""
    counts = np.asarray(confusion)
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    answers = wrong.argmax(axis=1)

    def score(row: Mapping[str, Any], what: str) -> str:
        value = float(row[what])
        shown = f"{value:.3f}"
        if what in row["undefined"]:
            shown = f'<span class="none" title="nothing to divide by: counted as 0">{shown}</span>'
        drawn = bar(value) if what == "f1" else ""
        return f'<td class="number" data-value="{value:.6f}">{shown}{drawn}</td>'

    rows = []
    for place in sorted(range(len(per_class)), key=lambda i: (not per_class[i]["support"], per_class[i]["f1"])):
        row, answer = per_class[place], int(answers[place])
        taken = int(wrong[place, answer])
        other = f"{short(per_class[answer]['name'], 22)} <small>{taken:,}</small>" if taken else ""
        rows.append(
            f"<tr><td>{short(row['name'], 40)}</td>{score(row, 'f1')}{score(row, 'precision')}{score(row, 'recall')}"
            f'<td class="number" data-value="{row["support"]}">{row["support"]:,}</td>'
            f'<td class="number" data-value="{taken}">{other}</td></tr>'
        )
    head = (
        '<th>class</th><th class="number" aria-sort="ascending">F1</th><th class="number">precision</th>'
        '<th class="number">recall</th><th class="number">examples</th><th class="number">most taken for</th>'
    )
    body = "\n".join(rows)
    long = len(rows) > _ROWS_SHOWN
    field = '<input class="filter" type="search" placeholder="find a class" aria-label="find a class" hidden>' * long
    found = (
        f'<h3>Scores of each class</h3><div>{field}<div class="wide{" tall" if long else ""}"><table class="sorts">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></div>"
    )
    undefined = sum(bool(row["undefined"]) for row in per_class)
    if undefined:
        found += (
            f"<p><small>{plural(undefined, 'class has', 'classes have')} a score of 0 because there was nothing to "
            "divide by: no example of the class, or no prediction of it (shown grey).</small></p>"
        )
    return found


def group_part(groups: Mapping[str, Any]) -> str:
    """Fairness: how each group fares, and the largest gap."""
    rows = [
        (
            text(row["name"]),
            f"{row['n']:,}",
            f"{percent(row['accuracy'])} <small>({span(row['interval'])})</small>",
            number(float(row["macro_f1"])),
        )
        for row in groups["rows"]
    ]
    found = table((text(groups["field"]), "examples", "accuracy (95 %)", "macro F1"), rows)
    gap = groups.get("gap")
    if gap is None:
        return found
    sure = "the two intervals overlap" if gap["overlap"] else "the two intervals do not overlap: these groups differ"
    words = f"{text(gap['highest'])} and {text(gap['lowest'])}; {sure}"
    return f"<p>Largest gap: {100 * gap['accuracy']:.1f} points of accuracy, between {words}.</p>{found}"


# ---------------------------------------------------------------------------------------------------------------
# The sections that show pictures: the gallery, labels that may be wrong, pictures that occur more than once

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


# ---------------------------------------------------------------------------------------------------------------
# The sections on the run itself: headline, phases, data, speed, exports, and how it was made

_BARS = 60  # classes that are shown with bars at once
PLACES = {
    "train": ("training", "--s0"),
    "wait": ("waiting for data", "--s1"),
    "features": ("features of frozen layers", "--s6"),
    "compile": ("compiling", "--s3"),
    "start": ("starting", "--faint"),
    "checkpoint": ("checkpoints", "--s5"),
    "evaluation": ("evaluation", "--s2"),
    "finish": ("export and report", "--soft"),
    "lost": ("lost with a process", "--s4"),
    "down": ("no process there", "--rule"),
}


def _interval(interval: Sequence[float] | None, shares: bool = False) -> str:
    if interval is None:
        return ""
    return f"95 %: {span(interval) if shares else f'{interval[0]:.3f}–{interval[1]:.3f}'}"


def headline(test: Mapping[str, Any], phases: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores with their intervals, and below each what it was after every phase, on the validation split."""
    n, split = test["n"], test["split"]

    def before(key: str, shares: bool, digits: int) -> str:
        known = {name: phase for name, phase in phases.items() if phase.get(key) is not None}
        if not known:
            return ""
        lines = []
        for name, phase in known.items():
            value = percent(phase[key], digits) if shares else number(float(phase[key]))
            of = phase.get("val_interval") if key == "val_accuracy" else None
            kept = f" (kept the weights of {text(phase['kept_from'])})" if "kept_from" in phase else ""
            lines.append(f"{text(name)}: {value}{f' ({span(of)})' if of and not kept else ''}{kept}")
        return f'<small class="before">validation after {"; ".join(lines)}</small>'

    found = f"95 % interval {span(test['interval'])}; {test['correct']:,} of {n:,} {text(split)} examples"
    found += before("val_accuracy", True, 2)
    cards = [card(f"{text(split)} accuracy", percent(test["accuracy"], 2), found, lead=True)]
    if "top_5" in test:
        of_five = _interval(test["top_5_interval"], True)
        cards.append(card("top-5 accuracy", percent(test["top_5"]), of_five + before("val_top_5", True, 1)))
    cards += [
        card(
            "macro F1",
            number(test["macro_f1"]),
            f"mean over classes<br>{_interval(test.get('macro_f1_interval'))}" + before("val_macro_f1", False, 3),
        ),
        card(
            "loss",
            number(test["loss"]),
            f"cross entropy, nats<br>{_interval(test.get('loss_interval'))}" + before("val_loss", False, 3),
        ),
        card(
            "calibration error",
            number(test["calibration_error"]),
            f"mean confidence {percent(test['mean_confidence'])}, right {percent(test['accuracy'])}",
        ),
        card("most frequent class", percent(test["majority"]), "accuracy of always answering it"),
    ]
    note = f'<p class="note">{text(test["note"])}</p>' if "note" in test else ""
    return f'<section class="cards" id="scores">{"".join(cards)}</section>\n{note}'


def phase_table(phases: Mapping[str, Mapping[str, Any]]) -> str:
    def score(phase: Mapping[str, Any]) -> str:
        """Of the best epoch of the phase itself, whose weights are handed on unless those it began with are better."""
        if "kept_from" in phase:
            kept = f"kept the weights of {text(phase['kept_from'])}"
            return f"{percent(phase['own_val_accuracy'], 2)}<br><small>{kept}</small>"
        interval = f" <small>({span(phase['val_interval'])})</small>" if phase.get("val_interval") else ""
        return percent(phase["val_accuracy"], 2) + interval

    head = ("phase", "epochs", "best epoch", "validation accuracy", "validation loss", "trainable parameters", "time")
    rows = [
        (
            text(name),
            number(phase["epochs"], 1),
            number(phase.get("best_epoch")),
            score(phase),
            NONE if "kept_from" in phase else number(phase.get("val_loss")),
            number(phase.get("trainable_parameters")),
            duration(phase["seconds"]),
        )
        for name, phase in phases.items()
    ]
    return table(head, rows) if rows else ""


def data_part(data: Mapping[str, Any]) -> str:
    """What the run was given: splits, classes and how unequal they are, what could not be read."""
    parts = []
    counts = data.get("counts", {})
    if "name" in data:
        whole = ", ".join(f"{count:,} {text(split)}" for split, count in counts.items())
        parts.append(f"<p><strong>{text(data['name'])}</strong>: {whole or 'no counts given'}.</p>")
    by_class, names = data.get("class_counts"), data.get("class_names")
    if by_class and names:
        parts.append(_balance(by_class, names))
    for note in data.get("notes", []):
        parts.append(f'<p class="note">{text(note)}</p>')
    missing = [*data.get("skipped", []), *data.get("undecodable", [])]
    if missing:
        lines = "\n".join(f"<li>{text(line)}</li>" for line in missing[:1000])
        lines += f"<li>and {len(missing) - 1000:,} more</li>" if len(missing) > 1000 else ""
        lost = plural(len(missing), "example")
        parts.append(f'<p class="note">Could not be read and counted for nothing: {lost}.</p>')
        parts.append(fold("Skipped files", f'<ul class="files">{lines}</ul>'))
    if by_class and names:
        parts.append(_class_counts(by_class, names))
    if "fingerprint" in data:
        parts.append(f'<p><small>fingerprint <code class="long">{text(data["fingerprint"])}</code></small></p>')
    return "\n".join(parts)


def _balance(by_class: Mapping[str, Sequence[int]], names: Sequence[str]) -> str:
    """How unequal the classes of the first split (that of training) are."""
    split, counts = next(iter(by_class.items()))
    high, low = max(counts), min(counts)
    most, least = names[counts.index(high)], names[counts.index(low)]
    if high == low:
        return f"<p>{plural(len(names), 'class', 'classes')}, {high:,} {text(split)} examples each: balanced.</p>"
    words = f"{plural(len(names), 'class', 'classes')}; the largest, {short(most)}, has {high:,} {text(split)} examples"
    if low:
        return f"<p>{words}, {high / low:.3g} times as many as the smallest, {short(least)} ({low:,}).</p>"
    empty = sum(not count for count in counts)
    return f"<p>{words}; {plural(empty, 'class has', 'classes have')} none, {short(least)} among them.</p>"


def _class_counts(by_class: Mapping[str, Sequence[int]], names: Sequence[str]) -> str:
    splits = list(by_class)
    most = max(max(by_class[splits[0]]), 1)
    rows = [
        (
            short(name, 40),
            f"{by_class[splits[0]][i]:,}{bar(by_class[splits[0]][i] / most)}",
            *(f"{by_class[s][i]:,}" for s in splits[1:]),
        )
        for i, name in enumerate(names)
    ]
    found = table(("class", *map(text, splits)), rows)
    if len(rows) > _BARS:
        found = found.replace('class="wide"', 'class="wide tall"', 1)
    return fold("Examples of each class", found)


def speed_part(timing: Mapping[str, Any]) -> str:
    """Images a second, goodput, and where the time went."""
    cards = []
    if "images_per_second" in timing:
        cards.append(
            card("speed", f"{timing['images_per_second']:,.0f}", f"images a second; {timing.get('images', 0):,} in all")
        )
    if "goodput" in timing:
        words = "share of the time since the first start in which steps were taken that count"
        cards.append(card("goodput", percent(timing["goodput"]), words))
    seconds = {place: spent for place, spent in timing.get("seconds", {}).items() if spent >= 0.05}
    total = sum(seconds.values())
    if total:
        starts, workers = timing.get("starts", 1), timing.get("workers", 1)
        cards.append(card("time", duration(total), f"{plural(starts, 'start')}, {plural(workers, 'worker')}"))
    parts = [f'<div class="cards">{"".join(cards)}</div>'] if cards else []
    if total:
        named = [(*PLACES.get(place, (place, "--soft")), spent) for place, spent in seconds.items()]
        strips = "".join(
            f'<i style="width:{100 * spent / total:.2f}%;background:var({colour})" title="{text(name)}: '
            f'{duration(spent)}"></i>'
            for name, colour, spent in named
        )
        keys = "".join(
            f'<span><i class="key" style="background:var({colour})"></i>{text(name)} {duration(spent)}</span>'
            for name, colour, spent in named
        )
        parts.append(f'<div class="stack">{strips}</div><p class="legend">{keys}</p>')
    return "".join(parts)


def export_part(exports: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a format: what `exporting.formats.export_formats` measured of it."""
    if not exports:
        return ""
    rows = [
        (
            f"{text(kind)}<br><small>{_fate(row)}</small>",
            f"{row['bytes'] / 1e6:,.2f}",
            percent(row["accuracy"], 2),
            f"{row['lost']:,}",
            f"{row['gained']:,}",
            NONE if row["largest_difference"] is None else f"{row['largest_difference']:.1g}",
            f"{row['timing']['milliseconds_per_image']:,.2f}",
        )
        for kind, row in exports.items()
    ]
    head = ("format", "MB", "accuracy", "lost", "gained", "largest difference", "ms an image")
    some = next(iter(exports.values()))
    words = (
        f"<p><small>Each file was loaded back and sent {plural(some['examples'], 'example')}, of which the trainer has "
        f"{percent(some['trainer_accuracy'], 2)} right. Lost and gained: examples that only the trainer, only the file "
        "gets right. The difference is of any probability; times are of single images on the CPU that exported."
        "</small></p>"
    )
    return table(head, rows) + words


def _fate(row: Mapping[str, Any]) -> str:
    return "not kept: it lost too much accuracy" if row["refused"] else text(row["path"])


def how_part(report: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The command, and all that a run like this one needs."""
    timing = dict(report["timing"])
    command = timing.pop("command", None)
    parts = [f"<pre><code>{text(command)}</code></pre>"] if command else []
    folds = [("Configuration", config), ("Versions", report["versions"]), ("Timing", timing)]
    parts += [fold(name, facts(tree)) for name, tree in folds if tree]
    return "\n".join(parts)
