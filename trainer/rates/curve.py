"""Analyze a learning-rate range test: its bounds and length, the smoothed loss, when to stop, and the suggestion."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.errors import ConfigError

DEFAULT_LOWEST, DEFAULT_HIGHEST = 1e-7, 10.0  # default learning rates of the first and the last step
MIN_STEPS, MAX_STEPS = 100, 400  # limits of a test's length, which is otherwise one epoch
DIVERGENCE_FACTOR = 4.0  # the test ends when the smoothed loss exceeds its minimum by this factor
SMOOTHING_STEPS = 3.0  # standard deviation of the smoothing kernel, in steps
MIN_DECREASE = 0.05  # a suggestion requires that the loss decreases by this fraction of the first loss


class Bounds(NamedTuple):
    """The learning rates of the first and the last step of a test."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class Suggestion:
    """The learning rates that two rules suggest for a range test."""

    steepest: float  # the rate where the smoothed loss decreases fastest
    tenth: float  # a tenth of the rate where the smoothed loss has its minimum

    @property
    def chosen(self) -> float:
        """The smaller of `steepest` and `tenth`, rounded to two significant digits."""
        return float(f"{min(self.steepest, self.tenth):.1e}")


def parse_bounds(lowest: str, highest: str) -> Bounds:
    """Parse the bounds. Raises ConfigError unless both are numbers from 1e-12 to 1e6, and highest >= 10 * lowest."""
    rates = []
    for key, text in (("lowest", lowest), ("highest", highest)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 1e-12 <= value <= 1e6:
            raise ConfigError("is not a number from 1e-12 to 1e6", key=key, value=text, fix=f"write {key}=1e-4")
        rates.append(value)
    if rates[1] < 10 * rates[0]:
        raise ConfigError(
            "is less than ten times the lowest rate", key="highest", value=highest, fix="use a larger one"
        )
    return Bounds(*rates)


def count_steps_per_decade(bounds: Bounds, steps_per_epoch: int) -> int:
    """Return the number of steps in which the learning rate grows tenfold.

    The test takes about one epoch, but at least `MIN_STEPS` and at most `MAX_STEPS` steps.
    """
    num_steps = min(max(steps_per_epoch, MIN_STEPS), MAX_STEPS)
    return max(math.ceil(num_steps / math.log10(bounds.highest / bounds.lowest)), 1)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Smooth the losses of consecutive steps, float [n], with a Gaussian kernel. Return float [n].

    The kernel is centered, because a trailing average would lag behind and shift the suggestion to larger rates.
    """
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / SMOOTHING_STEPS) ** 2)
    return (weights @ losses) / weights.sum(axis=1)


def has_diverged(losses: np.ndarray) -> bool:
    """Return whether the test can end because the loss diverges. `losses` has the loss of each step so far, float [n].

    The loss diverges if its newest value is not finite, or, after the first steps, its newest smoothed value exceeds
    `DIVERGENCE_FACTOR` times its smallest smoothed value.
    """
    if not np.isfinite(losses[-1:]).all():
        return True
    smoothed = smooth(losses)
    return len(losses) > 2 * SMOOTHING_STEPS and bool(smoothed[-1] > DIVERGENCE_FACTOR * max(smoothed.min(), 1e-6))


def suggest(rates: np.ndarray, smoothed: np.ndarray) -> Suggestion | None:
    """Suggest a learning rate by two common rules (Smith 2017; Howard & Gugger 2020).

    The first is the rate where the loss decreases fastest over the logarithm of the rate. The second is a tenth of the
    rate where the loss has its minimum, because larger rates make it diverge.

    Args:
        rates: learning rate of each step, increasing, float [n].
        smoothed: smoothed loss of each step, float [n].

    Returns:
        The suggestion; None if the loss decreases by less than `MIN_DECREASE` times the first loss, or if there are
        fewer than two steps before its minimum.
    """
    if len(rates) < 3:
        return None
    min_step = int(smoothed.argmin())
    if min_step < 2 or smoothed[:min_step].max() - smoothed[min_step] < MIN_DECREASE * smoothed[0]:
        return None
    slopes = np.gradient(smoothed, np.log(rates))[: min_step + 1]
    return Suggestion(float(rates[int(slopes.argmin())]), float(rates[min_step] / 10))
