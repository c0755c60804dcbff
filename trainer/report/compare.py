"""Runs side by side: their scores on the examples they have in common, and the page that shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
_IGNORED = ("output_dir", "runtime.cache_dir", "resume")  # differ between runs and say nothing


@dataclass(frozen=True)
class Scored:
    """A run, or an evaluation of a run: its report, predictions, configuration and epochs."""

    name: str
    address: str
    report: Mapping[str, Any]
    answers: Mapping[str, tuple[str, str]]  # file -> truth, prediction
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Several runs on the examples that all were scored on, the first of them as the reference."""

    runs: Sequence[Scored]
    files: Sequence[str]  # the common examples
    right: np.ndarray  # bool [runs, files]
    pairs: Sequence[Paired]  # each run after the first against it
    p: Sequence[float]  # of the pairs, adjusted for their number (Holm 1979)


def _keys(runs: Sequence[Scored]) -> list[dict[str, str]]:
    """The examples of each run by key: {key: file}. Keys are whole names, or, where no name is in all runs, names below
    the folder that each run's files are in (the same data may lie elsewhere).
    """
    whole = [{file: file for file in run.answers} for run in runs]
    if set.intersection(*(set(keys) for keys in whole)):
        return whole
    below = []
    for run in runs:
        parents = [str(PurePosixPath(file).parent) for file in run.answers]
        root = commonpath(parents) if len({p.startswith("/") for p in parents}) == 1 else ""
        below.append({file.removeprefix(root).lstrip("/") if root else file: file for file in run.answers})
    return below


def compare_runs(runs: Sequence[Scored]) -> Comparison:
    """Compare runs on the examples that all of them were scored on.

    Raises:
        DataError: they know other classes, share no example, or disagree on the truth of one.
    """
    first, classes = runs[0], [set(run.report["data"]["class_names"]) for run in runs]
    for run, known in zip(runs, classes, strict=True):
        if odd := sorted(classes[0] ^ known):
            raise DataError(
                f"{first.address} and {run.address} cannot be compared: they know other classes ({odd[0]!r} is known "
                "to only one of them)"
            )
    keys = _keys(runs)
    shared = sorted(set.intersection(*(set(k) for k in keys)))
    if not shared:
        raise DataError(
            f"{' and '.join(run.address for run in runs)} cannot be compared: no example was scored in all of them; "
            "evaluate them on the same data with python -m trainer.evaluate"
        )
    answers = [[run.answers[file_of[key]] for key in shared] for run, file_of in zip(runs, keys, strict=True)]
    for run, own in zip(runs, answers, strict=True):
        for key, (expected, _), (truth, _) in zip(shared, answers[0], own, strict=True):
            if truth != expected:
                raise DataError(
                    f"{first.address} and {run.address} cannot be compared: {key} is {expected!r} in one and {truth!r} "
                    "in the other"
                )
    right = np.array([[truth == answer for truth, answer in own] for own in answers], bool)
    pairs = [compare_paired(right[0], row) for row in right[1:]]
    return Comparison(runs, shared, right, pairs, holm([pair.p for pair in pairs]))


def verdict(pair: Paired, p: float) -> str:
    """The difference in words: better, worse, or none shown."""
    if p >= SURE:
        return "no difference shown"
    return "better" if pair.difference > 0 else "worse"


def configuration_differences(runs: Sequence[Scored]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of each setting that is not the same in all."""
    trees = [flat(dict(run.config)) for run in runs]
    keys = sorted(set().union(*trees) - {*_IGNORED})
    rows = [(key, [_as_typed(tree[key]) if key in tree else NONE for tree in trees]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _as_typed(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_as_typed, value))}]" if isinstance(value, list) else str(value)


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Each run on the common examples; the first has no pair. `changed`: [(kind of change, files)]."""
    rows, n, first = [], len(comparison.files), comparison.right[0]
    for i, (run, right) in enumerate(zip(comparison.runs, comparison.right, strict=True)):
        hits = int(right.sum())
        row = {
            "name": run.name,
            "address": run.address,
            "accuracy": hits / n,
            "interval": wilson(hits, n),
            "pair": None,
        }
        if i > 0:
            pair, p = comparison.pairs[i - 1], comparison.p[i - 1]
            row |= {"pair": pair, "p": p, "verdict": verdict(pair, p)}
        changes = {"right now, wrong in the first": right & ~first, "wrong now, right in the first": first & ~right}
        row["changed"] = [
            (kind, [comparison.files[k] for k in np.flatnonzero(at).tolist()]) for kind, at in changes.items()
        ]
        rows.append(row)
    return rows


def _scores(runs: Sequence[Scored]) -> list[tuple[str, list[str]]]:
    """Name, and its value in each run on the run's own examples."""
    kinds: list[tuple[str, str, str, Callable[..., str]]] = [
        ("test", "n", "examples", number), ("test", "accuracy", "accuracy", partial(percent, digits=2)),
        ("test", "top_5", "top-5 accuracy", partial(percent, digits=2)), ("test", "macro_f1", "macro F1", number),
        ("test", "loss", "loss", number), ("test", "calibration_error", "calibration error", number),
        ("test", "split", "split", str), ("timing", "images_per_second", "images a second", partial(number, digits=0)),
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
    for key, title, fractions in (
        ("val_accuracy", "Validation accuracy", True),
        ("val_loss", "Validation loss", False),
    ):
        lines = []
        for i, run in enumerate(runs):
            epochs, values = [row["epoch"] for row in run.history], [row.get(key) for row in run.history]
            lines.append(Line(run.name, SERIES[i % len(SERIES)], epochs, values))
        if chart := line_chart(title, lines, fractions=fractions):
            drawn.append(svg(key, chart))
    return drawn


def write_comparison(path: Path, comparison: Comparison) -> Path:
    """Write the comparison as one self-contained page; classes with the largest loss of F1 come first."""
    runs = comparison.runs
    scores = [{row["name"]: row["f1"] for row in run.report["test"]["per_class"]} for run in runs]
    names = sorted(scores[0], key=lambda name: min(s[name] - scores[0][name] for s in scores[1:]))
    page = render(
        "compare.html.j2",
        runs=_rows(comparison),
        n=len(comparison.files),
        scores=_scores(runs),
        charts=_curves(runs),
        classes=[(name, [s[name] for s in scores]) for name in names],
        differences=configuration_differences(runs),
        sure=SURE,
        series=len(SERIES),
    )
    write_whole(path, page)
    return path
