"""Setup of every test: quiet TensorFlow, a separate cache, and skips of tests that need a GPU or a browser."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

from tests.evaluation.browser import Tab, chromium, find_chromium
from trainer.monitoring.log import configure
from trainer.storage.path import StoragePath, storage_path

# absl's handler holds sys.stderr, which here is a file of pytest, and closes it when Hydra configures logging.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and `trainer.plan` reads it


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Use a new `runtime.cache_dir`, outside of the user's home."""
    with tempfile.TemporaryDirectory(prefix="kubetune-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBETUNE_CACHE", str(Path(folder) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _log_as_text() -> None:
    """Configure the log as a command does before it reads its configuration."""
    configure()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """Open a page in a browser."""
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(params=["local", "bucket"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoragePath]:
    """Yield an output_dir for a run, on disk and in a bucket."""
    if request.param == "local":
        yield storage_path(tmp_path / "a run")
        return
    from tests.storage.emulator import BUCKET, running

    with running(tmp_path / "objects"):
        yield storage_path(f"gs://{BUCKET}/a run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import tensorflow as tf

        if not tf.config.list_physical_devices("GPU"):
            pytest.skip("needs a GPU")
    if item.get_closest_marker("browser") and not find_chromium():
        pytest.skip("THE PAGE WAS NOT OPENED IN A BROWSER: no Chromium on the PATH (apt-get install chromium)")
