"""What the measures of drift are, when chance alone would reach their limits, and that a shift goes over them."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from trainer.evaluation.drift import (
    Window,
    confidence_bin,
    distance_by_chance,
    embedding_distance,
    measures,
    merged,
    population_stability,
    stability_by_chance,
    verdict,
)

WIDTH = 6


def test_population_stability_is_symmetric_zero_for_equals_and_the_sum_it_is_said_to_be() -> None:
    a, b = np.array([500_000, 300_000, 200_000]), np.array([200_000, 300_000, 500_000])
    expected = 2 * 0.3 * np.log(0.5 / 0.2)
    assert population_stability(a, b) == pytest.approx(expected, rel=1e-4)
    assert population_stability(b, a) == pytest.approx(population_stability(a, b))
    assert population_stability(a, 3 * a) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(population_stability([10, 0], [0, 10]))


def test_the_limit_of_the_index_is_what_samples_of_one_distribution_stay_below() -> None:
    draw, shares = np.random.default_rng(3), np.array([0.4, 0.2, 0.15, 0.15, 0.1])
    found = [population_stability(draw.multinomial(400, shares), draw.multinomial(150, shares)) for _ in range(4000)]
    below = np.mean(np.array(found) < stability_by_chance(400, 150, 5))
    assert below == pytest.approx(0.99, abs=0.006)
    exact = scipy.stats.chi2.ppf(0.99, 19) * (1 / 100 + 1 / 50)
    assert stability_by_chance(100, 50, 20) == pytest.approx(exact, rel=0.01)


def test_bins_are_merged_until_each_can_be_compared() -> None:
    reference, counts = np.array([0, 1, 1, 0, 6, 0, 2, 90]), np.arange(8)
    ours, theirs = merged(reference, counts)
    np.testing.assert_array_equal(ours, [8, 92])  # the last bin of all takes what is left
    np.testing.assert_array_equal(theirs, [0 + 1 + 2 + 3 + 4, 5 + 6 + 7])
    everything = merged(np.array([0, 0, 100]), np.array([4, 5, 6]))
    np.testing.assert_array_equal(everything[0].sum(), 100)
    np.testing.assert_array_equal(everything[1].sum(), 15)


def gaussian(seed: int, scale: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    factor = draw.standard_normal((WIDTH, WIDTH)) * scale
    return draw.standard_normal(WIDTH) + offset, factor @ factor.T


def test_the_distance_is_that_of_the_matrix_square_root() -> None:
    (m1, s1), (m2, s2) = gaussian(1), gaussian(2, 1.5, 0.7)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = (((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)) / np.trace(s1)
    assert embedding_distance({"mean": m1, "covariance": s1}, m2, s2) == pytest.approx(expected, rel=1e-6)
    assert embedding_distance({"mean": m1, "covariance": s1}, m1, s1) == pytest.approx(0, abs=1e-9)
    moved = m1 + np.sqrt(np.trace(s1) / WIDTH)
    assert embedding_distance({"mean": m1, "covariance": s1}, moved, s1) == pytest.approx(1)


def test_a_sample_of_no_spread_at_all_has_a_distance() -> None:
    mean, covariance = gaussian(1)
    assert np.isfinite(embedding_distance({"mean": mean, "covariance": covariance}, mean, np.zeros((WIDTH, WIDTH))))


def reference_of(classes: np.ndarray, confidence: np.ndarray, embeddings: np.ndarray) -> dict[str, Any]:
    window = Window(3)
    for chosen, sure, vector in zip(classes, confidence, embeddings, strict=True):
        window.add(int(chosen), float(sure), vector)
    mean, covariance = window.gaussian()
    return {
        "n": window.n,
        "class_frequencies": (window.classes / window.n).tolist(),
        "confidence_histogram": {"counts": window.confidences.tolist()},
        "embedding": {"mean": mean.tolist(), "covariance": covariance.tolist()},
    }


def sample(seed: int, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    classes = draw.choice(3, count, p=[0.5, 0.3, 0.2])
    confidence = draw.beta(8, 2 + 6 * shift, count)
    mean, covariance = gaussian(5)
    return classes, confidence, draw.multivariate_normal(mean + shift, covariance, count)


def window_of(seed: int, count: int, shift: float = 0.0, size: int | None = None) -> Window:
    window = Window(3, size)
    for chosen, sure, vector in zip(*sample(seed, count, shift), strict=True):
        window.add(int(chosen), float(sure), vector)
    return window


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_what_comes_from_the_reference_is_stable_and_what_moved_is_shifted(count: int) -> None:
    reference = reference_of(*sample(1, 600))
    same = [verdict(measures(reference, window_of(seed, count))) for seed in range(10, 20)]
    assert same.count("shifted") <= 1  # of ten times three measures, each wrong in one of a hundred
    moved = {m.name: m for m in measures(reference, window_of(3, count, shift=1.0))}
    assert moved["confidence"].level == "shifted"
    assert moved["embedding"].level == "shifted"
    assert moved["classes"].level != "shifted"  # they are as they were
    assert verdict(list(moved.values())) == "shifted"


def test_other_classes_shift_the_classes_alone() -> None:
    reference, window = reference_of(*sample(1, 600)), Window(3)
    for _, sure, _ in zip(*sample(4, 300), strict=True):
        window.add(2, float(sure))
    found = {m.name: m.level for m in measures(reference, window)}
    assert found == {"classes": "shifted", "confidence": "stable"}  # no embedding was logged, none is judged


def test_the_chance_of_few_embeddings_is_larger_and_reproducible() -> None:
    own = reference_of(*sample(1, 600))["embedding"]
    few, many = distance_by_chance(own, 600, 10), distance_by_chance(own, 600, 1000)
    assert few > 4 * many > 0
    assert distance_by_chance(own, 600, 10) == few


@pytest.mark.parametrize("count", [WIDTH, WIDTH + 4, 100])
def test_the_limit_of_the_distance_is_what_samples_of_one_gaussian_stay_below(count: int) -> None:
    (mean, covariance), draw, found = gaussian(5), np.random.default_rng(8), []
    own = {"mean": mean, "covariance": covariance}
    for _ in range(500):
        one, other = (draw.multivariate_normal(mean, covariance, size) for size in (300, count))
        moments = {"mean": one.mean(0), "covariance": np.cov(one, rowvar=False)}
        found.append(embedding_distance(moments, other.mean(0), np.cov(other, rowvar=False)))
    assert np.mean(np.array(found) < distance_by_chance(own, 300, count)) == pytest.approx(0.985, abs=0.0151)


def test_a_window_forgets_all_but_the_last() -> None:
    long, short = window_of(1, 500, size=60), Window(3)
    for chosen, sure, vector in zip(*(values[-60:] for values in sample(1, 500)), strict=True):
        short.add(int(chosen), float(sure), vector)
    assert long.n == long.embedded == 60
    np.testing.assert_array_equal(long.classes, short.classes)
    np.testing.assert_array_equal(long.confidences, short.confidences)
    for ours, theirs in zip(long.gaussian(), short.gaussian(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    expected = np.stack([vector for _, _, vector in zip(*(v[-60:] for v in sample(1, 500)), strict=True)])
    np.testing.assert_allclose(long.gaussian()[1], np.cov(expected, rowvar=False), atol=1e-9)


@pytest.mark.parametrize(("confidence", "place"), [(0.0, 0), (0.049, 0), (0.05, 1), (0.999, 19), (1.0, 19), (1.01, 19)])
def test_the_bins_of_confidence(confidence: float, place: int) -> None:
    assert confidence_bin(confidence) == place
