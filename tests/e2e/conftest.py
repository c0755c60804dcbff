"""What several files of whole runs need."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.running import ROOT


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as `python -m trainer.prepare` writes them, in as many shards as the module's SHARDS says."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    command = [sys.executable, "-m", "trainer.prepare", "data=digits", f"output={folder}"]
    subprocess.run([*command, f"data.shards={request.module.SHARDS}"], cwd=ROOT, check=True, capture_output=True)
    return folder
