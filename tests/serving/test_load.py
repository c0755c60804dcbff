"""Thousands of requests from another process: none fails, and those without room in the queue get 503."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.serving.running import ROOT, Exported, Served


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
