"""Measure how far image embeddings are from an export's reference distribution, without TensorFlow.

The measure is the "marginal Mahalanobis distance": the Mahalanobis distance from one Gaussian for all classes (Kamoi
and Kobayashi 2020, "Why is the Mahalanobis Distance Effective for Anomaly Detection?"). Lee et al. 2018 fit a Gaussian
per class instead. The Gaussian is stored in reference.json, which `trainer.drift` also reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_VARIANCE = 1e-3  # as a fraction of the mean variance; a lower variance, such as a dead unit's, is raised to it


@dataclass(frozen=True)
class EmbeddingDistance:
    """The Mahalanobis distance of an embedding from the distribution of the reference examples' embeddings.

    C is the width of an embedding, and C' the width of its projection. C' = C if there is no projection.
    """

    width: int  # width of an embedding, C
    whitening: np.ndarray  # float64 [C, C'], projects an embedding and scales it to unit variance
    center: np.ndarray  # float64 [C'], the mean of the whitened reference embeddings
    reference_rms: float  # root mean square distance of the reference examples
    split: str  # split that contains the reference examples; "held-out" if reference.json does not name it

    def measure(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the distance of each embedding, float64 [n]; `embeddings` is float [n, C]."""
        return np.sqrt(((embeddings.astype(np.float64) @ self.whitening - self.center) ** 2).sum(axis=1))


def build_embedding_distance(reference: Mapping[str, Any]) -> EmbeddingDistance | None:
    """Build an `EmbeddingDistance` from the content of reference.json. Return None if it has no `embedding`."""
    moments = reference.get("embedding")
    if not moments:
        return None
    mean, covariance = np.asarray(moments["mean"], np.float64), np.asarray(moments["covariance"], np.float64)
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, 0.0)
    floored_variances = np.maximum(variances, max(MIN_VARIANCE * variances.mean(), 1e-12))
    whitening = directions / np.sqrt(floored_variances)
    projection = moments.get("projection")
    center = mean @ whitening
    rms = float(np.sqrt((variances / floored_variances).sum()))
    if projection is not None:
        whitening = np.asarray(projection, np.float64) @ whitening
    return EmbeddingDistance(len(whitening), whitening, center, rms, str(reference.get("split", "held-out")))
