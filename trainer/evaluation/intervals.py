"""Compute 95 % confidence intervals of a proportion, a mean and macro F1."""

import numpy as np

BOOTSTRAP_SAMPLES = 400  # resampled confusion matrices for the interval of macro F1
_COUNTS_PER_BATCH = 2_000_000  # cells of these matrices in memory at a time, 16 MB


def compute_wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the bounds of the 95 % Wilson score interval of the proportion `successes / n`; (0, 1) if n is 0.

    Reference: Wilson 1927, "Probable inference, the law of succession". Two proportions whose intervals do not overlap
    differ significantly; two with overlapping intervals can also differ significantly.
    """
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # takes a second to import, which would delay the first step of a run

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def compute_mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of the mean of `values`, float [n], n >= 1.

    The interval is a normal approximation, which requires a large n. For n = 1 both bounds are the value.
    """
    # 95 % of a normal distribution is within 1.96 standard deviations of the mean.
    margin = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return mean - margin, mean + margin


def compute_macro_f1_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of macro F1 by the percentile bootstrap (Efron 1979).

    Instead of drawing n examples with replacement, this function draws the counts of the confusion matrix from a
    multinomial distribution, which is equivalent and faster. The seed depends only on the numbers of examples and
    classes, so equal matrices have equal intervals.

    Args:
        confusion: number of examples per truth (row) and prediction (column), int [c, c]; at least one example.
    """
    truth, prediction = np.nonzero(confusion)
    is_correct = truth == prediction
    counts = confusion[truth, prediction]
    n, num_classes = int(counts.sum()), len(confusion)
    generator = np.random.default_rng([n, num_classes])
    batch_size = max(_COUNTS_PER_BATCH // max(len(counts), num_classes), 1)
    scores: list[float] = []
    for start in range(0, BOOTSTRAP_SAMPLES, batch_size):
        for resampled_counts in generator.multinomial(n, counts / n, size=min(batch_size, BOOTSTRAP_SAMPLES - start)):
            hits = np.bincount(truth[is_correct], weights=resampled_counts[is_correct], minlength=num_classes)
            denominators = np.bincount(truth, weights=resampled_counts, minlength=num_classes)
            denominators += np.bincount(prediction, weights=resampled_counts, minlength=num_classes)
            is_defined = denominators > 0
            scores.append(float((2 * hits[is_defined] / denominators[is_defined]).mean()))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
