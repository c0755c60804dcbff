"""Write predictions.csv and probabilities.npy, the prediction for every example."""

import csv
import io
from pathlib import Path

import numpy as np

from trainer.names import encode_cell
from trainer.storage.local import write_atomically
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")


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
