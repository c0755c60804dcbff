"""Distance of images from the reference distribution of an export, in its features, without TensorFlow.

The distance is the Mahalanobis distance of the embedding from one Gaussian for all classes, the "marginal Mahalanobis
distance" (Kamoi and Kobayashi 2020, "Why is the Mahalanobis Distance Effective for Anomaly Detection?"; Lee et al. 2018
have a Gaussian per class). The Gaussian is that of reference.json, by which `trainer.drift` measures too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_VARIANCE = 1e-3  # of the mean variance: directions with less of it, such as of dead units, count as having that


@dataclass(frozen=True)
class EmbeddingDistance:
    """The Mahalanobis distance from the embeddings of a reference; C is the width of an embedding."""

    width: int  # C
    whitening: np.ndarray  # float64 [C, C'], projects and scales to unit variance
    center: np.ndarray  # float64 [C'], the mean after that
    reference_rms: float  # root mean square of the distances of the reference's own examples
    split: str  # that these examples are of

    def measure(self, embeddings: np.ndarray) -> np.ndarray:
        """Measure the distances, float64 [n] and at least 0, of embeddings float [n, C]."""
        return np.sqrt(((embeddings.astype(np.float64) @ self.whitening - self.center) ** 2).sum(axis=1))


def fit_distance(reference: Mapping[str, Any]) -> EmbeddingDistance | None:
    """Compute the distance function of the content of reference.json; None if it has no embedding."""
    moments = reference.get("embedding")
    if not moments:
        return None
    mean, covariance = np.asarray(moments["mean"], np.float64), np.asarray(moments["covariance"], np.float64)
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, 0.0)
    floored = np.maximum(variances, max(MIN_VARIANCE * variances.mean(), 1e-12))
    whitening = directions / np.sqrt(floored)
    projection = moments.get("projection")
    center, rms = mean @ whitening, float(np.sqrt((variances / floored).sum()))
    if projection is not None:
        whitening = np.asarray(projection, np.float64) @ whitening
    return EmbeddingDistance(len(whitening), whitening, center, rms, str(reference.get("split", "held-out")))
