"""Thousands of requests from another process: none fails, and those that find no room are told so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.running import ROOT, Served

if TYPE_CHECKING:
    from tests.serving.exported import Exported


def ask(served: Served, *arguments: str) -> dict[str, Any]:
    """`benchmarks/serving.py` against a server: its figures."""
    command = [sys.executable, "-m", "benchmarks.serving", f"--url={served.url}", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_two_hundred_requests_without_an_error(served: Served) -> None:
    found = ask(served, "--requests=200", "--clients=8")
    assert found["codes"] == {"200": 200}
    assert 0 < found["p50_ms"] <= found["p99_ms"]


@pytest.mark.slow
def test_thousands_of_requests_without_an_error(served: Served) -> None:
    assert ask(served, "--requests=3000", "--clients=32")["codes"] == {"200": 3000}


@pytest.mark.slow
def test_a_full_queue_says_come_again(exported: Exported) -> None:
    with Served(f"model={exported.folder}", "queue=2", "batch=1", "max_images=1") as served:
        served.ready()
        found = ask(served, "--requests=600", "--clients=24")
        assert found["codes"].keys() == {"200", "503"}
        assert sum(found["codes"].values()) == 600
        assert found["without_retry_after"] == 0
        assert served.metrics()["kubetune_serving_requests_total{503,/predict}"] == found["codes"]["503"]
