"""Thousands of requests from another process: none fails, and those without room in the queue get 503."""

import json
import subprocess
import sys
import threading
from typing import Any

import httpx
import pytest

from tests.serving.images import bomb, photo
from tests.serving.running import ROOT, Exported, Served
from tests.waiting import PATIENCE, wait_until


def load(served: Served, *arguments: str) -> dict[str, Any]:
    """The figures of `benchmarks/serving.py` on a server."""
    command = [sys.executable, "-m", "benchmarks.serving", f"--url={served.url}", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(("requests", "clients"), [(200, 8), pytest.param(3000, 32, marks=pytest.mark.slow)])
def test_no_request_fails(served: Served, requests: int, clients: int) -> None:
    figures = load(served, f"--requests={requests}", f"--clients={clients}")
    assert figures["codes"] == {"200": requests}
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]


@pytest.mark.slow
def test_a_full_queue_answers_503_with_retry_after(exported: Exported) -> None:
    with Served(f"model={exported.folder}", "queue=2", "batch=1", "max_images=1") as served:
        served.ready()
        figures = load(served, "--requests=600", "--clients=24")
        assert figures["codes"].keys() == {"200", "503"}
        assert sum(figures["codes"].values()) == 600
        assert figures["without_retry_after"] == 0
        assert served.metrics()["kubetune_serving_requests_total{503,/predict}"] == figures["codes"]["503"]


@pytest.mark.slow
def test_one_client_with_large_images_neither_fills_the_queue_nor_stops_the_others(exported: Exported) -> None:
    """Eight large images at a time of one address, and small ones of another, one after the other."""
    large, small = bomb(3000, 3000), photo()
    stop, answers = threading.Event(), list[httpx.Response]()

    def flood() -> None:
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=served.url, transport=transport, timeout=PATIENCE) as client:
            while not stop.is_set():
                answers.append(client.post("/predict", files={"file": large}))
                stop.wait(0.05)  # without a pause, the rejected requests are all that the server has time for

    with Served(f"model={exported.folder}", "max_pixels=9000000") as served:
        served.ready()
        threads = [threading.Thread(target=flood) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: any(answer.status_code == 429 for answer in answers), process=served.process)
        before = sum(answer.status_code == 200 for answer in answers)
        for _ in range(20):
            response = served.client.post("/predict", files={"file": small})
            assert response.status_code == 200
        predicted = sum(answer.status_code == 200 for answer in answers) - before
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200, 429}
    rejected = next(answer for answer in answers if answer.status_code == 429)
    assert rejected.headers["retry-after"] == "1"
    assert (
        "too many large images of 127.0.0.2 at the same time (36,000,000 pixels); try again" in rejected.json()["error"]
    )
    assert predicted <= 2 * 20  # a small image waits for about one large one, though four of them are in the queue
