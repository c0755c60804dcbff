"""Write the report: figures, predictions.csv, report.json and one self-contained page."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.evaluation.intervals import wilson
from trainer.evaluation.label_errors import describe_label_errors
from trainer.evaluation.predictions import write_predictions
from trainer.report import figures
from trainer.report.figures import Chart
from trainer.report.page import ReportImages, write_page
from trainer.report.schema import Report
from trainer.storage.local import write_whole
from trainer.types import Dataset, EvaluationResult

VALIDATION_NOTE = (
    "The data has no test split. These are the validation examples, which also selected the checkpoint, "
    "so the scores are optimistically biased."
)


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Return `data` of report.json."""
    splits, classes = dataset.splits.values(), len(dataset.class_names)
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "counts": {split.name: split.count for split in splits},
        "class_counts": {split.name: np.bincount(split.labels, minlength=classes).tolist() for split in splits},
        "notes": list(dataset.notes),
        "skipped": list(dataset.skipped),
    }


def _plain(value: Any) -> Any:
    """Convert a value to JSON types: NaN and infinity become None, NumPy values Python ones."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(branch) for key, branch in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summarise_phases(
    history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    summary = {}
    for name, facts in phases.items():
        rows = [row for row in history if row["phase"] == name]
        phase = {"epochs": len(rows), "seconds": sum(float(row.get("seconds") or 0) for row in rows), **facts}
        phase.setdefault("val_accuracy", None)
        if phase.get("val_n") and phase["val_accuracy"] is not None:
            phase["val_interval"] = wilson(round(phase["val_accuracy"] * phase["val_n"]), phase["val_n"])
        summary[name] = phase
    return summary


def _draw_all(
    folder: Path, result: EvaluationResult, report: Report, images: ReportImages
) -> tuple[dict[str, str], dict[str, list[Chart]]]:
    """Draw all figures; returns the file name of each, and the charts that the page shows as well."""
    metrics: dict[str, Any] = result.metrics
    charts: dict[str, list[Chart]] = {
        "curves": figures.draw_curves(report["history"], report["phases"]) if report["history"] else [],
        "confusion": figures.draw_confusion(metrics["confusion"], result.class_names),
        "calibration": [figures.draw_calibration(metrics["calibration_bins"], metrics["calibration_error"])],
    }

    def examples(title: str, indices: list[int], named: bool = True) -> Figure:
        return figures.draw_examples(f"{title} ({result.split})", result, images.fetch, indices, named)

    drawn: dict[str, Figure | list[Figure]] = {
        "curves": [chart.figure for chart in charts["curves"]],
        "predictions": examples("Random examples", figures.find_random(result, report["seed"]), named=False),
        "most_wrong": examples("Wrong with the highest confidence", figures.find_most_wrong(result)),
        "least_sure": examples("Least confident", figures.find_least_sure(result)),
        "confusion": [chart.figure for chart in charts["confusion"]],
        "f1": figures.draw_f1(metrics["per_class"], metrics["macro_f1"]),
        "calibration": charts["calibration"][0].figure,
    }
    if samples := images.samples:
        drawn["samples"] = figures.draw_samples(samples.images, samples.class_names)
        if samples.augmented is not None:
            drawn["augmentation"] = figures.draw_augmentation(samples.images[0], samples.augmented)
    return {name: figures.save(f, folder / f"{name}.png").name for name, f in drawn.items() if f}, charts


def write_report(
    folder: Path,
    *,
    result: EvaluationResult,
    history: Sequence[Mapping[str, Any]],
    phases: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
    images: ReportImages,
) -> Report:
    """Write figures, predictions.csv, report.json and index.html to `folder`, each file atomically.

    Args:
        folder: created if it does not exist.
        result: of the test split, or of validation if the data has no test split.
        history: rows of `trainer.report.schema.Epoch`; without rows there are no curves.
        phases: values of `trainer.report.schema.Phase`; missing epochs and seconds are computed from the history, and
            `val_interval` from `val_n`.
        run: title, seed, data, export, versions and timing of `trainer.report.schema.Report`, `config` (the resolved
            configuration) and `note` (how to read the scores); every key is optional.
        images: the images to show.

    Returns:
        The content of report.json. Equal inputs give equal bytes except for `timing` and `seconds`.
    """
    began = time.monotonic()
    note = run.get("note", VALIDATION_NOTE if result.split == "validation" else None)
    test = {"split": result.split} | ({"note": note} if note else {})
    report: Report = _plain(
        {
            "title": run.get("title", "run"),
            "seed": run.get("seed", 0),
            "test": test | result.metrics,
            "phases": _summarise_phases(history, phases),
            "history": history,
            "data": run.get("data", {}),
            "export": run.get("export", {}),
            "versions": run.get("versions", {}),
            "label_errors": describe_label_errors(result),
            "duplicates": images.duplicates.facts if images.duplicates else {},
        }
    )
    report["figures"], charts = _draw_all(folder, result, report, images)
    write_predictions(folder / "predictions.csv", result)
    report["timing"] = _plain(run.get("timing", {})) | {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "report_seconds": round(time.monotonic() - began, 3),
    }
    write_page(folder / "index.html", report, _plain(run.get("config", {})), result, images, charts)
    text = json.dumps(report, indent=2, allow_nan=False)
    # Lists of numbers are joined: a row of the confusion matrix is one line.
    text = re.sub(r"\[\n[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), text)
    write_whole(folder / "report.json", text + "\n")
    return report
