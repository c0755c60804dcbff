"""One export and one server for all tests that do not stop it."""

from collections.abc import Iterator

import pytest

from tests.serving.running import Exported, Served


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported.create(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def served(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "predictions.jsonl"
    limits = ("max_bytes=1000000", "max_pixels=2000000", "max_images=8", "queue=64", "batch=8", "window_ms=5")
    with Served(f"model={exported.folder}", f"log={log}", "log_sample=0.5", *limits) as server:
        yield server.ready()
        assert "Traceback" not in server.output
        assert not any("requests_total{500," in key for key in server.metrics())
