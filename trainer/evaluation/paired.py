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
    interval: tuple[float, float]  # bounds of the 95 % interval of the difference
    p: float  # two-sided p-value of McNemar's exact test


def compare_paired(first: np.ndarray, second: np.ndarray) -> PairedComparison:
    """Compare two classifiers by McNemar's exact test (McNemar 1947; Dietterich 1998 recommends it for one test set).

    The interval is a Wald interval, for which 0.5 is added to each of four counts: the examples that both classifiers,
    only the first, only the second, and neither of them classify correctly (Agresti and Min 2005).

    Args:
        first: whether the first classifier is correct for each example, bool [n] with n >= 1.
        second: likewise for the second classifier.
    """
    from scipy.stats import binomtest  # takes a second to import, which would delay the first step of a run

    n, lost, won = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p = 1.0 if lost + won == 0 else float(binomtest(won, lost + won, 0.5).pvalue)
    total, b, c = n + 2, lost + 0.5, won + 0.5  # b and c as in McNemar's table
    center = (c - b) / total
    # 95 % of a normal distribution is within 1.96 standard deviations of the mean.
    margin = 1.96 * float(np.sqrt(b + c - (c - b) ** 2 / total)) / total
    return PairedComparison(lost, won, (won - lost) / n, (max(center - margin, -1.0), min(center + margin, 1.0)), p)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number by Holm's step-down method (1979), in the order of `p_values`."""
    adjusted_p_values = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted_p_values[i] = highest
    return adjusted_p_values
