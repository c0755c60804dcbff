"""The relay to TensorFlow Serving: requests and responses are unchanged, and its log is that of `trainer.serve`.

The backend is an HTTP server with TensorFlow Serving's REST routes and formats, not its binary.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from scripts.same_bits import free_ports
from tests.errors import raises
from tests.waiting import PATIENCE, wait_until
from trainer.errors import ConfigError
from trainer.evaluation.drift import LogPeriod, measure_drift, read_log
from trainer.exporting.reference import compute_reference
from trainer.relay import recording
from trainer.relay.forwarding import Relay
from trainer.relay.recording import parse_predictions
from trainer.relay.settings import parse_settings
from trainer.serving.export_files import Export

ROOT = Path(__file__).parents[2]
CLASSES = ("daisy", "rose", '<script>"x"')


def rows_of(count: int, seed: int = 1) -> list[list[float]]:
    logits = np.random.default_rng([seed]).normal(size=(count, len(CLASSES)))
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32).tolist()


class Backend(BaseHTTPRequestHandler):
    """TensorFlow Serving's routes of one model; `loaded` are its versions."""

    protocol_version = "HTTP/1.1"
    loaded: tuple[int, ...] = (1,)
    may_answer: threading.Event  # predictions wait for it
    answered: list[tuple[str, bytes, str]]  # path, body and content type of each POST

    def do_GET(self) -> None:
        versions = [{"version": str(v), "state": "AVAILABLE", "status": {"error_code": "OK"}} for v in self.loaded]
        versions.append({"version": "99", "state": "LOADING", "status": {"error_code": "OK"}})
        self.respond(200, {"model_version_status": versions})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answered.append((self.path, body, self.headers["Content-Type"]))
        version = self.path.partition("/versions/")[2].partition(":")[0]
        if version and int(version) not in self.loaded:
            self.respond(404, {"error": f"Servable not found for request: Specific(kubetune, {version})"})
            return
        try:
            instances = json.loads(body)["instances"]
        except ValueError as error:
            self.respond(400, {"error": f"JSON Parse error: {error}"})
            return
        assert self.may_answer.wait(PATIENCE)
        self.respond(200, {"predictions": rows_of(len(instances))})

    def respond(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[tuple[str, type[Backend]]]:
    may_answer = threading.Event()
    may_answer.set()
    handler = type("Handler", (Backend,), {"answered": [], "may_answer": may_answer})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The versions 1 and 2 of a model: only their labels and references are read."""
    probabilities = np.array(rows_of(400, 2), np.float32)
    embeddings = np.random.default_rng([3]).normal(size=(400, 4)).astype(np.float32)
    reference = compute_reference("test", CLASSES, probabilities, embeddings, 96, "stretch")
    for version in ("1", "2"):
        assets = tmp_path / "models" / version / "assets"
        assets.mkdir(parents=True)
        (assets / "labels.txt").write_text("\n".join(CLASSES))
        (assets / "reference.json").write_text(json.dumps(reference))
    return tmp_path / "models"


@pytest.fixture
def relay(backend: tuple[str, type[Backend]], models: Path, tmp_path: Path) -> Iterator[Relay]:
    values = {"model": str(models), "log": str(tmp_path / "log"), "upstream": backend[0], "log_seconds": "0.1"}
    relay = Relay(parse_settings(values))
    yield relay
    relay.close()
    relay.close_log()


def call(relay: Relay, method: str, path: str, **options: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(relay.app), base_url="http://relay") as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def predict(relay: Relay, count: int = 1, path: str = "/v1/models/kubetune:predict", **headers: str) -> httpx.Response:
    return call(relay, "POST", path, json={"instances": [{"b64": "AA=="}] * count}, headers=headers)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.rglob("*.jsonl")) for line in part.read_text().splitlines()]


def dropped(relay: Relay) -> float:
    return relay.metrics.registry.get_sample_value("kubetune_serving_log_dropped_total") or 0.0


def await_recorded(relay: Relay) -> None:
    """Wait until the recorder's thread has recorded or dropped every response so far."""
    wait_until(lambda: relay.recorder._buffered == 0, lambda: f"{relay.recorder._buffered} bytes are not recorded")


def test_a_prediction_is_forwarded_as_it_is_and_logged(
    relay: Relay, backend: tuple[str, type[Backend]], tmp_path: Path
) -> None:
    assert call(relay, "GET", "/readyz").status_code == 200
    body = b'{ "instances" :[{"b64":"AA=="},{"b64":"AA=="}]}'
    headers = {"Content-Type": "application/json; x=1", "X-Request-Id": "abc"}
    response = call(relay, "POST", "/v1/models/kubetune:predict", content=body, headers=headers)
    assert (response.status_code, response.headers["x-request-id"]) == (200, "abc")
    assert response.json() == {"predictions": rows_of(2)}
    assert backend[1].answered == [("/v1/models/kubetune/versions/1:predict", body, "application/json; x=1")]
    wait_until(lambda: len(lines_of(tmp_path / "log")) == 2)
    for line, row in zip(lines_of(tmp_path / "log"), rows_of(2), strict=True):
        assert (line["request"], line["model_version"], line["name"]) == ("abc", "1", "")
        assert (line["class"], line["confidence"]) == (CLASSES[int(np.argmax(row))], pytest.approx(max(row)))
        assert line["probabilities"] == {c: pytest.approx(p, abs=1e-6) for c, p in zip(CLASSES, row, strict=True)}


def test_the_log_is_read_by_drift(relay: Relay, models: Path, tmp_path: Path) -> None:
    call(relay, "GET", "/readyz")
    predict(relay, 300)
    wait_until(lambda: len(lines_of(tmp_path / "log")) == 300)
    reference = json.loads((models / "1" / "assets" / "reference.json").read_text())
    window, invalid = read_log(str(tmp_path / "log"), reference, LogPeriod())
    assert (window.n, invalid) == (300, 0)
    assert {measure.name for measure in measure_drift(reference, window)} == {"classes", "confidence"}
    assert 'kubetune_serving_population_stability_index{of="classes"}' in call(relay, "GET", "/metrics").text


def test_a_new_version_is_logged_under_its_number(
    relay: Relay, backend: tuple[str, type[Backend]], tmp_path: Path
) -> None:
    call(relay, "GET", "/readyz")
    predict(relay)
    backend[1].loaded = (2,)  # and version 1 is no longer loaded
    assert predict(relay).status_code == 200
    backend[1].loaded = (1, 2)
    assert predict(relay, path="/v1/models/kubetune/versions/1:predict").status_code == 200
    wait_until(lambda: len(lines_of(tmp_path / "log")) == 3)
    assert sorted(line["model_version"] for line in lines_of(tmp_path / "log")) == ["1", "1", "2"]


def test_other_requests_and_errors_are_forwarded_and_not_logged(relay: Relay, tmp_path: Path) -> None:
    call(relay, "GET", "/readyz")
    status = call(relay, "GET", "/v1/models/kubetune").json()["model_version_status"]
    assert [version["state"] for version in status] == ["AVAILABLE", "LOADING"]
    refused = call(relay, "POST", "/v1/models/kubetune:predict", content=b"{", headers={"Content-Type": "text/plain"})
    assert (refused.status_code, "JSON Parse error" in refused.json()["error"]) == (400, True)
    assert predict(relay, path="/v1/models/kubetune/versions/7:predict").status_code == 404
    too_long = call(relay, "POST", "/v1/models/kubetune:predict", content=bytes(17 * 1024**2))
    assert too_long.status_code == 413
    relay.close_log()
    assert lines_of(tmp_path / "log") == []


def test_an_upstream_that_is_slow_or_absent(backend: tuple[str, type[Backend]], tmp_path: Path) -> None:
    settings = {"model": "m", "log": str(tmp_path / "log")}
    relay = Relay(parse_settings(settings | {"upstream": backend[0], "timeout": "0.3"}))
    call(relay, "GET", "/readyz")
    backend[1].may_answer.clear()
    response = predict(relay)
    assert (response.status_code, response.json()) == (504, {"error": "TensorFlow Serving took more than 0.3 s"})
    backend[1].may_answer.set()
    relay.close()
    relay.close_log()
    (port,) = free_ports(1)
    absent = Relay(parse_settings(settings | {"upstream": f"http://127.0.0.1:{port}"}))
    assert call(absent, "GET", "/readyz").status_code == 503
    response = predict(absent)
    assert (response.status_code, response.json()) == (503, {"error": "TensorFlow Serving cannot be reached"})
    assert call(absent, "GET", "/healthz").status_code == 200
    absent.close()
    absent.close_log()


def test_a_log_that_cannot_be_written_delays_and_fails_no_request(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the log becomes a file; and the labels of the version cannot be read, after all have a response."""
    call(relay, "GET", "/readyz")
    (tmp_path / "log").rmdir()
    (tmp_path / "log").write_text("")
    assert predict(relay).status_code == 200
    await_recorded(relay)  # with the labels, which its thread must not find deleted
    assert dropped(relay) == 0
    (tmp_path / "models" / "1" / "assets" / "labels.txt").unlink()
    relay.recorder._versions.clear()
    have_responses, read_labels = threading.Event(), recording.read_labels

    def read_afterwards(model: str, version: str) -> Export:
        assert have_responses.wait(PATIENCE)
        return read_labels(model, version)

    monkeypatch.setattr(recording, "read_labels", read_afterwards)
    assert all(predict(relay, 5).status_code == 200 for _ in range(20))
    assert dropped(relay) == 0
    have_responses.set()
    await_recorded(relay)
    assert dropped(relay) == 20
    (tmp_path / "log").unlink()


def test_responses_that_wait_are_bounded(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, release = threading.Event(), threading.Event()

    def read_slowly(_model: str, _version: str) -> None:
        reading.set()
        release.wait(PATIENCE)
        raise OSError("no labels")

    monkeypatch.setattr(recording, "read_labels", read_slowly)
    monkeypatch.setattr(recording, "MAX_BUFFERED_BYTES", 1000)
    for _ in range(3):
        relay.recorder.put("1", "a", bytes(400))
    assert reading.wait(PATIENCE)
    assert dropped(relay) == 1  # two have room
    release.set()
    await_recorded(relay)
    assert dropped(relay) == 3


def test_the_formats_of_a_response() -> None:
    rows, embeddings = rows_of(2), [[1.0, 2.0], [3.0, 4.0]]
    named = [{"probabilities": r, "embedding": e} for r, e in zip(rows, embeddings, strict=True)]
    columns = {"probabilities": rows, "embedding": embeddings}
    for content, has_embedding in (
        ({"predictions": rows}, False), ({"outputs": rows}, False),
        ({"predictions": named}, True), ({"outputs": columns}, True),
    ):  # fmt: skip
        parsed = parse_predictions(json.dumps(content).encode(), 3)
        np.testing.assert_allclose([p.probabilities for p in parsed], rows)
        assert [p.embedding is not None for p in parsed] == [has_embedding] * 2
    for wrong in ('{"predictions": [[1, 2]]}', '{"predictions": []}', '{"predictions": [[NaN, 0, 1]]}', "[]", "\x00"):
        with pytest.raises(recording.CONTENT_ERRORS):
            parse_predictions(wrong.encode(), 3)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"log": "l"}, "model"),
        ({"model": "m"}, "log"),
        ({"model": "m", "log": "l", "upstream": "ftp://x"}, "upstream"),
        ({"model": "abfss://m", "log": "l"}, "model"),
        ({"model": "m", "log": "l", "color": "red"}, "color"),
    ],
)
def test_wrong_settings_have_their_key(values: dict[str, str], key: str) -> None:
    with raises(ConfigError, problem=key):
        parse_settings(values)


@pytest.mark.slow
def test_the_process_finishes_its_requests_and_its_log(
    backend: tuple[str, type[Backend]], models: Path, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    backend[1].may_answer.clear()
    settings = {"model": models, "log": tmp_path / "log", "upstream": backend[0], "port": port, "linger": 0.5}
    command = [sys.executable, "-m", "trainer.relay", *(f"{key}={value}" for key, value in settings.items())]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    codes: list[int] = []

    def get(path: str, body: bytes | None = None) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=PATIENCE) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    try:
        wait_until(lambda: get("/readyz") == 200, process=process)
        body = b'{"instances": [{"b64": "AA=="}]}'
        request = threading.Thread(target=lambda: codes.append(get("/v1/models/kubetune:predict", body)))
        request.start()
        wait_until(lambda: backend[1].answered, process=process)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: get("/readyz") != 200, "it stops", process=process)
        backend[1].may_answer.set()
        assert process.wait(PATIENCE) == 0
        request.join()
        assert codes == [200]
        assert len(lines_of(tmp_path / "log")) == 1  # although its part was for 60 s
    finally:
        process.kill()
        process.wait()
