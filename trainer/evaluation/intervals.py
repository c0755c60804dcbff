"""Compute 95 % confidence intervals of a proportion, a mean and macro F1."""

import numpy as np

BOOTSTRAP_SAMPLES = 400
_COUNTS_PER_BATCH = 2_000_000  # bounds the memory for bootstrap samples


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson score interval of the proportion `successes / n`, and (0, 1) if n is 0.

    Reference: Wilson 1927, "Probable inference, the law of succession". Two proportions whose intervals do not overlap
    differ significantly; two with overlapping intervals can also differ significantly.
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # takes a second to import, which would delay the first step of a run

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval of the mean of float [n], n >= 1, by the normal approximation, which requires a large n."""
    # 1.96 standard errors: 95 % of a normal distribution
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return mean - half, mean + half


def macro_f1_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Return the interval of macro F1 by the percentile bootstrap (Efron 1979).

    To resample n examples with replacement is to draw the counts of the confusion matrix from a multinomial
    distribution, which is faster. The seed depends on the numbers of examples and classes, so the interval of a matrix
    is always the same. `confusion` is int [c, c] of at least one example; rows: truth, columns: prediction.
    """
    truth, prediction = np.nonzero(confusion)
    correct, counts = truth == prediction, confusion[truth, prediction]
    n, classes = int(counts.sum()), len(confusion)
    generator = np.random.default_rng([n, classes])
    batch_size = max(_COUNTS_PER_BATCH // max(len(counts), classes), 1)
    scores: list[float] = []
    for start in range(0, BOOTSTRAP_SAMPLES, batch_size):
        for drawn in generator.multinomial(n, counts / n, size=min(batch_size, BOOTSTRAP_SAMPLES - start)):
            hits = np.bincount(truth[correct], weights=drawn[correct], minlength=classes)
            denominators = np.bincount(truth, weights=drawn, minlength=classes)
            denominators += np.bincount(prediction, weights=drawn, minlength=classes)
            defined = denominators > 0
            scores.append(float((2 * hits[defined] / denominators[defined]).mean()))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
