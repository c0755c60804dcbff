"""The section on classes: what is taken for what, and how each class fares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from trainer.evaluation.markup import bar, encoded, number, percent, plural, short, span, table, text

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
