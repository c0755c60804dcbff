"""A bucket whose requests the requester pays for: with the project of the environment, or an error that names it."""

import json
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.errors import raises
from tests.storage.emulator import BUCKET, Emulator, environment
from tests.storage.faulty import FaultyProxy, _read_body, _respond
from trainer.errors import DataError
from trainer.storage import gcs_client
from trainer.storage.path import storage_path
from trainer.storage.staging import stage

NO_PAYER = "Bucket is a requester pays bucket but no user project provided."
NO_PERMISSION = "trainer@p.iam does not have serviceusage.services.use access to the Google Cloud project."


class RequesterPays(FaultyProxy):
    """Refuses requests without a project, and those of a project that the account may not use, as the storage does."""

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        (project,) = parse_qs(urlsplit(request.path).query).get("userProject", [""])
        self.counts[f"by {project}"] += 1
        if project == "payer":
            return super()._serve(request)
        status, message = (403, NO_PERMISSION) if project else (400, NO_PAYER)
        _read_body(request)
        content = json.dumps({"error": {"code": status, "message": message, "errors": [{"reason": "required"}]}})
        _respond(request, status, {"Content-Type": "application/json"}, content.encode())


@pytest.fixture
def paid(gs_server: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[RequesterPays]:
    monkeypatch.setattr(gcs_client, "_requester_pays_buckets", set())
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    storage_path(f"gs://{BUCKET}/photos/cat/0.jpg").write(b"cat")
    proxy = RequesterPays(gs_server.url, {})
    try:
        with environment(proxy.url):
            yield proxy
    finally:
        proxy.close()


def test_the_project_of_the_environment_pays(
    paid: RequesterPays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    small_parts: None,  # noqa: ARG001 - large objects of 64 KiB: parts, compose, ranges
) -> None:  # fmt: skip
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "payer")
    notes: list[str] = []
    folder = stage(f"gs://{BUCKET}/photos", tmp_path, 10**9, notes.append, lambda: None)
    assert (Path(folder) / "cat/0.jpg").read_bytes() == b"cat"
    file, content = storage_path(f"gs://{BUCKET}/large"), bytes(range(256)) * 1000
    file.write(content)
    assert file.read() == content
    assert file.read_range(70_000, 100_000) == content[70_000:170_000]
    file.download(tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == content
    file.delete()
    assert not file.exists()
    assert paid.counts["by "] == 1  # only the first request, which shows that the bucket requires a payer
    message = f"gs://{BUCKET} is a requester-pays bucket: project payer (GOOGLE_CLOUD_PROJECT) is charged"
    assert "".join(capsys.readouterr()).count(message) == 1


@pytest.mark.parametrize("act", ["read", "list", "stat", "write"])
def test_without_a_project_the_error_names_what_to_set(act: str, paid: RequesterPays) -> None:
    file = storage_path(f"gs://{BUCKET}/photos/cat/0.jpg")
    problem = f"^{file}: is in a requester-pays bucket$"
    fix = "set it to the project that pays"
    with raises(DataError, key="GOOGLE_CLOUD_PROJECT", value=None, fix=fix, problem=problem):
        file.write(b"x") if act == "write" else getattr(file, act)()
    assert paid.counts == Counter({"by ": 1})  # no retries


def test_a_project_that_the_account_may_not_use_is_an_error(
    paid: RequesterPays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "other")
    with raises(DataError, problem="lacks the permission serviceusage.services.use", fix="docs/storage.md"):
        storage_path(f"gs://{BUCKET}/photos/cat/0.jpg").read()
    assert paid.counts == Counter({"by ": 1, "by other": 1})


def test_no_project_is_sent_to_other_buckets(
    gs_server: Emulator,  # noqa: ARG001 - it must run
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gcs_client, "_requester_pays_buckets", set())
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "payer")
    storage_path(f"gs://{BUCKET}/free/x").write(b"x")
    assert storage_path(f"gs://{BUCKET}/free/x").read() == b"x"
    assert gcs_client.get_bucket(BUCKET).user_project is None
    assert gcs_client._requester_pays_buckets == set()
