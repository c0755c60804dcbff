"""Confidence intervals of a proportion, a mean and macro F1."""

import numpy as np

DRAWS = 400  # of the bootstrap
_CELLS = 2_000_000  # counts drawn at once


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927, "Probable inference, the law of succession").

    Two proportions whose intervals do not overlap differ; the reverse does not hold. Of no trials nothing is known:
    (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # takes a second, which the first step of a run need not wait for

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def of_mean(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean of many values, float [n], by the central limit theorem."""
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return mean - half, mean + half


def of_macro_f1(confusion: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of macro F1 by the percentile bootstrap (Efron 1979), seeded: equal tables, equal intervals.

    To draw n examples anew is to draw the table's cells from a multinomial, which takes as long as it has full cells.

    Args:
        confusion: int [c, c]; rows: truth, columns: prediction; at least one example.
    """
    truth, answer = np.nonzero(confusion)
    right, cells = truth == answer, confusion[truth, answer]
    n, classes = int(cells.sum()), len(confusion)
    generator = np.random.default_rng([n, classes])
    rows = max(_CELLS // max(len(cells), classes), 1)
    scores: list[float] = []
    for start in range(0, DRAWS, rows):
        for drawn in generator.multinomial(n, cells / n, size=min(rows, DRAWS - start)):
            hits = np.bincount(truth[right], weights=drawn[right], minlength=classes)
            both = np.bincount(truth, weights=drawn, minlength=classes)
            both += np.bincount(answer, weights=drawn, minlength=classes)
            scores.append(float((2 * hits[both > 0] / both[both > 0]).mean()))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
