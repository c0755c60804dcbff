"""Runs side by side: their scores on the examples they share, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from markupsafe import Markup

from trainer.config.diff import flat
from trainer.errors import DataError
from trainer.evaluation.intervals import wilson
from trainer.evaluation.paired import Paired, compare_paired, holm
from trainer.report.figures import SERIES, Line, line_chart, svg
from trainer.report.page import NONE, number, percent, render
from trainer.storage.local import write_whole

SURE = 0.05  # p below which a difference is called one
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


@dataclass(frozen=True)
class _RunRow:
    """One run on the shared examples; the first has no pair. `changed`: what happened -> files."""

    name: str
    address: str
    accuracy: float
    interval: Sequence[float]
    pair: Paired | None = None
    p: float | None = None
    verdict: str = ""
    changed: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True)
class _ComparePage:
    """What compare.html.j2 shows.

    Attributes:
        n: shared examples.
        scores: name, and its value in each run, on the examples of each run.
        classes: name, and its F1 in each run, the largest loss first.
        differences: key of the configuration, and its value in each run.
    """

    runs: Sequence[_RunRow]
    n: int
    scores: Sequence[tuple[str, Sequence[str]]]
    charts: Sequence[Markup]
    classes: Sequence[tuple[str, Sequence[float]]]
    differences: Sequence[tuple[str, Sequence[str]]]
    sure: float = SURE
    series: int = len(SERIES)


def _rows(found: Comparison) -> list[_RunRow]:
    rows, n = [], len(found.files)
    for place, run in enumerate(found.runs):
        hits = int(found.right[place].sum())
        row = _RunRow(run.name, run.address, hits / n, wilson(hits, n))
        if place:
            pair, p = found.pairs[place - 1], found.p[place - 1]
            files = [
                [found.files[int(i)] for i in np.flatnonzero((found.right[place] == now) & (found.right[0] != now))]
                for now in (True, False)
            ]
            changed = list(zip(("right now, wrong in the first", "wrong now, right in the first"), files, strict=True))
            row = replace(row, pair=pair, p=p, verdict=verdict(pair, p), changed=changed)
        rows.append(row)
    return rows


def _scores(runs: Sequence[Scored]) -> list[tuple[str, list[str]]]:
    """What each run reports of its own examples."""

    def share(value: float | None) -> str:
        return percent(value, 2)

    kinds: list[tuple[str, str, str, Callable[..., str]]] = [
        ("test", "n", "examples", number), ("test", "accuracy", "accuracy", share),
        ("test", "top_5", "top-5 accuracy", share), ("test", "macro_f1", "macro F1", number),
        ("test", "loss", "loss", number), ("test", "calibration_error", "calibration error", number),
        ("test", "split", "split", str), ("timing", "images_per_second", "images a second", lambda v: number(v, 0)),
        ("timing", "goodput", "goodput", percent),
    ]  # fmt: skip
    rows = []
    for part, key, name, show in kinds:
        values = [run.report[part].get(key) for run in runs]
        if any(value is not None for value in values):
            rows.append((name, [show(value) for value in values]))
    return rows


def _curves(runs: Sequence[Scored]) -> list[Markup]:
    drawn = []
    for key, title, shares in (("val_accuracy", "Validation accuracy", True), ("val_loss", "Validation loss", False)):
        lines = [
            Line(
                run.name, SERIES[i % len(SERIES)], [r["epoch"] for r in run.history], [r.get(key) for r in run.history]
            )
            for i, run in enumerate(runs)
        ]
        if chart := line_chart(title, lines, shares=shares):
            drawn.append(svg(key, chart))
    return drawn


def write_comparison(path: Path, found: Comparison) -> Path:
    """Write one self-contained page."""
    scores = [{row["name"]: row["f1"] for row in run.report["test"]["per_class"]} for run in found.runs]
    names = sorted(scores[0], key=lambda name: min(s[name] - scores[0][name] for s in scores[1:]))
    page = _ComparePage(
        runs=_rows(found),
        n=len(found.files),
        scores=_scores(found.runs),
        charts=_curves(found.runs),
        classes=[(name, [s[name] for s in scores]) for name in names],
        differences=configuration_differences(found.runs),
    )
    write_whole(path, render("compare.html.j2", page))
    return path
