"""An emulator for each module, and short pauses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.emulator import BUCKET, Emulator, running
from trainer.storage import gcs, gcs_client
from trainer.storage.path import StoragePath, storage_path


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """One emulator for all tests of a module; each test has its own folder."""
    with running(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture
def in_bucket(emulator: Emulator, request: pytest.FixtureRequest) -> StoragePath:  # noqa: ARG001 - it must run
    """An empty folder in the emulator's bucket."""
    return storage_path(f"gs://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}")


@pytest.fixture(params=["local", "bucket"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty folder, once on disk and once in a bucket."""
    if request.param == "local":
        return storage_path(tmp_path / "home")
    return request.getfixturevalue("in_bucket")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, a deadline of seconds."""
    monkeypatch.setattr(gcs_client, "INITIAL_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(gcs_client, "MAX_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(gcs_client, "DEADLINE_SECONDS", 15.0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of more than 64 KiB count as large."""
    for name in ("MAX_UNCHUNKED_BYTES", "CHUNK_BYTES", "PART_BYTES"):
        monkeypatch.setattr(gcs, name, 1 << 16)
