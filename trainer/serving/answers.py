"""What the model says of one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
        probabilities: float32 [classes].
        embedding: float32 [C], the pooled features; None where the export does not give them.
        heatmap: float32 [h, w] in 0..1, Grad-CAM of the most probable class; None where it was not asked for.
    """

    probabilities: np.ndarray
    embedding: np.ndarray | None = None
    heatmap: np.ndarray | None = None


@dataclass(frozen=True)
class Unreadable:
    """An image whose header looked well, and whose pixels could not be decoded."""

    reason: str
