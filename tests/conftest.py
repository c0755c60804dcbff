"""What every test gets: quiet TensorFlow, a cache of its own, and no GPU test where there is no GPU."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

from tests.evaluation.browser import find_chromium
from trainer.monitoring.log import configure

# absl takes sys.stderr as it finds it, which is pytest's own file, and closes that when Hydra configures logging.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Keep what the code caches between runs (`runtime.cache_dir`) out of the user's home, and fresh."""
    with tempfile.TemporaryDirectory(prefix="kubetune-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBETUNE_CACHE", str(Path(folder) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _log_as_text() -> None:
    """Set up the log as a command does that has not read its configuration yet."""
    configure()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import tensorflow as tf

        if not tf.config.list_physical_devices("GPU"):
            pytest.skip("needs a GPU")
    if item.get_closest_marker("browser") and not find_chromium():
        pytest.skip("THE PAGE WAS NOT OPENED IN A BROWSER: no Chromium on the PATH (apt-get install chromium)")
