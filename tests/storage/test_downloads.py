"""Which failed downloads a retry can overcome, with a real server."""

import http.server
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
import requests

from trainer.storage.downloads import is_network_fault


@pytest.fixture
def address() -> Iterator[str]:
    """The address of a server that responds with the status in the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def of_keras(address: str) -> Exception:
    """The error of keras.utils.get_file: a bare Exception, raised while the error of urllib is handled."""
    try:
        try:
            urllib.request.urlopen(address, timeout=5)
        except OSError as error:
            raise Exception(f"URL fetch failure on {address}") from error
    except Exception as error:
        return error
    raise AssertionError("the request succeeded")


def of_tfds(address: str) -> Exception:
    try:
        requests.get(address, timeout=5).raise_for_status()
    except requests.RequestException as error:
        return error
    raise AssertionError("the request succeeded")


@pytest.mark.parametrize("error_of", [of_keras, of_tfds])
@pytest.mark.parametrize(("status", "transient"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_status(error_of: object, status: int, transient: bool, address: str) -> None:
    assert is_network_fault(error_of(f"{address}/{status}")) == transient  # type: ignore[operator]


@pytest.mark.parametrize("error_of", [of_keras, of_tfds])
def test_a_server_that_does_not_listen_and_a_name_that_does_not_exist(error_of: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"http://127.0.0.1:{port}", "http://name.invalid/"):
        assert is_network_fault(error_of(address)), address  # type: ignore[operator]


def test_other_errors() -> None:
    assert not is_network_fault(ValueError("Incomplete or corrupted file detected"))
