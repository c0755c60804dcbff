"""Two classifiers on the same examples: how far they differ, and whether that is more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Paired:
    """The second classifier against the first, on n examples.

    Attributes:
        lost: examples that only the first has right.
        won: examples that only the second has right.
        difference: of the accuracies, second minus first.
        interval: 95 %, of the difference.
        p: probability of a split of the disagreements at least as uneven, if both were equally good.
    """

    n: int
    lost: int
    won: int
    difference: float
    interval: tuple[float, float]
    p: float


def compare_paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """McNemar's test in its exact form (McNemar 1947; a sign test on the disagreements, as Dietterich 1998 advises for
    two classifiers and one test set), and Wald's interval of the difference after Agresti and Min 2005 (half an example
    more in each cell).

    Args:
        first: bool [n], whether the first classifier is right; n >= 1.
        second: bool [n], the second one on the same examples.
    """
    n, lost, won = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    p = 1.0 if lost + won == 0 else float(binomtest(won, lost + won, 0.5).pvalue)
    more, b, c = n + 2, lost + 0.5, won + 0.5
    middle = (c - b) / more
    half = 1.96 * float(np.sqrt(b + c - (c - b) ** 2 / more)) / more
    return Paired(n, lost, won, (won - lost) / n, (max(middle - half, -1.0), min(middle + half, 1.0)), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p values in their order, adjusted for how many comparisons there are (Holm 1979)."""
    raised, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        raised[i] = highest
    return raised
