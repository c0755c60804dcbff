"""predictions.csv, the prediction for every example, and names that can be printed."""

import csv
import io
from pathlib import Path

from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")


def printable(text: str) -> str:
    """Escape what cannot be encoded or printed on one line (file names may hold any bytes)."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def write_predictions(path: Path, result: EvaluationResult) -> Path:
    """Write one line per example, ordered by index.

    The columns are `COLUMNS`: truth and prediction are class names, probability is that of the prediction with six
    decimals, correct is true or false. UTF-8, "\\n" line ends; equal results give equal bytes.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    predictions = result.probabilities.argmax(axis=1)
    for index, (truth, prediction) in enumerate(zip(result.labels, predictions, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[prediction])
        probability = f"{result.probabilities[index, prediction]:.6f}"
        rows.writerow((index, *map(printable, names), probability, "true" if truth == prediction else "false"))
    write_whole(path, text.getvalue())
    return path
