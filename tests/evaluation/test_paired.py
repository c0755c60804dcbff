"""McNemar's exact test against its closed form, and intervals against simulation."""

from math import comb

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.evaluation.intervals import compute_macro_f1_interval, compute_mean_interval
from trainer.evaluation.paired import adjust_p_values, compare_paired


def make_outcomes(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * (both + lost) + [False] * (won + neither)
    second = [True] * both + [False] * lost + [True] * won + [False] * neither
    return np.array(first), np.array(second)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (0, 6), (1, 5), (3, 3), (12, 40), (100, 130)])
def test_p_is_the_binomial_tail_on_both_sides(lost: int, won: int) -> None:
    m, k = lost + won, min(lost, won)
    tail = sum(comb(m, i) for i in range(k + 1)) / 2**m
    pair = compare_paired(*make_outcomes(50, lost, won, 20))
    assert pair.p == pytest.approx(min(1.0, 2 * tail))
    assert (pair.lost, pair.won) == (lost, won)
    assert pair.difference == pytest.approx((won - lost) / (70 + m))
    assert pair.interval[0] <= pair.difference <= pair.interval[1]


def test_swapping_the_two_changes_only_the_sign() -> None:
    one, other = make_outcomes(30, 4, 11, 9)
    pair, swapped = compare_paired(one, other), compare_paired(other, one)
    assert (swapped.difference, swapped.p) == (-pair.difference, pair.p)
    assert swapped.interval == pytest.approx((-pair.interval[1], -pair.interval[0]))


def test_the_interval_covers_the_true_difference_in_95_percent_of_cases() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        cell = rng.choice(4, 200, p=[0.7, 0.05, 0.12, 0.13])
        pair = compare_paired(np.isin(cell, (0, 1)), np.isin(cell, (0, 2)))
        held += pair.interval[0] <= 0.07 <= pair.interval[1]
    assert 930 <= held <= 975


def test_equally_good_classifiers_differ_significantly_in_less_than_5_percent_of_cases() -> None:
    rng, p_values = np.random.default_rng(1), []
    for _ in range(1000):
        cell = rng.choice(4, 200, p=[0.7, 0.08, 0.08, 0.14])
        p_values.append(compare_paired(np.isin(cell, (0, 1)), np.isin(cell, (0, 2))).p)
    assert np.mean(np.array(p_values) < 0.05) < 0.05


def test_holm_by_hand() -> None:
    assert adjust_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_p_values([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjust_p_values([0.2]) == [0.2]


def test_the_interval_of_macro_f1_is_that_of_resampled_examples() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 300)
    answers = np.where(rng.random(300) < 0.7, labels, rng.integers(0, 4, 300))
    table = np.zeros((4, 4), int)
    np.add.at(table, (labels, answers), 1)
    drawn = [rng.integers(0, 300, 300) for _ in range(400)]
    scores = [f1_score(labels[d], answers[d], average="macro") for d in drawn]
    expected = np.percentile(scores, [2.5, 97.5])
    low, high = compute_macro_f1_interval(table)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.015)
    assert low < f1_score(labels, answers, average="macro") < high
    assert compute_macro_f1_interval(table) == (low, high)
    assert compute_macro_f1_interval(np.diag([5, 5])) == (1.0, 1.0)


def test_the_interval_of_a_mean() -> None:
    assert compute_mean_interval(np.array([1.0, 1.0, 1.0])) == (1.0, 1.0)
    assert compute_mean_interval(np.array([2.0])) == (2.0, 2.0)
    low, high = compute_mean_interval(np.arange(100.0))
    assert (low + high) / 2 == pytest.approx(49.5)
    assert high - low == pytest.approx(2 * 1.96 * 29.011 / 10, rel=1e-3)
