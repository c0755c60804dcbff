"""Write predictions.csv and probabilities.npy, which contain the prediction for every example."""

import csv
import io
from pathlib import Path

import numpy as np

from trainer.names import encode_cell
from trainer.storage.local import write_atomically
from trainer.types import EvaluationResult

COLUMNS = ("index", "file", "truth", "prediction", "probability", "correct")


def write_predictions(path: Path, result: EvaluationResult) -> None:
    """Write the predictions in `result` to a CSV file with one line per example, atomically.

    `index` counts the examples from 0. `truth` and `prediction` are class names, `probability` is the predicted class's
    probability with six decimals, and `correct` is true or false. If the examples are records that store the name of
    their image file, a last column, `source`, has this name. Names are encoded by `encode_cell`. Equal results give
    equal bytes.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow((*COLUMNS, "source") if result.sources else COLUMNS)
    predictions = result.probabilities.argmax(axis=1)
    for index, (truth, prediction) in enumerate(zip(result.labels, predictions, strict=True)):
        names = (result.names[index], result.class_names[truth], result.class_names[prediction])
        probability = f"{result.probabilities[index, prediction]:.6f}"
        correct = "true" if truth == prediction else "false"
        source = map(encode_cell, result.sources[index : index + 1])
        writer.writerow((index, *map(encode_cell, names), probability, correct, *source))
    write_atomically(path, buffer.getvalue())


def write_probabilities(path: Path, probabilities: np.ndarray) -> None:
    """Write the probabilities, float32 [n, classes], to an .npy file, in the order of predictions.csv, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(probabilities, np.float32), allow_pickle=False)
    write_atomically(path, buffer.getvalue())
