"""How sure a share is."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable inference, the law of succession").

    Two shares whose intervals do not overlap differ; the reverse does not hold. Of no trials nothing is known: (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
