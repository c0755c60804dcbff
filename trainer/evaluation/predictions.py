"""Write predictions.csv, the prediction for every example, and read the names in its cells."""

import csv
import io
import re
from pathlib import Path

from trainer.names import printable
from trainer.storage.local import write_whole
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")
# What begins a formula in a spreadsheet, in full width too, and the mark that prevents it.
_BEGIN = r"['=+@\-\uff1d\uff0b\uff20\uff0d]"
_FORMULA = re.compile(rf"[\s\ufeff]*{_BEGIN}")
# In countries with a decimal comma a cell ends at ";", in quotes too if they do not begin the line.
_FORMULA_IN_NAME = re.compile(rf"(;[\s\ufeff]*)(?={_BEGIN})")
_ESCAPED_IN_NAME = re.compile(rf"(;[\s\ufeff]*)'(?={_BEGIN})")


def as_cell(name: str) -> str:
    """Return a name as a cell: printable, with a ' where a spreadsheet would begin to compute it as a formula."""
    text = _FORMULA_IN_NAME.sub(r"\1'", printable(name))
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Return the printable name that `as_cell` wrote."""
    return _ESCAPED_IN_NAME.sub(r"\1", cell.removeprefix("'"))


def write_predictions(path: Path, result: EvaluationResult) -> None:
    """Write a CSV file with one line per example, ordered by index.

    Truth and prediction are class names, probability is that of the prediction with six decimals, correct is true or
    false. Names are written by `as_cell`. The file is in UTF-8 with "\\n" line ends; equal results give equal bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    predictions = result.probabilities.argmax(axis=1)
    for index, (truth, prediction) in enumerate(zip(result.labels, predictions, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[prediction])
        probability = f"{result.probabilities[index, prediction]:.6f}"
        writer.writerow((index, *map(as_cell, names), probability, "true" if truth == prediction else "false"))
    write_whole(path, text.getvalue())
