"""Paired comparison of two classifiers on the same examples: difference, interval and significance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Paired:
    """The second classifier against the first, on n examples.

    Attributes:
        lost: examples that only the first classifies correctly.
        won: examples that only the second classifies correctly.
        difference: accuracy of the second minus accuracy of the first.
        interval: 95 % interval of the difference.
        p: p value of McNemar's exact test.
    """

    n: int
    lost: int
    won: int
    difference: float
    interval: tuple[float, float]
    p: float


def compare_paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare by McNemar's exact test (McNemar 1947; advised by Dietterich 1998 for two classifiers and one test set).

    The interval is Wald's with half an example more in each cell (Agresti and Min 2005).

    Args:
        first: bool [n], True where the first classifier is correct; n >= 1.
        second: bool [n], the same of the second one.
    """
    n, lost, won = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p = 1.0 if lost + won == 0 else float(binomtest(won, lost + won, 0.5).pvalue)
    more, b, c = n + 2, lost + 0.5, won + 0.5
    middle = (c - b) / more
    half = 1.96 * float(np.sqrt(b + c - (c - b) ** 2 / more)) / more
    return Paired(n, lost, won, (won - lost) / n, (max(middle - half, -1.0), min(middle + half, 1.0)), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values in their order, adjusted for the number of comparisons (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
