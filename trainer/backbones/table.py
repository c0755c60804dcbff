"""Rank the backbones of a comparison; print the table, and write index.html and backbones.json."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.backbones.folds import HOLD_OUT, FoldPlan
from trainer.backbones.results import SUMMARY, FoldResult, Measurements
from trainer.config.phases import Phase
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.paired import PairedComparison, adjust_p_values, compare_paired
from trainer.monitoring.log import log
from trainer.report.compare import SIGNIFICANCE_LEVEL
from trainer.report.figures import SERIES, shorten_name, to_svg
from trainer.report.page import INDEX, render, write_output
from trainer.report.scatter import Point, draw_scatter
from trainer.storage.base import encode_json
from trainer.storage.path import StoragePath
from trainer.types import Dataset

VERSION = 1  # version of the format of backbones.json
NAME_WIDTH = 25  # characters in the printed table's first column, so that lines have at most 80


@dataclass(frozen=True)
class EvaluatedBackbone:
    """A backbone's fold results and measurements."""

    label: str  # name of the backbone in the table
    fold_results: Sequence[FoldResult]
    measurements: Measurements


@dataclass(frozen=True)
class ComparisonFacts:
    """What all backbones in the table have in common, and each backbone's weights."""

    dataset: Dataset  # its train split pools the train and validation examples
    fold_plan: FoldPlan
    machine: str  # description of the machine that computes this comparison
    phase: str  # name of the phase that trains the head
    settings: Phase  # settings of that phase
    weights: Mapping[str, str]  # label -> model.weights, as the user wrote it


@dataclass(frozen=True)
class Row:
    """A backbone with its scores. Accuracies are fractions."""

    label: str
    weights: str
    accuracy: float  # over the predictions of all folds
    interval: tuple[float, float]  # 95 % confidence interval of the accuracy
    num_examples: int  # number of scored examples
    fold_accuracies: list[float]
    measurements: Measurements
    train_seconds: float  # seconds to compute a fold's training features and train its head, mean over the folds
    pair: PairedComparison | None  # comparison with the best backbone; None for the best one itself
    p: float | None  # p-value of `pair`, adjusted for the number of pairs (Holm 1979)

    @property
    def is_random(self) -> bool:
        """Whether the backbone has random weights, which are not trained."""
        return self.weights == "none"

    @property
    def is_worse(self) -> bool:
        """Whether the backbone is significantly worse than the best one."""
        return self.p is not None and self.p < SIGNIFICANCE_LEVEL


def rank(backbones: Sequence[EvaluatedBackbone], facts: ComparisonFacts) -> list[Row]:
    """Score the backbones on the examples that all of them have predicted, and compare each with the best one.

    Returns:
        The rows in descending order of accuracy. If two accuracies are equal, the backbone with fewer parameters is
        first.
    """
    labels = facts.dataset.splits["train"].labels
    predictions = [_join_folds(backbone.fold_results, len(labels)) for backbone in backbones]
    common_indices = np.flatnonzero(np.all([predicted >= 0 for predicted in predictions], axis=0))
    correct = [predicted[common_indices] == labels[common_indices] for predicted in predictions]
    parameter_counts = [backbone.measurements.parameters for backbone in backbones]
    order = sorted(range(len(backbones)), key=lambda i: (-int(correct[i].sum()), parameter_counts[i], i))
    best_index = order[0]
    pairs = {i: compare_paired(correct[best_index], correct[i]) for i in order[1:]}
    adjusted_p_values = dict(zip(pairs, adjust_p_values([pair.p for pair in pairs.values()]), strict=True))
    rows = []
    for i in order:
        backbone, measurements = backbones[i], backbones[i].measurements
        num_correct = int(correct[i].sum())
        head_seconds = [result.seconds for result in backbone.fold_results]
        num_train = [len(facts.fold_plan.get_indices(fold)[0]) for fold in range(facts.fold_plan.num_folds)]
        rows.append(Row(
            label=backbone.label, weights=facts.weights[backbone.label], accuracy=num_correct / len(common_indices),
            interval=compute_wilson_interval(num_correct, len(common_indices)), num_examples=len(common_indices),
            fold_accuracies=[float((r.predictions == labels[r.indices]).mean()) for r in backbone.fold_results],
            measurements=measurements, pair=pairs.get(i), p=adjusted_p_values.get(i),
            train_seconds=float(np.mean(head_seconds) + np.mean(num_train) * measurements.batch_ms / 1e3),
        ))  # fmt: skip
    return rows


def _join_folds(fold_results: Sequence[FoldResult], num_examples: int) -> np.ndarray:
    """Return the predicted class of each example, int64 [num_examples], or -1 if no fold has predicted the example."""
    predictions = np.full(num_examples, -1, np.int64)
    for result in fold_results:
        predictions[result.indices] = result.predictions
    return predictions


def find_fastest(rows: Sequence[Row]) -> Row:
    """Return the backbone that is fastest for one image among those not significantly worse than the best."""
    return min((row for row in rows if not row.is_worse), key=lambda row: row.measurements.single_ms)


def _format_3_digits(value: float) -> str:
    """Format a positive number with about three digits: 1.23, 12.3, 123.4, 1234."""
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def format_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the printed table, each of at most 80 characters."""
    batch_rows = rows[0].measurements.batch_rows
    headers = ("acc.", "95 %", "params", "MB", "ms/1", f"ms/{batch_rows}", "train", "p")
    widths = (5, 9, 6, 5, 6, 6, 5, 5)

    def line(name: str, cells: Sequence[str]) -> str:
        columns = " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{shorten_name(name, NAME_WIDTH).ljust(NAME_WIDTH)} {columns}".rstrip()

    lines = [line("backbone", headers)]
    for row in rows:
        costs, (low, high) = row.measurements, row.interval
        p = "best" if row.p is None else "<.001" if row.p < 0.001 else f"{row.p:.3f}".lstrip("0")
        cells = (f"{100 * row.accuracy:.1f}%", f"{100 * low:.1f}-{100 * high:.1f}",
                 f"{_format_3_digits(costs.parameters / 1e6)}M", _format_3_digits(costs.bytes / 1e6),
                 _format_3_digits(costs.single_ms), _format_3_digits(costs.batch_ms), f"{row.train_seconds:.0f}s",
                 p)  # fmt: skip
        lines.append(line(f"{row.label} *" if row.is_random else row.label, cells))
    return lines


def describe(rows: Sequence[Row], facts: ComparisonFacts) -> list[str]:
    """Return the lines below the printed table and on the page: examples, head, and the recommended backbone."""
    num_folds, settings = facts.fold_plan.num_folds, facts.settings
    examples = "validation examples" if num_folds == HOLD_OUT else f"out-of-fold predictions, {num_folds} folds"
    sentences = [
        f"n = {rows[0].num_examples:,} {examples} ({facts.fold_plan.reason})",
        f"head: {settings.duration.count:g} {settings.duration.unit} of {settings.optimizer.name} "
        f"{settings.optimizer.learning_rate:g}; {facts.machine}",
    ]
    if len(rows) > 1:
        cheapest = find_fastest(rows)
        not_worse = [row for row in rows[1:] if not row.is_worse]
        if not_worse:
            sentences.append(f"no significant difference from the best: {', '.join(row.label for row in not_worse)}")
            sentences.append(f"the fastest of these, with batches of one image: {cheapest.label}")
    return sentences


def explain_columns(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the printed table's legend."""
    lines = ["* random weights, not trained"] if any(row.is_random for row in rows) else []
    if len(rows) > 1:
        lines.append("p: McNemar's exact test against the best, adjusted by Holm's method")
    return lines


def summarize(rows: Sequence[Row], facts: ComparisonFacts) -> dict[str, Any]:
    """Return the content of backbones.json."""
    dataset, fold_plan = facts.dataset, facts.fold_plan
    return {
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "classes": list(dataset.class_names)},
        "folds": {"count": fold_plan.num_folds, "reason": fold_plan.reason, "examples": rows[0].num_examples},
        "head": {"phase": facts.phase, **facts.settings.model_dump(mode="json")},
        "machine": facts.machine,
        "networks": [
            {
                "name": row.label, "weights": row.weights, "accuracy": row.accuracy, "interval": list(row.interval),
                "fold_accuracies": row.fold_accuracies, "image_size": row.measurements.image_size,
                "parameters": row.measurements.parameters, "bytes": row.measurements.bytes,
                "ms_single": row.measurements.single_ms, "ms_in_batch": row.measurements.batch_ms,
                "batch": row.measurements.batch_rows, "train_seconds": row.train_seconds,
                "difference": row.pair.difference if row.pair else None,
                "difference_interval": list(row.pair.interval) if row.pair else None,
                "p": row.p, "significantly_worse": row.is_worse,
            }
            for row in rows
        ],
    }  # fmt: skip


def render_page(rows: Sequence[Row], facts: ComparisonFacts, created: str) -> str:
    """Render the page as HTML that loads no other file. `created`: time in ISO 8601."""
    points = [
        Point(row.label, row.measurements.single_ms, row.accuracy, row.interval, SERIES[i % len(SERIES)])
        for i, row in enumerate(rows)
    ]
    chart = draw_scatter("Accuracy over the time of one image", points, "ms per image, batches of one")
    return render(
        "backbones.html.j2", rows=rows, facts=facts, created=created, sentences=describe(rows, facts),
        chart=to_svg("scatter", chart), significance_level=SIGNIFICANCE_LEVEL, color_count=len(SERIES),
        hold_out=facts.fold_plan.num_folds == HOLD_OUT,
    )  # fmt: skip


def write_results(folder: StoragePath, rows: Sequence[Row], facts: ComparisonFacts) -> None:
    """Write backbones.json and index.html to `folder`, and print the table."""
    summary = summarize(rows, facts)
    write_output(folder, SUMMARY, encode_json(summary))
    write_output(folder, INDEX, render_page(rows, facts, summary["created"]))
    print("\n".join([*format_table(rows), "", *describe(rows, facts), *explain_columns(rows)]))
    log.info(f"page: {folder / INDEX}")
