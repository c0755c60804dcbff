"""Write predictions.csv and probabilities.npy from the parts of a prediction, and summarize the predictions."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len, set_cell_size

from trainer.names import encode_cell, escape_unprintable
from trainer.predict.images import ImageFile
from trainer.predict.parts import ImagePredictions
from trainer.storage.local import sync, temporary_file

MAX_NAMED_ERRORS = 5  # maximum number of unreadable images that the printed summary lists
MAX_NAMED_CLASSES = 20  # maximum number of classes that the printed summary lists, the most frequent ones
WIDTH = 80  # terminal columns of the printed summary


@dataclass(frozen=True)
class Overview:
    """The predictions for all n images without the full probabilities, for the page and the summary."""

    predictions: np.ndarray  # int32 [n]: class index, -1 for an unreadable image
    confidences: np.ndarray  # float32 [n]: largest probability, NaN for an unreadable image
    distances: np.ndarray  # float64 [n]: NaN for an unreadable image, or if the model has no distance
    errors: dict[int, str]  # image index -> reason why the image cannot be read

    @property
    def readable(self) -> int:
        """Number of images that are predicted."""
        return len(self.predictions) - len(self.errors)


def make_header(class_names: Sequence[str], top: int) -> list[str]:
    """Return the names of the columns of predictions.csv. `top` is the number of most probable classes per image."""
    ranked = [name for k in range(2, top + 1) for name in (f"prediction_{k}", f"confidence_{k}")]
    columns = ["file", "prediction", "confidence", *ranked, "distance", "error"]
    return [*columns, *(encode_cell(f"probability_{name}") for name in class_names)]


def _format(value: float, digits: int) -> str:
    """Format a number with `digits` decimals, or "" for NaN."""
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def make_row(image: ImageFile, class_names: Sequence[str], part: ImagePredictions, k: int, top: int) -> list[str]:
    """Return the row of predictions.csv for the image with index `k` in a part."""
    name = encode_cell(image.name)
    probabilities = part.probabilities[k]
    error = part.errors[k]
    if error:
        return [name, *[""] * (2 * top + 1), encode_cell(error), *[""] * len(class_names)]
    ranked = [
        cell
        for i in find_top_classes(probabilities, top)
        for cell in (encode_cell(class_names[i]), _format(float(probabilities[i]), digits=6))
    ]
    cells = [_format(float(p), digits=6) for p in probabilities]
    return [name, *ranked, _format(float(part.distances[k]), digits=4), "", *cells]


def find_top_classes(probabilities: np.ndarray, top: int) -> list[int]:
    """Return the indices of the `top` most probable classes, the most probable first. Ties are broken by class index.

    Args:
        probabilities: float32 [classes].
    """
    return [int(i) for i in np.argsort(-probabilities, kind="stable")[:top]]


def make_json_line(image: ImageFile, class_names: Sequence[str], part: ImagePredictions, k: int, top: int) -> str:
    """Return the line that --json prints for the image with index `k` in a part: JSON in ASCII."""
    line: dict[str, Any] = {"file": image.name}
    if part.errors[k]:
        return json.dumps(line | {"error": part.errors[k]})
    probabilities = part.probabilities[k]
    distance = float(part.distances[k])
    ranked = [
        {"class": class_names[i], "probability": round(float(probabilities[i]), 6)}
        for i in find_top_classes(probabilities, top)
    ]
    line |= {"prediction": ranked[0]["class"], "confidence": ranked[0]["probability"], "top": ranked}
    return json.dumps(line | {"distance": None if np.isnan(distance) else round(distance, 4)})


def write_tables(
    folder: Path,
    images: Sequence[ImageFile],
    class_names: Sequence[str],
    parts: Iterable[ImagePredictions],
    top: int,
    print_line: Callable[[str], None] | None = None,
) -> Overview:
    """Write predictions.csv and probabilities.npy, float32 [n, classes], to a local folder atomically.

    Args:
        parts: the predictions, in the order of `images`. Only one part is in memory at a time.
        top: number of most probable classes per image.
        print_line: called with a JSON line per image.

    Returns:
        The predictions without the full probabilities.
    """
    shape = (len(images), len(class_names))
    start = 0
    predictions = np.full(len(images), -1, np.int32)
    confidences, distances = np.full(len(images), np.nan, np.float32), np.full(len(images), np.nan)
    errors: dict[int, str] = {}
    table, matrix = folder / "predictions.csv", folder / "probabilities.npy"
    with ExitStack() as stack:
        temporary_paths = [stack.enter_context(temporary_file(path)) for path in (table, matrix)]
        table_file = stack.enter_context(open(temporary_paths[0], "w", encoding="utf-8", newline=""))
        matrix_file = stack.enter_context(open(temporary_paths[1], "wb"))
        writer = csv.writer(table_file, lineterminator="\n")
        writer.writerow(make_header(class_names, top))
        npy_header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(matrix_file, npy_header | {"shape": shape})
        for part in parts:
            for k in range(len(part.errors)):
                image = images[start + k]
                writer.writerow(make_row(image, class_names, part, k, top))
                if print_line:
                    print_line(make_json_line(image, class_names, part, k, top))
                if part.errors[k]:
                    errors[start + k] = part.errors[k]
            matrix_file.write(part.probabilities.tobytes())
            readable_rows = [k for k, error in enumerate(part.errors) if not error]
            rows = np.array(readable_rows, np.int64) + start
            predictions[rows] = part.probabilities[readable_rows].argmax(axis=1)
            confidences[rows] = part.probabilities[readable_rows].max(axis=1)
            distances[rows] = part.distances[readable_rows]
            start += len(part.errors)
        table_file.close()
        matrix_file.close()
        for path, target in zip(temporary_paths, (table, matrix), strict=True):
            sync(path)
            os.replace(path, target)
    return Overview(predictions, confidences, distances, errors)


def summarize(overview: Overview, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the counts, confidences and distances for predictions.json. Classes are sorted by descending count."""
    counts = np.bincount(overview.predictions[overview.predictions >= 0], minlength=len(class_names))
    classes = [
        {
            "name": name,
            "count": int(counts[i]),
            "median_confidence": float(np.median(overview.confidences[overview.predictions == i])),
        }
        for i, name in enumerate(class_names)
        if counts[i]
    ]
    distances = overview.distances[~np.isnan(overview.distances)]
    rms = float(np.sqrt((distances**2).mean())) if len(distances) else None
    return {
        "images": len(overview.predictions),
        "predicted": overview.readable,
        "unreadable": len(overview.errors),
        "classes": sorted(classes, key=lambda row: -int(str(row["count"]))),
        "distance_rms": rms,
    }


def format_summary(summary: dict[str, Any], images: Sequence[ImageFile], errors: dict[int, str]) -> list[str]:
    """Format the printed summary as lines of about 80 columns. `summary` is the content of predictions.json."""
    is_plural = summary["images"] != 1
    unreadable = f", {summary['unreadable']:,} could not be read" if summary["unreadable"] else ""
    lines = [f"{summary['images']:,} image{'s' * is_plural}: {summary['predicted']:,} predicted{unreadable}"]
    rows = summary["classes"]
    width = min(max((cell_len(escape_unprintable(row["name"])) for row in rows), default=0), 40)
    for row in rows[:MAX_NAMED_CLASSES]:
        name = fit_to_width(row["name"], width)
        lines.append(f"  {name}  {row['count']:8,}  median confidence {row['median_confidence']:.3f}")
    if len(rows) > MAX_NAMED_CLASSES:
        lines.append(f"  and {len(rows) - MAX_NAMED_CLASSES:,} more classes, in predictions.json")
    if summary["distance_rms"] is not None:
        reference = summary["reference_rms"]
        lines.append(
            f"  distance: root mean square {summary['distance_rms']:.2f}; of the reference's examples {reference:.2f}"
        )
    else:
        lines += wrap_lines(f"  distance: none; {summary['no_distance']}")
    if summary["tta"]:
        lines += format_tta(summary["tta"])
    for index, error in list(errors.items())[:MAX_NAMED_ERRORS]:
        lines.append(f"  {fit_to_width(f'{shorten_start(images[index].name)}: {error}', WIDTH - 2).rstrip()}")
    if len(errors) > MAX_NAMED_ERRORS:
        lines.append(f"  and {len(errors) - MAX_NAMED_ERRORS:,} more, in the column error of predictions.csv")
    return lines


def format_tta(tta: dict[str, Any]) -> list[str]:
    """Format the result of `tta.measure_flip`, or the problem that prevented the measurement, as lines."""
    if "problem" in tta:
        return wrap_lines(f"  tta=flip: its worth was not measured; {tta['problem']}")
    low, high = tta["interval"]
    return [
        f"  tta=flip on {tta['n']:,} {tta['split']} examples of the run: {tta['outcome']}",
        f"    accuracy {tta['accuracy_without']:.4f} without, {tta['accuracy_with']:.4f} with; "
        f"{tta['won']:,} won, {tta['lost']:,} lost",
        f"    difference {tta['difference']:+.4f} (95 % {low:+.4f} to {high:+.4f}), p = {tta['p']:.3g}",
    ]


def fit_to_width(text: str, width: int) -> str:
    """Pad or shorten a text to exactly `width` terminal columns. A shortened text ends with an ellipsis."""
    line = escape_unprintable(text)
    return set_cell_size(line, width) if cell_len(line) <= width else set_cell_size(line, width - 1) + "…"


def shorten_start(name: str, width: int = WIDTH // 2) -> str:
    """Replace the beginning of a name by an ellipsis if the name has more terminal columns than `width`."""
    if cell_len(name) <= width:
        return name
    start = next(i for i in range(len(name)) if cell_len(name[i:]) < width)
    return f"…{name[start:]}"


def wrap_lines(text: str) -> list[str]:
    """Break a text into lines of at most `WIDTH` columns. Further lines are indented by two more columns."""
    indent = " " * (len(text) - len(text.lstrip()))
    lines: list[str] = []
    line = indent
    for word in re.split(r"\s+", text.strip()):
        if cell_len(line) + cell_len(word) + 1 > WIDTH and line.strip():
            lines, line = [*lines, line], f"{indent}  "
        line += ("" if line.endswith(" ") or not line else " ") + word
    return [*lines, line]
