"""A real server over HTTP: what it answers, what it refuses, and that nothing makes it fail."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving import pictures
from tests.serving.pictures import photo
from tests.serving.running import Served

if TYPE_CHECKING:
    from tests.serving.exported import Exported

PREDICT, INSTANCES = "/predict", "/v1/models/kubetune:predict"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def probabilities(entry: dict[str, Any], exported: Exported) -> list[float]:
    """In the order of the classes."""
    found = {one["class"]: one["probability"] for one in entry["classes"]}
    return [found[name] for name in exported.names]


def test_every_way_to_ask_gets_the_answer_of_the_trainer(served: Served, exported: Exported) -> None:
    files = [photo(0), photo(1, "PNG"), photo(2, "JPEG", 700, 300), photo(3, "WEBP"), photo(4, "BMP")]
    expected = exported.answers(files)
    assert np.ptp(expected, axis=0).max() > 0.01  # they differ
    form = [("file", (f"{i}.jpg", data)) for i, data in enumerate(files)]
    as_form = served.client.post(PREDICT, files=form, params={"top_k": 99}).json()
    as_json = served.client.post(PREDICT, json={"images": [encoded(f) for f in files], "top_k": 99}).json()
    instances = [{"b64": encoded(f)} for f in files]
    rows = served.client.post(INSTANCES, json={"instances": instances}).json()
    columns = served.client.post(f"{INSTANCES[:-8]}/versions/1:predict", json={"inputs": instances}).json()
    assert [entry["name"] for entry in as_form["predictions"]] == [f"{i}.jpg" for i in range(5)]
    assert (as_form["model"], as_form["version"]) == ("kubetune", "1")
    for found in (
        [probabilities(entry, exported) for entry in as_form["predictions"]],
        [probabilities(entry, exported) for entry in as_json["predictions"]],
        rows["predictions"],
        columns["outputs"],
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    best = served.client.post(PREDICT, files={"file": files[0]}, params={"top_k": 1}).json()["predictions"][0]
    assert [one["class"] for one in best["classes"]] == [exported.names[expected[0].argmax()]]


def test_an_answer_says_where_it_looked(served: Served, exported: Exported) -> None:
    (found,) = served.client.post(PREDICT, files={"file": photo(1)}, params={"explain": "true"}).json()["predictions"]
    assert found["heatmap"]["resize"] == "stretch"
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["heatmap"]["png"]))))
    assert heat.shape == (2, 2)
    body = {"signature_name": "explain", "instances": [{"b64": encoded(photo(1))}]}
    (row,) = served.client.post(INSTANCES, json=body).json()["predictions"]
    np.testing.assert_allclose(row["probabilities"], exported.answers([photo(1)])[0], atol=2e-5)
    np.testing.assert_allclose(np.asarray(row["heatmap"]) * 255, heat, atol=1)
    (same,) = served.client.post(
        INSTANCES.replace(":predict", ":explain"), json={"instances": body["instances"]}
    ).json()["predictions"]
    assert same.keys() == {"probabilities", "embedding", "heatmap"}


def test_it_says_what_it_is(served: Served) -> None:
    get = served.client.get
    assert (get("/healthz").status_code, get("/readyz").text) == (200, "ready\n")
    status = get("/v1/models/kubetune").json()
    assert (status["name"], status["ready"]) == ("kubetune", True)
    assert status["model_version_status"][0] == {
        "version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}
    }  # fmt: skip
    assert get("/v1/models").json() == {"models": ["kubetune"]}
    assert get("/").json() == {"status": "alive"}
    for path in ("/v1/models/other", "/v1/models/kubetune/versions/2", "/nowhere"):
        assert get(path).status_code == 404
        assert get(path).json()["error"]
    assert served.client.get(PREDICT).status_code == 405
    assert served.client.head("/healthz").status_code == 200


def test_the_page_holds_all_it_needs(served: Served) -> None:
    answer = served.client.get("/", headers={"Accept": "text/html,*/*"})
    assert answer.headers["content-type"].startswith("text/html")
    assert "{{" not in answer.text
    assert '"classes": 3' in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text  # asks nobody else


def test_many_at_once_share_calls_and_get_their_own_answers(served: Served, exported: Exported) -> None:
    files = [photo(number) for number in range(20)]
    expected = exported.answers(files)
    before = served.metrics()

    def ask(first: int) -> list[list[float]]:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            answers = [
                client.post(PREDICT, files={"file": files[n % 20]}, params={"top_k": 9}) for n in range(first, 200, 8)
            ]
        assert {answer.status_code for answer in answers} == {200}
        return [probabilities(answer.json()["predictions"][0], exported) for answer in answers]

    with ThreadPoolExecutor(8) as pool:
        for first, found in enumerate(pool.map(ask, range(8))):
            np.testing.assert_allclose(found, [expected[n % 20] for n in range(first, 200, 8)], atol=2e-5)
    after = served.metrics()
    images = after["kubetune_serving_batch_images_sum"] - before["kubetune_serving_batch_images_sum"]
    calls = after["kubetune_serving_batch_images_count"] - before["kubetune_serving_batch_images_count"]
    assert images == 200
    assert calls < 150
    assert after["kubetune_serving_requests_total{200,/predict}"] >= 200


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 415, "send images as"),
    "wrong type": ({"content": photo(), "headers": {"Content-Type": "image/jpeg"}}, 415, "send images as"),
    "no JSON": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not valid JSON"),
    "no image": ({"files": {"file": b"hello"}}, 400, "is not an image that can be read"),
    "half a JPEG": ({"files": {"file": ("a.jpg", pictures.cut(photo(0, "JPEG", 600, 400)))}}, 400, "a.jpg cannot be decoded"),
    "half a PNG": ({"files": {"file": ("a.png", pictures.cut(photo(kind="PNG")))}}, 400, "a.png cannot be decoded"),
    "no pixels": ({"files": {"file": pictures.huge(1000, 1000)}}, 400, "cannot be decoded"),
    "bomb": ({"files": {"file": pictures.bomb(10_000, 10_000)}}, 413, "has 10000 x 10000 pixels"),
    "huge": ({"files": {"file": pictures.huge(2**31 - 1, 2**31 - 1)}}, 413, "pixels, at most 2,000,000"),
    "a lying JPEG": ({"files": {"file": pictures.huge_jpeg(60_000, 60_000)}}, 413, "60000 x 60000"),
    "too long": ({"files": {"file": b"x" * 1_100_000}}, 413, "longer than 1,000,000 bytes"),
    "too many": ({"files": [("file", photo())] * 9}, 413, "a request may hold 8 images"),
    "top_k": ({"files": {"file": photo()}, "params": {"top_k": "-1"}}, 400, "top_k must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_said_and_the_next_request_is_answered(served: Served, case: str) -> None:
    how, status, words = REFUSED[case]
    answer = served.client.post(PREDICT, **how)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert words in answer.json()["error"]
    assert "raph" not in answer.json()["error"]
    assert served.client.post(PREDICT, files={"file": photo()}).status_code == 200


def test_a_bad_image_does_not_spoil_the_others_of_its_call(served: Served, exported: Exported) -> None:
    """Requests that come together share a call of the model, in which one image cannot be decoded."""
    bad, good = pictures.cut(photo(kind="PNG")), [photo(n) for n in range(12)]
    expected = exported.answers(good)

    def ask(data: bytes) -> httpx.Response:
        return httpx.post(f"{served.url}{PREDICT}", files={"file": data}, params={"top_k": 9}, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, [bad, *good, bad]))
    assert [answer.status_code for answer in answers] == [400, *[200] * 12, 400]
    found = [probabilities(answer.json()["predictions"][0], exported) for answer in answers[1:-1]]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def raw(served: Served, data: bytes, seconds: float = 30.0) -> bytes:
    """What comes back for these very bytes, until the server closes."""
    out = b""
    with (
        socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as connection,
        contextlib.suppress(ConnectionError),  # it has heard enough, and did not read the rest
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            out += piece
    return out


def test_bytes_that_are_no_http_get_400_or_nothing(served: Served) -> None:
    request = (
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
        b'{"images": ["aGk="]}'
    )
    assert b" 400 " in raw(served, request)
    codes = set()
    for number in range(150):
        answer = raw(served, pictures.mutated(request, number))
        codes.add(answer.partition(b" ")[2][:3])
    assert codes <= {b"", b"400", b"404", b"405", b"408", b"411", b"413", b"415", b"431", b"501", b"505"}
    for strange in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000, b"\0" * 1000,
                    b"GET /" + b"%00%ff" * 10 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
                    b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
                    b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"):  # fmt: skip
        assert not raw(served, strange).startswith(b"HTTP/1.1 5")
    assert served.client.get("/readyz").status_code == 200


def test_bodies_that_a_stranger_made_never_fail(served: Served) -> None:
    form = httpx.Request("POST", "http://any", files={"file": ("a.jpg", photo())})
    body, kind = form.read(), form.headers["content-type"]
    tree = json.dumps({"instances": [{"b64": encoded(photo())}]}).encode()
    codes = set()
    for number in range(120):
        headers = {"Content-Type": kind}
        codes.add(served.client.post(PREDICT, content=pictures.mutated(body, number), headers=headers).status_code)
        codes.add(served.client.post(INSTANCES, content=pictures.mutated(tree, number)).status_code)
        data = pictures.mutated(photo(number % 7, ["JPEG", "PNG", "WEBP", "BMP", "GIF"][number % 5]), number)
        codes.add(served.client.post(PREDICT, files={"file": data}).status_code)
    assert {200, 400} <= codes <= {200, 400, 413, 415}


def test_slow_clients_hold_nobody_up(served: Served) -> None:
    """Some say nothing, some stop in the head, some in the body; they are sent away, the others are answered."""
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    connections = []
    for said in (b"", b"POST /pre", head[:60], head + b'{"images": ["'):
        for _ in range(20):
            connections.append(socket.create_connection(("127.0.0.1", served.port), timeout=120))
            connections[-1].sendall(said)
    began = time.monotonic()
    for number in range(20):
        assert served.client.post(PREDICT, files={"file": photo(number)}).status_code == 200
    assert time.monotonic() - began < 60
    for connection in connections[:60]:
        assert connection.recv(100) == b""  # closed after ten seconds without a whole head
    for connection in connections:
        connection.close()


def test_predictions_are_logged_and_counted(served: Served, exported: Exported) -> None:
    (log,) = [Path(argument[4:]) for argument in served.arguments if argument.startswith("log=")]
    before = len(log.read_text().splitlines()), served.metrics()
    for number in range(10):
        served.client.post(PREDICT, files={"file": photo(number)})
    lines = [json.loads(line) for line in log.read_text().splitlines()[before[0] :]]
    assert len(lines) == 5  # log_sample=0.5
    expected = exported.answers([photo(number) for number in range(10)])
    for line in lines:
        assert line["time"].endswith("Z")
        assert any(
            abs(line["confidence"] - row.max()) < 1e-4
            and " ".join(line["class"].split("\n")) == exported.names[row.argmax()]
            for row in expected
        )
        assert line["probabilities"][line["class"]] == pytest.approx(line["confidence"], abs=1e-5)
        assert len(line["embedding"]) == 3
    after = served.metrics()
    counted = sum(
        v - before[1].get(k, 0) for k, v in after.items() if k.startswith("kubetune_serving_predictions_total")
    )
    assert counted == 10
    assert after["kubetune_serving_queue_images"] == 0
    assert after["kubetune_serving_ready"] == 1
