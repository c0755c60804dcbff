"""Small pictures made by a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest


@pytest.fixture
def pictures() -> Callable[[Sequence[int]], np.ndarray]:
    """Fetches 8 x 8 pictures by index."""

    def fetch(indices: Sequence[int]) -> np.ndarray:
        return np.stack([np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in indices])

    return fetch
