"""Small synthetic results and histories."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.evaluation.metrics import score_predictions
from trainer.types import EvaluationResult

HOSTILE = '<b>"x"'


def make_result(classes: int, n: int, *, right: bool = False, empty: Sequence[int] = ()) -> EvaluationResult:
    """Return a result with some mistakes (none if `right`) and no example of the classes in `empty`."""
    rng = np.random.default_rng([classes, n])
    present = [k for k in range(classes) if k not in empty]
    labels = rng.choice(present, n).astype(np.int32)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 20.0 if right else 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    class_names = [HOSTILE, "a $x$ and $y_{", *(f"class {k}" for k in range(2, classes))]
    names = [f"folder/{k} & <i>.jpg" for k in range(n)]
    return score_predictions("test", class_names, labels, probabilities.astype(np.float32), names)


def make_history(*lengths: int) -> list[dict[str, Any]]:
    """Return the epochs of one phase per length."""
    rows: list[dict[str, Any]] = []
    for phase, length in enumerate(lengths):
        for _ in range(length):
            epoch = len(rows) + 1
            accuracy = 1 - 0.5 / epoch
            scores = {"loss": 1 / epoch, "accuracy": accuracy, "val_loss": 1.1 / epoch, "val_accuracy": accuracy - 0.01}
            row = {"phase": f"phase_{phase}", "epoch": epoch, "step": 10 * epoch}
            rows.append({**row, **scores, "learning_rate": 1e-3, "seconds": 0.5})
    return rows


def make_phases(history: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the summaries of the phases of a history."""
    last = {row["phase"]: row for row in history}
    return {
        name: {
            "val_accuracy": row["val_accuracy"],
            "val_loss": row["val_loss"],
            "epochs": sum(other["phase"] == name for other in history),
            "best_epoch": row["epoch"],
            "trainable_parameters": 1234,
        }
        for name, row in last.items()
    }


def fetch(indices: Sequence[int]) -> np.ndarray:
    """Return images of 8 x 8 pixels by index."""
    return np.stack([np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in indices])
