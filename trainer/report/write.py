"""The report: figures, predictions.csv, report.json and one self-contained page."""

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
from trainer.report.page import Pictures, write_page
from trainer.report.schema import Report
from trainer.storage.local import write_whole
from trainer.types import Dataset, EvaluationResult

VALIDATION_NOTE = (
    "The data has no test split. These are the validation examples, which also chose the checkpoint, "
    "so the scores lean to the good side."
)


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """`data` of report.json: name, fingerprint, counts by split and class, notes, skipped files."""
    classes = len(dataset.class_names)
    by_class = {s.name: np.bincount(s.labels, minlength=classes).tolist() for s in dataset.splits.values()}
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "class_names": list(dataset.class_names),
        "counts": {split.name: split.count for split in dataset.splits.values()},
        "class_counts": by_class,
        "notes": list(dataset.notes),
        "skipped": list(dataset.skipped),
    }


def _plain(value: Any) -> Any:
    """The value in the types of JSON, which has no NaN (null instead) and nothing of NumPy."""
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
    folder: Path, result: EvaluationResult, report: Report, pictures: Pictures
) -> tuple[dict[str, str], dict[str, list[Chart]]]:
    """Draw all figures; returns the file name of each, and the charts that the page shows too."""
    metrics: dict[str, Any] = result.metrics
    charts: dict[str, list[Chart]] = {
        "curves": figures.draw_curves(report["history"], report["phases"]) if report["history"] else [],
        "confusion": figures.draw_confusion(metrics["confusion"], result.class_names),
        "calibration": [figures.draw_calibration(metrics["calibration_bins"], metrics["calibration_error"])],
    }
    drawn: dict[str, Figure | list[Figure]] = {
        "curves": [chart.figure for chart in charts["curves"]],
        "predictions": figures.draw_predictions(result, pictures.images, report["seed"]),
        "most_wrong": figures.draw_most_wrong(result, pictures.images),
        "least_sure": figures.draw_least_sure(result, pictures.images),
        "confusion": [chart.figure for chart in charts["confusion"]],
        "f1": figures.draw_f1(metrics["per_class"], metrics["macro_f1"]),
        "calibration": charts["calibration"][0].figure,
    }
    samples = pictures.samples
    if samples is not None and len(samples.pictures):
        drawn["samples"] = figures.draw_samples(samples.pictures, samples.class_names)
        if samples.augmented is not None and len(samples.augmented):
            drawn["augmentation"] = figures.draw_augmentation(samples.pictures[0], samples.augmented)
    return {name: figures.save(f, folder / f"{name}.png").name for name, f in drawn.items() if f}, charts


def write_report(
    folder: Path,
    *,
    result: EvaluationResult,
    history: Sequence[Mapping[str, Any]],
    phases: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
    pictures: Pictures,
) -> Report:
    """Write figures, predictions.csv, report.json and index.html into `folder`, each whole or not at all.

    Args:
        folder: made where it does not exist.
        result: of the test split, or of validation where the data has no test split.
        history: one row a finished epoch, in order: phase, epoch (over the whole run, from 1), step, loss, accuracy,
            val_loss, val_accuracy, learning_rate, seconds. Without rows there are no curves.
        phases: for each phase in order val_accuracy, val_loss, epochs, best_epoch (over the whole run),
            trainable_parameters; epochs and seconds are taken from the history where they are not given; `val_n`, the
            number of validation examples, adds `val_interval`.
        run: other facts; every key may be left out. title (str), seed (int), data (`describe_data`, and as
            `undecodable` the examples skipped later), export (facts by format), config (the resolved tree), versions
            (name to version), timing (whatever differs between two equal runs), note (str: how to read the scores).
        pictures: the images to show.

    Returns:
        The content of report.json. Equal inputs give equal bytes but for `timing` and `seconds`.
    """
    began = time.monotonic()
    test: dict[str, Any] = {"split": result.split}
    note = run.get("note", VALIDATION_NOTE if result.split == "validation" else None)
    if note:
        test["note"] = note
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
            "duplicates": pictures.repeats.facts if pictures.repeats else {},
        }
    )
    report["figures"], charts = _draw_all(folder, result, report, pictures)
    write_predictions(folder / "predictions.csv", result)
    report["timing"] = _plain(run.get("timing", {})) | {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "report_seconds": round(time.monotonic() - began, 3),
    }
    write_page(folder / "index.html", report, _plain(run.get("config", {})), result, pictures, charts)
    text = json.dumps(report, indent=2, allow_nan=False)
    # Lists of numbers stand on one line: a row of the confusion matrix is a line.
    text = re.sub(r"\[\n[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), text)
    write_whole(folder / "report.json", text + "\n")
    return report
