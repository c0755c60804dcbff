"""The curve of a range test: its rates, the smoothed loss, when to stop, and the suggested learning rate."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.errors import ConfigError

LOWEST, HIGHEST = 1e-7, 10.0
MIN_STEPS, MAX_STEPS = 100, 400  # of a test; between them, those of an epoch
DIVERGED = 4.0  # the test ends when the smoothed loss is more than this times its minimum
SMOOTHING_STEPS = 3.0  # standard deviation of the kernel
MIN_DECREASE = 0.05  # of the first loss; with a smaller one, nothing is suggested


class Bounds(NamedTuple):
    """The learning rates of the first and the last step."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class Suggestion:
    """Two learning rates that a curve suggests."""

    steepest: float  # where the smoothed loss decreases fastest
    tenth: float  # a tenth of the rate of the minimum

    @property
    def chosen(self) -> float:
        """The smaller one, with two digits."""
        return float(f"{min(self.steepest, self.tenth):.1e}")


def parse_bounds(lowest: str, highest: str) -> Bounds:
    """Parse the bounds; raise a ConfigError unless both are positive numbers at least a decade apart."""
    values = []
    for key, text in (("lowest", lowest), ("highest", highest)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 1e-12 <= value <= 1e6:
            raise ConfigError("is not a number from 1e-12 to 1e6", key=key, value=text, fix=f"write {key}=1e-4")
        values.append(value)
    if values[1] < 10 * values[0]:
        raise ConfigError(
            "is less than ten times the lowest rate", key="highest", value=highest, fix="use a larger one"
        )
    return Bounds(*values)


def count_steps_per_decade(bounds: Bounds, steps_per_epoch: int) -> int:
    """Return the number of steps in which the rate grows tenfold: about an epoch in total, within the limits."""
    steps = min(max(steps_per_epoch, MIN_STEPS), MAX_STEPS)
    return max(math.ceil(steps / math.log10(bounds.highest / bounds.lowest)), 1)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Smooth the losses of steps, float [n], by a Gaussian kernel.

    It is centered: a trailing average would lag behind, and shift the suggestion to larger rates.
    """
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / SMOOTHING_STEPS) ** 2)
    return (weights @ losses) / weights.sum(axis=1)


def has_diverged(losses: np.ndarray) -> bool:
    """Return whether the newest losses of a test show that larger rates need not be tried."""
    if not np.isfinite(losses[-1:]).all():
        return True
    smoothed = smooth(losses)
    return len(losses) > 2 * SMOOTHING_STEPS and bool(smoothed[-1] > DIVERGED * max(smoothed.min(), 1e-6))


def suggest(rates: np.ndarray, smoothed: np.ndarray) -> Suggestion | None:
    """Suggest a learning rate by increasing `rates` and smoothed losses, float [n]; None if the loss never decreases.

    The slope is over the logarithm of the rate. Both rules are those of practice: the rate of the steepest descent, and
    a tenth of the rate of the minimum, where the loss begins to diverge (Smith 2017; Howard & Gugger 2020).
    """
    if len(rates) < 3:
        return None
    minimum = int(smoothed.argmin())
    if minimum < 2 or smoothed[:minimum].max() - smoothed[minimum] < MIN_DECREASE * smoothed[0]:
        return None
    slopes = np.gradient(smoothed, np.log(rates))[: minimum + 1]
    return Suggestion(float(rates[int(slopes.argmin())]), float(rates[minimum] / 10))
