"""Fixtures of several modules of whole runs."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.running import program


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 15 small JPEGs: dark and light."""
    rng = np.random.default_rng(1)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(low, low + 100, (60, 80, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02d}.jpg")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m trainer.prepare` writes them; the module's SHARDS is the number of shards."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    program("prepare", "data=digits", f"output={folder}", f"data.shards={request.module.SHARDS}")
    return folder
