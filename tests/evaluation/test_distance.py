"""The distance from the reference distribution is a Mahalanobis distance in the projected embedding."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from trainer.evaluation.distance import build_embedding_distance
from trainer.exporting.reference import compute_reference


def make_reference(embeddings: np.ndarray) -> dict[str, object]:
    """A reference as it is read from its file."""
    probabilities = np.full((len(embeddings), 2), 0.5, np.float32)
    return dict(json.loads(json.dumps(compute_reference("test", ("a", "b"), probabilities, embeddings, 32, "crop"))))


@pytest.mark.parametrize("width", [3, 16, 40])
def test_it_is_scipys_mahalanobis_distance(width: int) -> None:
    rng = np.random.default_rng(width)
    mixing = np.eye(width) + 0.1 * rng.standard_normal((width, width))
    embeddings = (rng.standard_normal((300, width)) @ mixing + 5).astype(np.float32)
    reference = make_reference(embeddings)
    moments = reference["embedding"]
    assert isinstance(moments, dict)
    distance = build_embedding_distance(reference)
    assert distance is not None
    assert (distance.width, distance.split) == (width, "test")
    projected = embeddings.astype(np.float64)
    if width > 16:
        projected = projected @ np.array(moments["projection"])
    inverse = np.linalg.inv(np.array(moments["covariance"]))
    expected = [mahalanobis(row, moments["mean"], inverse) for row in projected]
    measured = distance.measure(embeddings)
    np.testing.assert_allclose(measured, expected, rtol=1e-3)
    assert distance.reference_rms == pytest.approx(min(width, 16) ** 0.5)
    assert np.sqrt((measured**2).mean()) == pytest.approx(distance.reference_rms, rel=0.01)
    far = distance.measure(embeddings[:5] + 50)
    assert (far > measured.max()).all()


def test_features_without_variance_do_not_make_it_infinite() -> None:
    embeddings = np.zeros((50, 4), np.float32)
    embeddings[:, 0] = np.linspace(-1, 1, 50)
    distance = build_embedding_distance(make_reference(embeddings))
    assert distance is not None
    assert distance.reference_rms == pytest.approx(1.0)
    assert distance.measure(np.zeros((1, 4)))[0] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(distance.measure(np.full((1, 4), 0.1))).all()


def test_a_reference_without_an_embedding_has_no_distance() -> None:
    reference = make_reference(np.eye(8, dtype=np.float32))
    assert build_embedding_distance({key: value for key, value in reference.items() if key != "embedding"}) is None
