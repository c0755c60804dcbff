"""Compare two classifiers on the same examples: the difference in accuracy, its interval and its significance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedComparison:
    """Comparison of a second classifier with the first one, which is the reference."""

    lost: int  # examples that only the first classifies correctly
    won: int  # examples that only the second classifies correctly
    difference: float  # accuracy of the second minus accuracy of the first
    interval: tuple[float, float]  # 95 %, of the difference
    p: float  # two-sided, of McNemar's exact test


def compare_paired(first: np.ndarray, second: np.ndarray) -> PairedComparison:
    """Compare by McNemar's exact test (McNemar 1947; recommended by Dietterich 1998 for one test set).

    The interval is the Wald interval after 0.5 is added to each of the four counts of correct and wrong predictions
    (Agresti and Min 2005). `first` and `second`, bool [n] with n >= 1, are True where a classifier is correct.
    """
    from scipy.stats import binomtest  # takes a second to import, which would delay the first step of a run

    n, lost, won = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p = 1.0 if lost + won == 0 else float(binomtest(won, lost + won, 0.5).pvalue)
    total, b, c = n + 2, lost + 0.5, won + 0.5
    middle = (c - b) / total
    # 1.96 standard errors: 95 % of a normal distribution
    half = 1.96 * float(np.sqrt(b + c - (c - b) ** 2 / total)) / total
    return PairedComparison(lost, won, (won - lost) / n, (max(middle - half, -1.0), min(middle + half, 1.0)), p)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of comparisons by the step-down method of Holm 1979; keep the order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
