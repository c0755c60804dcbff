"""Write predictions.csv and probabilities.npy, the prediction for every example, and decode the names in the cells."""

import csv
import io
import re
from pathlib import Path

import numpy as np

from trainer.names import escape_unprintable
from trainer.storage.local import write_atomically
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")
# A cell that begins like a formula of a spreadsheet, in full width too, or with the mark that `encode_cell` adds.
_BEGIN = r"['=+@\-\uff1d\uff0b\uff20\uff0d]"
_FORMULA = re.compile(rf"[\s\ufeff]*{_BEGIN}")
# In countries with a decimal comma a cell ends at ";", in quotes too if they do not begin the line.
_FORMULA_IN_NAME = re.compile(rf"(;[\s\ufeff]*)(?={_BEGIN})")
_ESCAPED_IN_NAME = re.compile(rf"(;[\s\ufeff]*)'(?={_BEGIN})")


def encode_cell(name: str) -> str:
    """Escape a name for a CSV cell, with a ' where a spreadsheet would begin to compute it as a formula."""
    text = _FORMULA_IN_NAME.sub(r"\1'", escape_unprintable(name))
    return f"'{text}" if _FORMULA.match(text) else text


def decode_cell(cell: str) -> str:
    """Return the printable name that `encode_cell` wrote."""
    return _ESCAPED_IN_NAME.sub(r"\1", cell.removeprefix("'"))


def write_predictions(path: Path, result: EvaluationResult) -> None:
    """Write a CSV file with one line per example, ordered by index.

    Truth and prediction are class names, probability is that of the prediction with six decimals, correct is true or
    false. A last column `source` has the file names that records store, if they do. Names are encoded by `encode_cell`,
    text as UTF-8, line ends as "\\n". Equal results give equal bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, "source") if result.sources else COLUMNS)
    predictions = result.probabilities.argmax(axis=1)
    for index, (truth, prediction) in enumerate(zip(result.labels, predictions, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[prediction])
        probability = f"{result.probabilities[index, prediction]:.6f}"
        correct = "true" if truth == prediction else "false"
        source = map(encode_cell, result.sources[index : index + 1])
        writer.writerow((index, *map(encode_cell, names), probability, correct, *source))
    write_atomically(path, text.getvalue())


def write_probabilities(path: Path, probabilities: np.ndarray) -> None:
    """Write the probabilities, float32 [n, classes], as an .npy file whose rows are in the order of predictions.csv."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(probabilities, np.float32), allow_pickle=False)
    write_atomically(path, content.getvalue())
