"""What only S3 has: ETags, multipart uploads, credentials and endpoints of the environment."""

import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import google_crc32c
import obstore
import pytest

from scripts.same_bits import free_ports
from tests.errors import ANY, raises
from tests.storage.conftest import folder_of
from tests.storage.emulator import BUCKET
from tests.storage.s3_server import READER, S3Server
from trainer.errors import DataError
from trainer.storage import retries
from trainer.storage.path import ConflictError, StoragePath, storage_path
from trainer.storage.s3_client import describe_identity, get_store

CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.*IRSA.*AWS_SKIP_SIGNATURE"


@pytest.fixture
def home(s3_server: S3Server, request: pytest.FixtureRequest) -> StoragePath:  # noqa: ARG001 - it must run
    return folder_of(request, "s3")


def test_a_large_file_is_one_multipart_upload(home: StoragePath, tmp_path: Path) -> None:
    content = os.urandom((20 << 20) + 7)
    (tmp_path / "source").write_bytes(content)
    version = (home / "large").upload(tmp_path / "source")
    assert str(version).endswith('-3"')  # parts of 8 MiB
    assert (home / "large").stat().crc32c == google_crc32c.value(content)  # type: ignore[union-attr]
    (home / "large").download(tmp_path / "target", home.list()[0])
    assert (tmp_path / "target").read_bytes() == content
    assert (home / "large").read_range(17 << 20, 100) == content[17 << 20 :][:100]
    assert [info.path.name for info in home.list()] == ["large"]


def test_objects_of_other_programs_are_read(home: StoragePath, tmp_path: Path) -> None:
    """They have no CRC32C in their metadata."""
    store = get_store(BUCKET, (5.0, 5.0))
    for name, size in (("small", 5), ("large", 40 << 20)):
        content = os.urandom(size)
        obstore.put(store, f"{home.key}/{name}", content)  # type: ignore[attr-defined]
        file = home / name
        assert file.require_info().crc32c is None
        assert file.read() == content
        file.download(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_a_conditional_write_replaces_what_another_program_wrote(home: StoragePath) -> None:
    store = get_store(BUCKET, (5.0, 5.0))
    obstore.put(store, f"{home.key}/marker", b"theirs")  # type: ignore[attr-defined]
    version = (home / "marker").version()
    with pytest.raises(ConflictError):
        (home / "marker").write("ours", only_if=None)
    (home / "marker").write("ours", only_if=version)
    assert (home / "marker").read() == b"ours"


@pytest.mark.parametrize("name", ["a b", "é+%41&=?#<>'\"", "日本", "x" * 200, "[1]*", "..."], ids=range(6))
def test_unusual_names(home: StoragePath, name: str) -> None:
    (home / name / "x").write(name)
    assert [str(info.path) for info in home.list()] == [f"{home}/{name}/x"]
    assert home.folders() == [home / name]
    assert (home / name / "x").read_text() == name
    home.delete_tree()
    assert not home.is_folder()


@pytest.mark.parametrize("name", ["a\nb", "a\x01b"], ids=["newline", "control"])
def test_names_that_the_client_cannot_address_are_rejected(home: StoragePath, name: str) -> None:
    for act in (lambda file: file.write("x"), lambda file: file.exists()):
        with raises(DataError, problem=r"^s3://[^\n]*cannot address such a name", fix="rename it"):
            act(home / name)


@pytest.mark.parametrize(
    ("key", "readable"), [("p/a//b", False), ("p/../b", False), ("p/a&#1;b", False), ("p/a/", True)]
)
def test_a_listing_with_a_name_that_the_client_cannot_read(
    key: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS has no such names, S3 does; the last one is the mark of an empty folder."""
    fields = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag><Size>0</Size>"
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>{key}</Key>{fields}</Contents></ListBucketResult>"

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        folder = storage_path("s3://b/p")
        if readable:
            assert [str(info.path) for info in folder.list()] == ["s3://b/p/a"]
        else:
            with raises(DataError, problem="^s3://b/p: has an object whose name S3's client cannot read", fix="rename"):
                folder.list()
        server.shutdown()


@pytest.mark.parametrize(
    ("act", "permission"),
    [
        (lambda file: file.write("x"), "s3:PutObject"),
        (lambda file: file.delete(), "s3:DeleteObject"),
        (lambda file: file.upload(Path(__file__)), "s3:PutObject"),
    ],
)
def test_a_key_without_the_permission(
    home: StoragePath, act: Callable[[StoragePath], object], permission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "x").write("x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    assert (home / "x").read() == b"x"
    problem = rf"^{home}/x: access key {READER} lacks the permission {permission} \(403: Access Denied"
    with raises(DataError, problem=problem, fix="grant it"):
        act(home / "x")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials(
    home: StoragePath, name: str, value: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with raises(DataError, problem=rf"x: the storage refused access key \w+ \(403 {code}\)", fix=CREDENTIALS):
        (home / "x").read()


def test_no_credentials(home: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of AWS there is no server of credentials; the search for it ends at once."""
    (port,) = free_ports(1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
    with raises(DataError, problem="^s3://.*: the role of this node got no credentials$", fix=CREDENTIALS):
        (home / "x").read()


def test_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert describe_identity() == "the role of this node"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials")
    assert describe_identity() == "the role of this pod"
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/eks.amazonaws.com/serviceaccount/token")
    assert describe_identity() == "role arn:aws:iam::1:role/trainer"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    assert describe_identity() == "access key AKIA"


@pytest.mark.parametrize("value", ["localhost:9000", "ftp://x", "http://"])
def test_an_endpoint_that_is_no_address(home: StoragePath, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with raises(DataError, key="AWS_ENDPOINT_URL", value=value, problem="is not the address", fix="https://HOST:PORT"):
        (home / "x").read()


def test_a_bucket_in_another_region_and_a_web_identity_without_its_file(
    home: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_SECONDS", 1.0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token")
    with raises(DataError, value=ANY, problem="there are no credentials", fix=CREDENTIALS):
        (home / "x").read()


def test_an_address_is_the_same_with_and_without_a_slash_at_its_end(home: StoragePath) -> None:
    assert storage_path(f"{home}/") == home == storage_path(str(home).replace("bucket/", "bucket//"))
