"""A real server over HTTP: its responses, its errors, and arbitrary input."""

import asyncio
import base64
import contextlib
import io
import json
import select
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import images
from tests.serving.images import photo
from tests.serving.running import Exported, Served
from tests.waiting import PATIENCE
from trainer.serving.app import Service
from trainer.serving.export_files import Export
from trainer.serving.requests import FORMATS
from trainer.serving.settings import parse_settings

PREDICT, INSTANCES = "/predict", "/v1/models/kubetune:predict"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def probabilities(entry: dict[str, Any], exported: Exported) -> list[float]:
    """The probabilities in the order of the classes."""
    by_class = {row["class"]: row["probability"] for row in entry["classes"]}
    return [by_class[name] for name in exported.names]


def test_every_format_gets_the_probabilities_of_the_trainer(served: Served, exported: Exported) -> None:
    files = [photo(0), photo(1, "PNG"), photo(2, "JPEG", 700, 300), photo(3, "WEBP"), photo(4, "BMP")]
    expected = exported.probabilities(files)
    assert np.ptp(expected, axis=0).max() > 0.01  # the images differ
    form = [("file", (f"{i}.jpg", data)) for i, data in enumerate(files)]
    as_form = served.client.post(PREDICT, files=form, params={"top_k": 99}).json()
    as_json = served.client.post(PREDICT, json={"images": [encoded(f) for f in files], "top_k": 99}).json()
    instances = [{"b64": encoded(f)} for f in files]
    rows = served.client.post(INSTANCES, json={"instances": instances}).json()
    columns = served.client.post(f"{INSTANCES[:-8]}/versions/1:predict", json={"inputs": instances}).json()
    assert [entry["name"] for entry in as_form["predictions"]] == [f"{i}.jpg" for i in range(5)]
    assert (as_form["model"], as_form["version"]) == ("kubetune", "1")
    for response in (
        [probabilities(entry, exported) for entry in as_form["predictions"]],
        [probabilities(entry, exported) for entry in as_json["predictions"]],
        rows["predictions"],
        columns["outputs"],
    ):
        np.testing.assert_allclose(response, expected, atol=2e-5)
    best = served.client.post(PREDICT, files={"file": files[0]}, params={"top_k": 1}).json()["predictions"][0]
    assert [row["class"] for row in best["classes"]] == [exported.names[expected[0].argmax()]]


def test_an_explanation_has_a_heatmap(served: Served, exported: Exported) -> None:
    (entry,) = served.client.post(PREDICT, files={"file": photo(1)}, params={"explain": "true"}).json()["predictions"]
    assert entry["heatmap"]["resize"] == "stretch"
    assert entry["heatmap"]["orientation"] == "ignore"  # of an export that does not specify it
    heatmap = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["heatmap"]["png"]))))
    assert heatmap.shape == (2, 2)
    instances = [{"b64": encoded(photo(1))}]
    by_signature = served.client.post(INSTANCES, json={"signature_name": "explain", "instances": instances}).json()
    by_route = served.client.post(INSTANCES.replace(":predict", ":explain"), json={"instances": instances}).json()
    for (row,) in (by_signature["predictions"], by_route["predictions"]):
        assert row.keys() == {"probabilities", "embedding", "heatmap"}
        np.testing.assert_allclose(row["probabilities"], exported.probabilities([photo(1)])[0], atol=2e-5)
        np.testing.assert_allclose(np.asarray(row["heatmap"]) * 255, heatmap, atol=1)


def test_status_routes(served: Served) -> None:
    get = served.client.get
    assert (get("/healthz").status_code, get("/readyz").text) == (200, "ready\n")
    version = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    expected = {"name": "kubetune", "ready": True, "model_version_status": [version]}
    assert get("/v1/models/kubetune").json() == expected
    assert get("/v1/models").json() == {"models": ["kubetune"]}
    assert get("/").json() == {"status": "alive"}
    for path in ("/v1/models/other", "/v1/models/kubetune/versions/2", "/nowhere"):
        assert get(path).status_code == 404
        assert "available: " in get(path).json()["error"]
    assert get(PREDICT).status_code == served.client.post("/healthz").status_code == 405
    assert served.client.head("/healthz").status_code == 200


ACCEPT = {
    "": "text/plain", "*/*": "text/plain", "text/plain;version=x": "text/plain", "text/plain; version=": "text/plain",
    "application/openmetrics-text": "application/openmetrics-text",
    "application/openmetrics-text; version=1.0.0,text/plain;q=0.5": "application/openmetrics-text",
    "Application/OpenMetrics-Text;version=abc": "application/openmetrics-text",
    'application/openmetrics-text;version="1.0.0";charset=utf-8': "application/openmetrics-text",
    "application/openmetrics-text;version=1.x.0": "application/openmetrics-text",
    "application/openmetrics-text;version=99;escaping=no": "application/openmetrics-text",
}  # fmt: skip


@pytest.mark.parametrize("accept", ACCEPT)
def test_metrics_are_in_a_format_that_the_client_accepts(served: Served, accept: str) -> None:
    response = served.client.get("/metrics", headers={"Accept": accept})
    assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, ACCEPT[accept])
    parse = openmetrics if "openmetrics" in ACCEPT[accept] else text_string_to_metric_families
    assert "kubetune_serving_ready" in {family.name for family in parse(response.text)}


def test_the_page_is_self_contained(served: Served) -> None:
    response = served.client.get("/", headers={"Accept": "text/html,*/*"})
    assert response.headers["content-type"].startswith("text/html")
    assert "{{" not in response.text
    assert '"classes": 3' in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in response.text  # no other server


def test_concurrent_requests_are_batched_and_get_their_own_predictions(served: Served, exported: Exported) -> None:
    files = [photo(number) for number in range(20)]
    expected = exported.probabilities(files)
    before = served.metrics()

    def post(first: int) -> list[list[float]]:
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
            responses = [
                client.post(PREDICT, files={"file": files[n % 20]}, params={"top_k": 9}) for n in range(first, 200, 8)
            ]
        assert {response.status_code for response in responses} == {200}
        return [probabilities(response.json()["predictions"][0], exported) for response in responses]

    with ThreadPoolExecutor(8) as pool:
        for first, rows in enumerate(pool.map(post, range(8))):
            np.testing.assert_allclose(rows, [expected[n % 20] for n in range(first, 200, 8)], atol=2e-5)
    after = served.metrics()
    images, calls = (
        after[key] - before[key] for key in [f"kubetune_serving_batch_images_{x}" for x in ("sum", "count")]
    )
    assert images == 200
    assert calls < 150
    assert after["kubetune_serving_requests_total{200,/predict}"] >= 200


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 415, "send images as"),
    "no image": ({"files": {"file": b"hello"}}, 400, "is not an image"),
    "half a JPEG": ({"files": {"file": ("a.jpg", images.cut(photo(0, "JPEG", 600, 400)))}}, 400, "a.jpg cannot be decoded"),
    "half a PNG": ({"files": {"file": ("a.png", images.cut(photo(kind="PNG")))}}, 400, "a.png cannot be decoded"),
    "no pixels": ({"files": {"file": images.huge(1000, 1000)}}, 400, "cannot be decoded"),
    "bomb": ({"files": {"file": images.bomb(10_000, 10_000)}}, 413, "10000 x 10000 pixels, the limit is 2,000,000"),
    "too long": ({"files": {"file": b"x" * 1_100_000}}, 413, "exceeds 1,000,000 bytes"),
    "large together": ({"files": [("file", images.huge(1400, 1400))] * 5}, 413, "as long to decode as 9,800,000 pixels"),
    "too many": ({"files": [("file", photo())] * 9}, 413, "a request may have at most 8 images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_request_is_an_error_and_the_next_one_is_answered(served: Served, case: str) -> None:
    request, status, text = REFUSED[case]
    response = served.client.post(PREDICT, **request)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert text in response.json()["error"]
    assert "raph" not in response.json()["error"]
    assert served.client.post(PREDICT, files={"file": photo()}).status_code == 200


def test_a_bug_is_500_and_its_traceback_is_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    async def post() -> httpx.Response:
        service = Service(parse_settings({"model": "any"}), Export("any", Path("any"), "1", ("cat",), None))
        service.serve_version(service.export, SimpleNamespace(explains=False))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://any") as client:
            response = await client.post(PREDICT, files={"file": photo()})
        service.close()
        return response

    response = asyncio.run(post())
    assert (response.status_code, response.json().keys()) == (500, {"error"})
    assert "AttributeError: 'types.SimpleNamespace' object has no attribute 'predict'" in capsys.readouterr().err


def test_an_invalid_image_fails_alone_in_its_batch(served: Served, exported: Exported) -> None:
    invalid, valid = images.cut(photo(kind="PNG")), [photo(n) for n in range(12)]

    def post(data: bytes) -> httpx.Response:
        return httpx.post(f"{served.url}{PREDICT}", files={"file": data}, params={"top_k": 9}, timeout=PATIENCE)

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(post, [invalid, *valid, invalid]))
    assert [response.status_code for response in responses] == [400, *[200] * 12, 400]
    rows = [probabilities(response.json()["predictions"][0], exported) for response in responses[1:-1]]
    np.testing.assert_allclose(rows, exported.probabilities(valid), atol=2e-5)


def raw(served: Served, data: bytes) -> bytes:
    """Everything that the server sends in response to these bytes."""
    out = b""
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as connection,
        contextlib.suppress(ConnectionError),  # the server does not read all of it
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            out += chunk
    return out


def test_bytes_that_are_not_http_get_400_or_nothing(served: Served) -> None:
    request = (
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
        b'{"images": ["aGk="]}'
    )
    assert b" 400 " in raw(served, request)
    codes = {raw(served, images.mutated(request, number)).partition(b" ")[2][:3] for number in range(150)}
    assert codes <= {b"", b"400", b"404", b"405", b"408", b"411", b"413", b"415", b"431", b"501", b"505"}
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000, b"\0" * 1000,
                 b"GET /" + b"%00%ff" * 10 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
                 b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
                 b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):  # fmt: skip
        assert not raw(served, data).startswith(b"HTTP/1.1 5")
    assert served.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("count", [40, pytest.param(120, marks=pytest.mark.slow)])
def test_mutated_requests_never_get_500(served: Served, count: int) -> None:
    form = httpx.Request("POST", "http://any", files={"file": ("a.jpg", photo())})
    body, headers = form.read(), {"Content-Type": form.headers["content-type"]}
    tree = json.dumps({"instances": [{"b64": encoded(photo())}]}).encode()
    codes = set()
    for number in range(count):
        codes.add(served.client.post(PREDICT, content=images.mutated(body, number), headers=headers).status_code)
        codes.add(served.client.post(INSTANCES, content=images.mutated(tree, number)).status_code)
        data = images.mutated(photo(number % 7, FORMATS[number % 5]), number)
        codes.add(served.client.post(PREDICT, files={"file": data}).status_code)
    assert {200, 400} <= codes <= {200, 400, 413, 415}


def test_slow_clients_are_disconnected_and_the_others_served(served: Served) -> None:
    """80 clients stop before, in and after the head of their request."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    connections = []
    for sent in (b"", b"POST /pre", head[:60], head + b'{"images": ["'):
        for _ in range(20):
            connections.append(socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE))
            connections[-1].sendall(sent)
    for number in range(20):
        assert served.client.post(PREDICT, files={"file": photo(number)}).status_code == 200
        if number == 0:  # the server still waits for the bodies, which have a longer timeout than the heads
            assert select.select(connections[60:], [], [], 0)[0] == []
    for connection in connections[:60]:
        assert connection.recv(100) == b""  # closed after ten seconds without a complete head
    for connection in connections:
        connection.close()


def test_predictions_are_logged_and_counted(served: Served, exported: Exported) -> None:
    (log,) = [Path(argument[4:]) for argument in served.arguments if argument.startswith("log=")]
    old_lines, before = len(log.read_text().splitlines()), served.metrics()
    for number in range(10):
        served.client.post(PREDICT, files={"file": photo(number)})
    lines = [json.loads(line) for line in log.read_text().splitlines()[old_lines:]]
    assert len(lines) == 5  # log_sample=0.5
    expected = exported.probabilities([photo(number) for number in range(10)])
    for line in lines:
        assert line["time"].endswith("Z")
        assert any(
            abs(line["confidence"] - row.max()) < 1e-4 and line["class"] == exported.names[row.argmax()]
            for row in expected
        )
        assert line["probabilities"][line["class"]] == pytest.approx(line["confidence"], abs=1e-5)
        assert len(line["embedding"]) == 3
    after = served.metrics()
    counters = [key for key in after if key.startswith("kubetune_serving_predictions_total")]
    assert sum(after[key] - before.get(key, 0) for key in counters) == 10
    assert after["kubetune_serving_queue_images"] == 0
    assert after["kubetune_serving_ready"] == 1
