"""Errors of a refused request: the account, the missing permission, how to get credentials."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import google.auth
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import compute_engine
from google.auth.exceptions import DefaultCredentialsError

from scripts.same_bits import free_ports
from tests.errors import ANY, raises
from trainer.errors import DataError
from trainer.storage import gcs_client as client
from trainer.storage.path import StoragePath, storage_path

POOL = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/pool/providers/cluster"
ACCOUNT = "service account trainer@project.iam.gserviceaccount.com"
HOW = "gcloud auth application-default login.*workload identity.*GOOGLE_APPLICATION_CREDENTIALS.*STORAGE_EMULATOR_HOST"


class Refusing(BaseHTTPRequestHandler):
    """Issues tokens as Google's token server does, and refuses all requests for objects."""

    status, message, tokens = 403, "no", True

    def do_request(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/token":
            status: int = 200 if self.tokens else 400
            content: dict = {"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}
            content = content if self.tokens else {"error": "invalid_grant", "error_description": "account disabled"}
        else:
            status, content = self.status, {"error": {"code": self.status, "message": self.message, "errors": []}}
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_request

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A server instead of storage.googleapis.com, and a machine without credentials."""
    refusing = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=refusing.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{refusing.server_port}"
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("API_ENDPOINT_OVERRIDE", url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    monkeypatch.setenv("HOME", str(tmp_path))
    client._create_client.cache_clear()
    monkeypatch.setattr(Refusing, "status", 403)
    yield url
    client._create_client.cache_clear()
    refusing.shutdown()
    refusing.server_close()


@pytest.fixture
def service_account(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    credentials = {"type": "service_account", "client_email": "trainer@project.iam.gserviceaccount.com"}
    credentials |= {"private_key": key.decode(), "token_uri": f"{server}/token", "project_id": "project"}
    use(credentials, tmp_path, monkeypatch)


def use(credentials: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "credentials.json").write_text(json.dumps(credentials))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "credentials.json"))


def refused(
    problem: str, fix: str, act: Callable[[StoragePath], object] = StoragePath.read, key: str | None = None,
    value: object = ANY,
) -> None:  # fmt: skip
    with raises(DataError, key=key, value=value, problem=problem, fix=fix):
        act(storage_path("gs://b/x"))


@pytest.mark.parametrize(
    ("act", "permission"),
    [
        (lambda file: file.read(), "storage.objects.get"),
        (lambda file: file.exists(), "storage.objects.get"),
        (lambda file: file.list(), "storage.objects.list"),
        (lambda file: file.delete(), "storage.objects.delete"),
        (lambda file: file.write("x"), r"storage.objects.create \(storage.objects.delete as well, to replace\)"),
    ],
)
@pytest.mark.usefixtures("service_account")
def test_a_service_account_without_the_permission(act: Callable[[StoragePath], object], permission: str) -> None:
    refused(rf"^gs://b/x: {ACCOUNT} lacks the permission {permission} \(403: ", "grant it", act)


@pytest.mark.usefixtures("service_account")
def test_the_permission_that_the_storage_names_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusing, "message", "a@b does not have storage.objects.delete access to the object.")
    refused(r"lacks the permission storage.objects.delete \(403: ", "grant it", lambda file: file.write("x"))


def test_a_user(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}
    use(user, tmp_path, monkeypatch)
    assert client.describe_identity() == "application default credentials (user)"
    assert server


def test_a_workload_identity_pool(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("from the cluster")
    pool = {"type": "external_account", "audience": POOL, "token_url": f"{server}/token"}
    pool |= {"subject_token_type": "urn:ietf:params:oauth:token-type:jwt"}
    use(pool | {"credential_source": {"file": str(tmp_path / "token")}}, tmp_path, monkeypatch)  # type: ignore[operator]
    assert client.describe_identity() == f"workload identity pool {POOL}"


def test_no_credentials_at_all(server: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(Refusing, "status", 401)
    refused("^gs://b/x: is not public, and there are no credentials$", HOW)
    assert client.describe_identity() == "nobody (anonymous)"


def test_a_missing_file_of_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    key, value = "GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json"
    monkeypatch.setenv(key, value)
    refused("was not found", "set it to a credentials file", key=key, value=value)


@pytest.mark.usefixtures("service_account")
def test_credentials_that_were_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusing, "tokens", False)
    refused(rf"^gs://b/x: {ACCOUNT} got no access token \(.*account disabled", HOW)


@pytest.mark.usefixtures("service_account")
def test_a_rejected_request_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    respond = Refusing.do_request
    monkeypatch.setattr(Refusing, "do_GET", lambda self: (paths.append(self.path), respond(self)))
    refused("lacks the permission", "grant it")
    assert len(paths) == 1


class Metadata(BaseHTTPRequestHandler):
    """The part of a node's metadata server that the search for credentials uses."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(b"computeMetadata/")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_pod_waits_for_its_metadata_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (port,) = free_ports(1)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{port}")
    refused = threading.Event()
    search = google.auth.default

    def noticing(*arguments: object, **options: object) -> object:
        try:
            return search(*arguments, **options)
        except DefaultCredentialsError:
            refused.set()
            raise

    def later() -> None:
        refused.wait(120)
        metadata.server_bind()
        metadata.server_activate()
        metadata.serve_forever(0.05)

    monkeypatch.setattr(google.auth, "default", noticing)
    with ThreadingHTTPServer(("127.0.0.1", port), Metadata, bind_and_activate=False) as metadata:
        threading.Thread(target=later, daemon=True).start()
        credentials, _ = client._find_credentials()
        metadata.shutdown()
    assert refused.is_set()
    assert isinstance(credentials, compute_engine.Credentials)
