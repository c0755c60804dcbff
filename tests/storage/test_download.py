"""Which errors of a download end a command with 75, with a real server."""

import http.server
import threading
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import requests

from tests.waiting import PATIENCE
from trainer.errors import Interrupted
from trainer.storage.download import translate_download_error


def translated(error: BaseException) -> Interrupted | None:
    return translate_download_error(error, "it failed", key="data.name", value="beans", fix="copy it")


def test_a_closed_port_is_interrupted_also_as_the_cause_of_another_error() -> None:
    with pytest.raises(requests.RequestException) as caught:
        requests.get("http://127.0.0.1:9", timeout=PATIENCE, proxies={"http": ""})
    assert translated(caught.value) is not None
    outer = RuntimeError("TFDS failed")
    outer.__cause__ = caught.value
    result = translated(outer)
    assert result is not None
    assert (result.key, result.value, result.exit_code) == ("data.name", "beans", 75)
    assert str(result) == ("data.name=beans: it failed (TFDS failed); start the same command again; "
                           "without a network, copy it")  # fmt: skip


@pytest.mark.parametrize("error", [ImportError("no module"), PermissionError(13, "denied"), AssertionError("manual")])
def test_other_errors_are_not(error: Exception) -> None:
    assert translated(error) is None


def test_a_suppressed_context_is_not_inspected() -> None:
    def fail(hide: bool) -> None:
        try:
            raise ConnectionResetError("the check of a newer version failed")
        except OSError:
            if hide:
                raise ValueError("there is no such split") from None
            raise ValueError("there is no such split")  # noqa: B904

    for hide in (False, True):
        with pytest.raises(ValueError, match="split") as caught:
            fail(hide)
        assert (translated(caught.value) is None) == hide


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


def request_as_keras(address: str) -> None:
    """Fail like keras.utils.get_file: with a bare Exception, raised while the error of urllib is handled."""
    try:
        urllib.request.urlopen(address, timeout=PATIENCE)
    except OSError as error:
        raise Exception(f"URL fetch failure on {address}") from error


def request_as_tfds(address: str) -> None:
    requests.get(address, timeout=PATIENCE).raise_for_status()


@pytest.mark.parametrize("request_from", [request_as_keras, request_as_tfds])
@pytest.mark.parametrize(("status", "is_retried"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_server_that_rejects_the_address_is_not_retried(
    request_from: Callable[[str], None], status: int, is_retried: bool, address: str
) -> None:
    with pytest.raises(Exception, match=str(status)) as caught:
        request_from(f"{address}/{status}")
    assert (translated(caught.value) is not None) == is_retried
