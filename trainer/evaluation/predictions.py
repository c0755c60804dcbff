"""predictions.csv, the model's answer for every example; and names as a report can show them."""

import csv
import io
from pathlib import Path

from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")


def printable(text: str) -> str:
    """The text without what cannot be encoded or shown on one line (file names may hold any bytes)."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def write_predictions(path: Path, result: EvaluationResult) -> Path:
    """Write one line an example, ordered by index.

    The columns are `COLUMNS`; truth and prediction are class names, probability is the prediction's with six decimals,
    correct is true or false. UTF-8, "\\n" line ends; equal results give equal bytes.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    answers = result.probabilities.argmax(axis=1)
    for index, (truth, answer) in enumerate(zip(result.labels, answers, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[answer])
        probability = f"{result.probabilities[index, answer]:.6f}"
        rows.writerow((index, *map(printable, names), probability, "true" if truth == answer else "false"))
    write_whole(path, text.getvalue())
    return path
