"""Runs side by side: their scores on the examples they share, and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trainer.config.diff import flat
from trainer.errors import DataError
from trainer.evaluation.intervals import wilson
from trainer.evaluation.paired import Paired, compare_paired, holm
from trainer.report.charts import SERIES, Line, legend, line_chart
from trainer.report.markup import NONE, fold, number, percent, plural, short, span, table, text
from trainer.report.page import assemble
from trainer.storage.local import write_whole

SURE = 0.05  # p below which a difference is called one
LISTED = 200  # examples that only one of two runs has right
_FREE = ("output_dir", "runtime.cache_dir", "resume")  # differ between runs and say nothing


@dataclass(frozen=True)
class Scored:
    """One run, or one evaluation of a run."""

    name: str
    address: str
    report: Mapping[str, Any]
    answers: Mapping[str, tuple[str, str]]  # file -> truth, prediction
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Comparison:
    """Several runs on what they share; the first is what the others are compared with.

    Attributes:
        files: the shared examples.
        accuracies: of each run on them.
        pairs: each run after the first against it.
        p: theirs, raised for their number (Holm 1979).
    """

    runs: Sequence[Scored]
    files: Sequence[str]
    right: np.ndarray  # bool [runs, files]
    pairs: Sequence[Paired]
    p: Sequence[float]

    @property
    def accuracies(self) -> list[float]:
        return [float(row.mean()) for row in self.right]


def _keys(runs: Sequence[Scored]) -> list[dict[str, str]]:
    """What the examples of each run are known by: {key: file}. Whole names, or, where no two runs share one, the names
    below the folder that each run's files are in (the same data may lie elsewhere).
    """
    whole = [{file: file for file in run.answers} for run in runs]
    if set.intersection(*(set(keys) for keys in whole)):
        return whole
    below = []
    for run in runs:
        files = list(run.answers)
        parents = [str(PurePosixPath(file).parent) for file in files]
        root = commonpath(parents) if len({p.startswith("/") for p in parents}) == 1 else ""
        below.append({file.removeprefix(root).lstrip("/") if root else file: file for file in files})
    return below


def compare_runs(runs: Sequence[Scored]) -> Comparison:
    """Compare runs on the examples that all of them were scored on.

    Raises:
        DataError: they know other classes, share no example, or disagree on the truth of one.
    """
    first = runs[0]
    for run in runs[1:]:
        mine, theirs = (tuple(r.report["data"]["class_names"]) for r in (first, run))
        if set(mine) != set(theirs):
            odd = sorted(set(mine) ^ set(theirs))[0]
            raise DataError(
                f"{first.address} and {run.address} cannot be compared: they know other classes ({odd!r} is known to "
                "only one of them)"
            )
    keys = _keys(runs)
    shared = sorted(set.intersection(*(set(k) for k in keys)))
    if not shared:
        raise DataError(
            f"{' and '.join(run.address for run in runs)} cannot be compared: no example was scored in all of them; "
            "evaluate them on the same data with python -m trainer.evaluate"
        )
    rows: list[list[bool]] = []
    expected: list[str] = []
    for run, known in zip(runs, keys, strict=True):
        answers = [run.answers[known[key]] for key in shared]
        truths = [truth for truth, _ in answers]
        expected = expected or truths
        wrong = next((i for i, (a, b) in enumerate(zip(truths, expected, strict=True)) if a != b), None)
        if wrong is not None:
            raise DataError(
                f"{first.address} and {run.address} cannot be compared: {shared[wrong]} is {expected[wrong]!r} in one "
                f"and {truths[wrong]!r} in the other"
            )
        rows.append([truth == answer for truth, answer in answers])
    right = np.array(rows, bool)
    pairs = [compare_paired(right[0], row) for row in right[1:]]
    return Comparison(runs, shared, right, pairs, holm([pair.p for pair in pairs]))


def verdict(pair: Paired, p: float) -> str:
    """One word on a difference."""
    if p >= SURE:
        return "no difference shown"
    return "better" if pair.difference > 0 else "worse"


def configuration_differences(runs: Sequence[Scored]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of what is not the same in all."""
    trees = [flat(dict(run.config)) for run in runs]
    keys = sorted(set().union(*trees))
    found = []
    for key in keys:
        values = [_as_typed(tree[key]) if key in tree else NONE for tree in trees]
        if len(set(values)) > 1 and key not in _FREE:
            found.append((key, values))
    return found


def _as_typed(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_as_typed, value))}]" if isinstance(value, list) else str(value)


# ---------------------------------------------------------------------------------------------------------------
# The page


def _score_table(found: Comparison) -> str:
    head = ("run", "accuracy (shared)", "difference (95 %)", "only first right", "only this right", "p")
    n, rows = len(found.files), []
    for place, run in enumerate(found.runs):
        hits = int(found.right[place].sum())
        said = f"<strong>{verdict(found.pairs[place - 1], found.p[place - 1])}</strong>" if place else "the reference"
        cells = [
            f'<i class="key s{place % SERIES}"></i>{short(run.name, 40)}<br><small>{said}</small>',
            f"{percent(hits / n, 2)} <small>({span(wilson(hits, n))})</small>",
        ]
        if place == 0:
            cells += [""] * 4
        else:
            pair, p = found.pairs[place - 1], found.p[place - 1]
            low, high = pair.interval
            cells += [
                f"{100 * pair.difference:+.2f} <small>({100 * low:+.1f} to {100 * high:+.1f})</small>",
                f"{pair.lost:,}",
                f"{pair.won:,}",
                f"{p:.3g}",
            ]
        rows.append(cells)
    raised = " Raised for the number of comparisons (Holm 1979)." if len(found.pairs) > 1 else ""
    words = (
        f"<p><small>On the {plural(n, 'example')} that all were scored on. p is McNemar's exact test: how likely so "
        f"uneven a split of the disagreements is if both are equally good.{raised} Below {SURE:g} a run is called "
        "better or worse; the interval is approximate, and may leave out 0 where p is a little above that.</small></p>"
    )
    return table(head, rows) + words


def _whole_scores(found: Comparison) -> str:
    keys = [("n", "examples"), ("accuracy", "accuracy"), ("top_5", "top-5 accuracy"), ("macro_f1", "macro F1"),
            ("loss", "loss"), ("calibration_error", "calibration error")]  # fmt: skip
    rows = []
    for key, name in keys:
        values = [run.report["test"].get(key) for run in found.runs]
        if any(value is not None for value in values):
            shares = key in ("accuracy", "top_5")
            rows.append((name, *(percent(v, 2) if shares else number(v) for v in values)))
    rows.append(("split", *(text(run.report["test"]["split"]) for run in found.runs)))
    for key, name in (("images_per_second", "images a second"), ("goodput", "goodput")):
        values = [run.report["timing"].get(key) for run in found.runs]
        if any(value is not None for value in values):
            rows.append((name, *(percent(v) if key == "goodput" else number(v, 0) for v in values)))
    return table(("each on its own examples", *(short(run.name, 30) for run in found.runs)), rows)


def _class_table(found: Comparison) -> str:
    """F1 of each class in each run, the largest change first."""
    scores = [{row["name"]: row["f1"] for row in run.report["test"]["per_class"]} for run in found.runs]
    names = sorted(scores[0], key=lambda name: min(s[name] - scores[0][name] for s in scores[1:]))
    head = "<th>class</th>" + "".join(f'<th class="number">{short(run.name, 24)}</th>' for run in found.runs)
    head += '<th class="number" aria-sort="ascending">last minus first</th>'
    rows = []
    for name in names:
        values = [s[name] for s in scores]
        cells = "".join(f'<td class="number" data-value="{v:.6f}">{v:.3f}</td>' for v in values)
        change = values[-1] - values[0]
        rows.append(
            f'<tr><td>{short(name, 40)}</td>{cells}<td class="number" data-value="{change:.6f}">{change:+.3f}</td></tr>'
        )
    body = "\n".join(rows)
    tall = " tall" if len(rows) > 20 else ""
    return (
        f'<div class="wide{tall}"><table class="sorts"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _curves(runs: Sequence[Scored]) -> str:
    charts = []
    for key, title, shares in (("val_accuracy", "Validation accuracy", True), ("val_loss", "Validation loss", False)):
        lines = [
            Line(
                run.name, f"s{i % SERIES}", [row["epoch"] for row in run.history], [row.get(key) for row in run.history]
            )
            for i, run in enumerate(runs)
            if run.history
        ]
        charts.append(line_chart(title, lines, shares=shares))
    charts = [chart for chart in charts if chart]
    keys = legend([(f"s{i % SERIES}", run.name) for i, run in enumerate(runs)])
    return f'{keys}<div class="charts">{"".join(charts)}</div>' if charts else ""


def _changed(found: Comparison) -> str:
    """The files that two runs disagree on."""
    parts = []
    for place, run in enumerate(found.runs[1:], start=1):
        for which, words in ((1, "right now, wrong in the first"), (0, "wrong now, right in the first")):
            mine = np.flatnonzero((found.right[place] == which) & (found.right[0] != which))
            if len(mine):
                lines = "".join(f"<li>{text(found.files[i])}</li>" for i in mine[:LISTED])
                more = f"<li>and {len(mine) - LISTED:,} more</li>" if len(mine) > LISTED else ""
                parts.append(fold(f"{short(run.name)}: {len(mine):,} {words}", f'<ul class="files">{lines}{more}</ul>'))
    return "".join(parts)


def write_comparison(path: Path, found: Comparison) -> Path:
    """Write one self-contained page."""
    runs = found.runs
    differing = [(f"<code>{text(key)}</code>", *(f"<code>{text(v)}</code>" for v in values))
                 for key, values in configuration_differences(runs)]  # fmt: skip
    configuration = table(("key", *(short(run.name, 30) for run in runs)), differing, numeric_from=len(runs) + 1)
    parts = [
        ("Scores", _score_table(found) + _whole_scores(found)),
        ("Curves", _curves(runs)),
        ("Classes", "<p><small>F1 of each class.</small></p>" + _class_table(found)),
        ("Examples", _changed(found)),
        ("Configuration", configuration if differing else "<p>The configurations are the same.</p>"),
    ]
    title = " and ".join(text(run.name) for run in runs)
    where = ", ".join(f"<code>{text(run.address)}</code>" for run in runs)
    write_whole(path, assemble(title, title, where, "", parts, "kubetune"))
    return path
