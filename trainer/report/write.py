"""Write the files of a report: figures, predictions, report.json, and index.html, which needs no other file."""

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

from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.label_errors import describe_label_errors
from trainer.evaluation.predictions import write_predictions, write_probabilities
from trainer.report import figures
from trainer.report.figures import Chart
from trainer.report.page import INDEX, ReportImages, write_page
from trainer.report.schema import Report
from trainer.storage.local import write_atomically
from trainer.types import FINGERPRINT_KINDS, Dataset, EvaluationResult

VALIDATION_NOTE = (
    "The data has no test split. These are the validation examples, which also selected the checkpoint, "
    "so the scores are optimistically biased."
)


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Return `data` of report.json: a description of the dataset (`trainer.report.schema.Data`)."""
    splits = dataset.splits.values()
    num_classes = len(dataset.class_names)
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "fingerprint_of": next((kind for kind in FINGERPRINT_KINDS if kind in dataset.fingerprints), "ends"),
        "class_names": list(dataset.class_names),
        "counts": {split.name: split.count for split in splits},
        "class_counts": {split.name: np.bincount(split.labels, minlength=num_classes).tolist() for split in splits},
        "notes": list(dataset.notes),
        "skipped": list(dataset.skipped),
    }


def _to_json_types(value: Any) -> Any:
    """Convert NumPy values and nested containers to JSON types; NaN and infinity become None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summarize_phases(
    history: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return `phases` of report.json: the values in `phases`, with missing values added.

    `epochs` and `seconds` are computed from the rows of `history`, `val_interval` from `val_accuracy` and `val_n`.
    """
    summary = {}
    for name, values in phases.items():
        rows = [row for row in history if row["phase"] == name]
        phase = {"epochs": len(rows), "seconds": sum(float(row.get("seconds") or 0) for row in rows), **values}
        phase.setdefault("val_accuracy", None)
        if phase.get("val_n") and phase["val_accuracy"] is not None:
            phase["val_interval"] = compute_wilson_interval(
                round(phase["val_accuracy"] * phase["val_n"]), phase["val_n"]
            )
        summary[name] = phase
    return summary


def _draw_all(
    folder: Path, result: EvaluationResult, report: Report, images: ReportImages
) -> tuple[dict[str, str], dict[str, list[Chart]]]:
    """Draw all figures, and save them as PNG files in `folder`.

    Return the file name of each figure, and the charts of each section of the page, where they are shown as SVG.
    """
    metrics: dict[str, Any] = result.metrics
    charts: dict[str, list[Chart]] = {
        "curves": figures.draw_curves(report["history"], report["phases"]),
        "confusion": figures.draw_confusion(metrics["confusion"], result.class_names),
        "f1": [figures.draw_f1(metrics["per_class"], metrics["macro_f1"])],
        "calibration": [figures.draw_calibration(metrics["calibration_bins"], metrics["calibration_error"])],
    }

    def draw_rows(title: str, indices: list[int], show_files: bool = True) -> Figure:
        return figures.draw_examples(f"{title} ({result.split})", result, images.fetch, indices, show_files)

    plots: dict[str, Figure | list[Figure]] = {
        "curves": [chart.figure for chart in charts["curves"]],
        "predictions": draw_rows("Random examples", figures.select_random(result, report["seed"]), show_files=False),
        "most_wrong": draw_rows("Wrong with the highest confidence", figures.select_most_wrong(result)),
        "least_sure": draw_rows("Least confident", figures.select_least_confident(result)),
        **{name: [chart.figure for chart in group] for name, group in charts.items() if name != "curves"},
    }
    if samples := images.samples:
        captions = [figures.format_label(name, 20) for name in samples.class_names]
        title = "Training examples, as the input of the model"
        plots["samples"] = figures.draw_images(title, samples.images, captions)
        if samples.augmented is not None:
            views = np.stack([samples.images[0], *samples.augmented])
            captions = ["original", *(f"view {i}" for i in range(1, len(views)))]
            plots["augmentation"] = figures.draw_images("One training example under augmentation", views, captions)
    return {name: figures.save(plot, folder / f"{name}.png").name for name, plot in plots.items() if plot}, charts


def write_report(folder: Path, result: EvaluationResult, run: Mapping[str, Any], images: ReportImages) -> Report:
    """Write figures, predictions.csv, probabilities.npy, report.json and index.html to `folder`, each file atomically.

    Return the content of report.json. Equal inputs give equal bytes except for `timing` and `seconds`.

    Args:
        result: a split's predictions and scores.
        run: further content; all keys are optional. `title`, `seed`, `phases`, `history`, `data`, `export`, `teacher`,
            `versions` and `timing` are keys of report.json (`trainer.report.schema`). `config` is the resolved
            configuration. `note` explains how to read the scores; None omits it, and by default it warns that scores on
            the validation split are biased. `trained_on` is True if the model was trained on these examples; then label
            errors are left out, as their detection requires held-out data.
        images: access to the images that are shown.
    """
    start_time = time.monotonic()
    note = run.get("note", VALIDATION_NOTE if result.split == "validation" else None)
    test = {"split": result.split} | ({"note": note} if note else {})
    report: Report = _to_json_types(
        {
            "title": run.get("title", "run"),
            "seed": run.get("seed", 0),
            "test": test | result.metrics,
            "phases": _summarize_phases(run.get("history", []), run.get("phases", {})),
            "history": run.get("history", []),
            "data": run.get("data", {}),
            "export": run.get("export", {}),
            "versions": run.get("versions", {}),
            "label_errors": {} if run.get("trained_on") else describe_label_errors(result),
            "duplicates": images.duplicates.summary if images.duplicates else {},
        }
    )
    if teacher := run.get("teacher"):
        report["teacher"] = _to_json_types(teacher)
    report["figures"], charts = _draw_all(folder, result, report, images)
    write_predictions(folder / "predictions.csv", result)
    write_probabilities(folder / "probabilities.npy", result.probabilities)
    report["timing"] = _to_json_types(run.get("timing", {})) | {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "report_seconds": round(time.monotonic() - start_time, 3),
    }
    write_page(folder / INDEX, report, _to_json_types(run.get("config", {})), result, images, charts)
    report_text = json.dumps(report, indent=2, allow_nan=False)
    # Write each list of numbers, such as a row of the confusion matrix, on one line.
    report_text = re.sub(r"\[\n[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), report_text)
    write_atomically(folder / "report.json", report_text + "\n")
    return report
