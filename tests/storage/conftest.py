"""Servers of both kinds of buckets for each module, and short pauses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.emulator import BUCKET, Emulator, running
from tests.storage.s3_server import S3Server, s3_running
from trainer.storage import bucket, retries
from trainer.storage.path import StoragePath, storage_path


@pytest.fixture(scope="module")
def gs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with running(tmp_path_factory.mktemp("buckets")) as server:
        yield server


@pytest.fixture(scope="session")
def running_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_running(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def s3_server(running_s3_server: S3Server) -> Iterator[S3Server]:
    with running_s3_server.environment():
        yield running_s3_server


@pytest.fixture(scope="module", params=["gs", "s3"])
def emulator(request: pytest.FixtureRequest) -> Emulator | S3Server:
    """One server of each kind for all tests of a module; each test has its own folder."""
    return request.getfixturevalue(f"{request.param}_server")


def folder_of(request: pytest.FixtureRequest, scheme: str) -> StoragePath:
    module, test = request.node.module.__name__.rpartition(".")[2], request.node.name
    return storage_path(f"{scheme}://{BUCKET}/{module}/{test.replace('[', '-').replace(']', '')}")


@pytest.fixture
def in_bucket(emulator: Emulator | S3Server, request: pytest.FixtureRequest) -> StoragePath:
    """An empty folder in the bucket of a server."""
    return folder_of(request, emulator.scheme)


@pytest.fixture(params=["local", "gs", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    """An empty folder, on disk and in the buckets of both kinds."""
    if request.param == "local":
        return storage_path(tmp_path / "home")
    request.getfixturevalue(f"{request.param}_server")
    return folder_of(request, request.param)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, a deadline of seconds."""
    monkeypatch.setattr(retries, "INITIAL_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(retries, "MAX_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", 15.0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of more than 64 KiB count as large."""
    for name in ("MAX_UNCHUNKED_BYTES", "CHUNK_BYTES", "PART_BYTES"):
        monkeypatch.setattr(bucket, name, 1 << 16)
