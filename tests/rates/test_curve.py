"""The range test: its steps, when it ends, and what its curve suggests."""

import numpy as np
import pytest

from tests.errors import raises
from trainer.config.phases import Phase
from trainer.errors import ConfigError
from trainer.rates.curve import Bounds, count_steps_per_decade, has_diverged, parse_bounds, smooth, suggest
from trainer.rates.range_test import describe, make_test_phase, render_page, require_phase
from trainer.training.optimizers import build_schedule

RATES = np.logspace(-7, 1, 97)


def make_curve(noise: float = 0.0) -> np.ndarray:
    """A loss of 2 that decreases around a rate of 1e-3, has its minimum at 1e-1, and then diverges."""
    x = np.log10(RATES)
    losses = 2 - 1.5 / (1 + np.exp(-4 * (x + 3))) + np.maximum(x + 1, 0) ** 2 * 3
    return losses + noise * np.random.default_rng(1).normal(size=len(x))


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_the_steepest_descent_and_a_tenth_of_the_minimum(noise: float) -> None:
    suggestion = suggest(RATES, smooth(make_curve(noise)))
    assert suggestion is not None
    assert 10**-3.5 < suggestion.steepest < 10**-2.5
    assert 10**-3.1 < suggestion.tenth < 10**-1.4
    assert suggestion.chosen == float(f"{min(suggestion.steepest, suggestion.tenth):.1e}")


@pytest.mark.parametrize(
    "losses", [np.full(97, 2.0), np.linspace(2, 3, 97), 2 + 0.01 * np.sin(np.arange(97)), np.zeros(97)]
)
def test_nothing_is_suggested_if_the_loss_does_not_decrease(losses: np.ndarray) -> None:
    assert suggest(RATES, smooth(losses)) is None


def test_smoothing_does_not_shift_and_keeps_a_constant() -> None:
    np.testing.assert_allclose(smooth(np.full(20, 3.0)), 3.0)
    peak = np.zeros(41)
    peak[20] = 1
    assert smooth(peak).argmax() == 20


def test_a_test_ends_when_the_loss_diverges() -> None:
    assert not has_diverged(make_curve()[:80])
    assert has_diverged(np.array([2.0, np.nan]))
    assert has_diverged(np.append(make_curve()[:80], [50.0] * 5))


def test_the_rate_grows_from_the_lowest_to_the_highest() -> None:
    phase = Phase.model_validate({"thaw": "none", "epochs": 3, "schedule": {"name": "cosine", "warmup": "2 epochs"},
                                  "optimizer": {"name": "sgd", "momentum": 0.9}})  # fmt: skip
    bounds = Bounds(1e-5, 1e-1)
    test = make_test_phase(phase, bounds, steps_per_epoch=19)
    assert test.steps == 101
    assert test.optimizer.momentum == 0.9
    rate = build_schedule(
        test.schedule, test.optimizer.learning_rate, total_steps=101, steps_per_epoch=19, batch_size=8
    )
    np.testing.assert_allclose([float(rate(s)) for s in (0, 25, 100)], [1e-5, 1e-4, 1e-1], rtol=1e-4)
    assert [count_steps_per_decade(bounds, n) for n in (19, 200, 10_000)] == [25, 50, 100]


@pytest.mark.parametrize(
    ("lowest", "highest", "key"),
    [
        ("0", "1", "lowest"),
        ("a", "1", "lowest"),
        ("1e-3", "nan", "highest"),
        ("1e-3", "5e-3", "highest"),
        ("1", "-1", "highest"),
    ],
)
def test_bounds_that_are_no_range_are_rejected(lowest: str, highest: str, key: str) -> None:
    with raises(ConfigError, key=key):
        parse_bounds(lowest, highest)


def test_another_phase_is_rejected_with_the_names_of_the_phases() -> None:
    phase = Phase.model_validate({"thaw": "none", "epochs": 3})
    require_phase("head", {"head": phase})
    with raises(ConfigError, key="phase", value="hed", problem="not a phase", fix="^use head or fine_tune$"):
        require_phase("hed", {"head": phase, "fine_tune": phase})


def test_the_summary_can_be_pasted_and_the_page_escapes_the_name() -> None:
    phase = Phase.model_validate({"thaw": "none", "epochs": 3})
    losses = make_curve(0.1)
    suggestion = suggest(RATES, smooth(losses))
    lines = describe("head", phase, RATES, smooth(losses), suggestion)
    assert suggestion is not None
    assert lines[-1] == f"suggested: phases.head.optimizer.learning_rate={suggestion.chosen:g}"
    assert "no rate is suggested" in describe("head", phase, RATES, losses, None)[-1]
    page = render_page("<b>head</b>", lines, RATES, losses, smooth(losses), suggestion)
    assert "<b>head" not in page
    assert "<svg" in page
    assert "<svg" in render_page("head", lines, RATES, losses, smooth(losses), None)
