"""Measures of drift: their values, their limits, and their levels with and without a shift."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from trainer.evaluation.drift import (
    PredictionWindow,
    compute_embedding_distance,
    compute_psi,
    compute_psi_quantile,
    estimate_embedding_distance_quantile,
    get_most_severe_level,
    measure_drift,
    merge_bins,
    parse_reference,
)

WIDTH = 6


def test_population_stability_is_the_documented_sum() -> None:
    a, b = np.array([500_000, 300_000, 200_000]), np.array([200_000, 300_000, 500_000])
    expected = 2 * 0.3 * np.log(0.5 / 0.2)
    assert compute_psi(a, b) == pytest.approx(expected, rel=1e-4)
    assert compute_psi(b, a) == pytest.approx(compute_psi(a, b))
    assert compute_psi(a, 3 * a) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(compute_psi([10, 0], [0, 10]))


def test_the_limit_of_the_index_is_its_quantile_without_drift() -> None:
    draw, p = np.random.default_rng(3), np.array([0.4, 0.2, 0.15, 0.15, 0.1])
    indices = [compute_psi(draw.multinomial(400, p), draw.multinomial(150, p)) for _ in range(4000)]
    assert np.mean(np.array(indices) < compute_psi_quantile(400, 150, 5)) == pytest.approx(0.99, abs=0.006)
    exact = scipy.stats.chi2.ppf(0.99, 19) * (1 / 100 + 1 / 50)
    assert compute_psi_quantile(100, 50, 20) == pytest.approx(exact, rel=1e-9)


def test_bins_are_merged_until_each_has_5_percent_of_the_reference() -> None:
    reference, counts = merge_bins(np.array([0, 1, 1, 0, 6, 0, 2, 90]), np.arange(8))
    np.testing.assert_array_equal(reference, [8, 92])  # the last bin takes the rest
    np.testing.assert_array_equal(counts, [0 + 1 + 2 + 3 + 4, 5 + 6 + 7])
    sums = [values.sum() for values in merge_bins(np.array([0, 0, 100]), np.array([4, 5, 6]))]
    assert sums == [100, 15]


def draw_gaussian(seed: int, scale: float = 1.0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    factor = draw.standard_normal((WIDTH, WIDTH)) * scale
    return draw.standard_normal(WIDTH) + offset, factor @ factor.T


def test_the_distance_agrees_with_the_matrix_square_root() -> None:
    (m1, s1), (m2, s2) = draw_gaussian(1), draw_gaussian(2, 1.5, 0.7)
    reference = {"mean": m1, "covariance": s1}
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = (((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)) / np.trace(s1)
    assert compute_embedding_distance(reference, m2, s2) == pytest.approx(expected, rel=1e-6)
    assert compute_embedding_distance(reference, m1, s1) == pytest.approx(0, abs=1e-9)
    assert compute_embedding_distance(reference, m1 + np.sqrt(np.trace(s1) / WIDTH), s1) == pytest.approx(1)
    assert np.isfinite(compute_embedding_distance(reference, m1, np.zeros((WIDTH, WIDTH))))


def draw_sample(seed: int, count: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    classes = draw.choice(3, count, p=[0.5, 0.3, 0.2])
    confidence = draw.beta(8, 2 + 6 * shift, count)
    mean, covariance = draw_gaussian(5)
    return classes, confidence, draw.multivariate_normal(mean + shift, covariance, count)


def fill_window(*values: np.ndarray, size: int | None = None) -> PredictionWindow:
    window = PredictionWindow(3, size)
    for chosen, confidence, vector in zip(*values, strict=True):
        window.add(int(chosen), float(confidence), vector)
    return window


def reference() -> dict[str, Any]:
    window = fill_window(*draw_sample(1, 600))
    mean, covariance = window.fit_gaussian()
    return {
        "n": window.n,
        "class_frequencies": (window.classes / window.n).tolist(),
        "confidence_histogram": {"counts": window.confidences.tolist()},
        "embedding": {"mean": mean.tolist(), "covariance": covariance.tolist()},
    }


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_samples_of_the_reference_are_stable_and_others_shifted(count: int) -> None:
    same = [
        get_most_severe_level(measure_drift(reference(), fill_window(*draw_sample(seed, count))))
        for seed in range(10, 20)
    ]
    assert same.count("shifted") <= 1  # 30 measures, each wrong in 1 of 100 cases
    measured = measure_drift(reference(), fill_window(*draw_sample(3, count, shift=1.0)))
    levels = {m.name: m.level for m in measured}
    assert levels["confidence"] == levels["embedding"] == get_most_severe_level(measured) == "shifted"
    assert levels["classes"] != "shifted"


def test_other_classes_shift_only_the_classes() -> None:
    window = PredictionWindow(3)
    for confidence in draw_sample(4, 300)[1]:
        window.add(2, float(confidence))
    levels = {m.name: m.level for m in measure_drift(reference(), window)}
    assert levels == {"classes": "shifted", "confidence": "stable"}  # no embeddings


def test_the_limit_of_few_embeddings_is_larger_and_reproducible() -> None:
    own = reference()["embedding"]
    few, many = estimate_embedding_distance_quantile(own, 600, 10), estimate_embedding_distance_quantile(own, 600, 1000)
    assert few > 4 * many > 0
    assert estimate_embedding_distance_quantile(own, 600, 10) == few


@pytest.mark.parametrize("count", [WIDTH, WIDTH + 4, 100])
def test_the_limit_of_the_distance_is_its_quantile_without_drift(count: int) -> None:
    (mean, covariance), draw, distances = draw_gaussian(5), np.random.default_rng(8), []
    for _ in range(500):
        first, second = (draw.multivariate_normal(mean, covariance, size) for size in (300, count))
        moments = {"mean": first.mean(0), "covariance": np.cov(first, rowvar=False)}
        distances.append(compute_embedding_distance(moments, second.mean(0), np.cov(second, rowvar=False)))
    limit = estimate_embedding_distance_quantile({"mean": mean, "covariance": covariance}, 300, count)
    assert np.mean(np.array(distances) < limit) == pytest.approx(0.985, abs=0.0151)


def test_a_window_has_the_last_predictions_only() -> None:
    values = draw_sample(1, 500)
    last = [column[-60:] for column in values]
    window, expected = fill_window(*values, size=60), fill_window(*last)
    assert window.n == window.embedding_count == 60
    np.testing.assert_array_equal(window.classes, expected.classes)
    np.testing.assert_array_equal(window.confidences, expected.confidences)
    np.testing.assert_allclose(window.fit_gaussian()[0], last[2].mean(0), atol=1e-9)
    np.testing.assert_allclose(window.fit_gaussian()[1], np.cov(last[2], rowvar=False), atol=1e-9)


@pytest.mark.parametrize(("confidence", "index"), [(0.0, 0), (0.049, 0), (0.05, 1), (0.999, 19), (1.0, 19), (1.01, 19)])
def test_the_bins_of_confidence(confidence: float, index: int) -> None:
    window = PredictionWindow(1)
    window.add(0, confidence)
    assert window.confidences.nonzero()[0] == [index]


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": None}, {"classes": ["a", "b"]}, {"classes": ["a", "b", 3]}, {"classes": "abc"},
        {"embedding": {"n": "x"}}, {"embedding": {"n": None}}, {"embedding": {"projection": 0}},
        {"embedding": {"projection": [1.0]}}, {"embedding": {"projection": "x"}},
    ],
)  # fmt: skip
def test_a_reference_of_another_shape_is_damaged(changes: dict[str, Any]) -> None:
    whole = reference() | {"classes": ["a", "b", "c"]}
    assert parse_reference(json.dumps(whole).encode(), ["a", "b", "c"]) == whole
    whole |= {key: whole[key] | value if key == "embedding" else value for key, value in changes.items()}
    assert parse_reference(json.dumps(whole).encode(), ["a", "b", "c"]) is None
