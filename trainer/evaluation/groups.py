"""Scores of each group of examples, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from trainer.errors import DataError
from trainer.evaluation.intervals import wilson


def score_groups(labels: np.ndarray, predictions: np.ndarray, groups: Sequence[str], field: str) -> dict[str, Any]:
    """The scores of a split, told apart by what group each example belongs to.

    Args:
        labels: int [n].
        predictions: int [n].
        groups: n names.
        field: what the names are values of.

    Returns:
        `field`; `rows`, one a group in alphabetical order: name, n, correct, accuracy and its 95 % Wilson `interval`,
        macro_f1 (over the classes that occur or are predicted in the group); and with more than one group `gap`: the
        names of the `highest` and the `lowest` accuracy, their difference `accuracy`, and whether the two intervals
        `overlap` (where they do not, the groups differ).

    Raises:
        DataError: there is not one group for each example.
    """
    if len(groups) != len(labels):
        raise DataError(f"data.group_field={field}: {len(labels)} examples have {len(groups)} groups")
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names.tolist()):
        mine = place == number
        n, hits = int(mine.sum()), int((labels[mine] == predictions[mine]).sum())
        f1 = f1_score(labels[mine], predictions[mine], average="macro", zero_division=0)
        row = {"name": name, "n": n, "correct": hits, "accuracy": hits / n, "interval": list(wilson(hits, n))}
        rows.append(row | {"macro_f1": float(f1)})
    found: dict[str, Any] = {"field": field, "rows": rows}
    if len(rows) > 1:
        high, low = max(rows, key=lambda row: row["accuracy"]), min(rows, key=lambda row: row["accuracy"])
        found["gap"] = {
            "accuracy": high["accuracy"] - low["accuracy"],
            "highest": high["name"],
            "lowest": low["name"],
            "overlap": low["interval"][1] >= high["interval"][0],
        }
    return found
