"""95 % confidence intervals of a proportion, a mean and macro F1."""

import numpy as np

DRAWS = 400  # bootstrap samples
_CELLS = 2_000_000  # counts drawn per batch of samples


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson interval of a proportion (Wilson 1927, "Probable inference, the law of succession").

    Two proportions whose intervals do not overlap differ; the reverse does not hold. Without trials it is (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # takes a second to import, which would delay the first step of a run

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval of the mean of many values, float [n], by the central limit theorem."""
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return mean - half, mean + half


def macro_f1_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Return the interval of macro F1 by the percentile bootstrap (Efron 1979); equal tables give equal intervals.

    Resampling n examples equals drawing the cells of the table from a multinomial distribution, which is faster.

    Args:
        confusion: int [c, c]; rows: truth, columns: prediction; at least one example.
    """
    truth, prediction = np.nonzero(confusion)
    correct, cells = truth == prediction, confusion[truth, prediction]
    n, classes = int(cells.sum()), len(confusion)
    generator = np.random.default_rng([n, classes])
    rows = max(_CELLS // max(len(cells), classes), 1)
    scores: list[float] = []
    for start in range(0, DRAWS, rows):
        for drawn in generator.multinomial(n, cells / n, size=min(rows, DRAWS - start)):
            hits = np.bincount(truth[correct], weights=drawn[correct], minlength=classes)
            both = np.bincount(truth, weights=drawn, minlength=classes)
            both += np.bincount(prediction, weights=drawn, minlength=classes)
            scores.append(float((2 * hits[both > 0] / both[both > 0]).mean()))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
