"""Write predictions.csv, the prediction for every example, and make names printable."""

import csv
import io
from pathlib import Path

from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")


def printable(text: str) -> str:
    """Escape characters that UTF-8 cannot encode or that do not print on one line; file names may hold any bytes."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def write_predictions(path: Path, result: EvaluationResult) -> None:
    """Write a CSV file with one line per example, ordered by index.

    Truth and prediction are class names, probability is that of the prediction with six decimals, correct is true or
    false. The file is in UTF-8 with "\\n" line ends; equal results give equal bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    predictions = result.probabilities.argmax(axis=1)
    for index, (truth, prediction) in enumerate(zip(result.labels, predictions, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[prediction])
        probability = f"{result.probabilities[index, prediction]:.6f}"
        writer.writerow((index, *map(printable, names), probability, "true" if truth == prediction else "false"))
    write_whole(path, text.getvalue())
