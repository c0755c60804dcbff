"""`/healthz` and `/metrics` as requested by a kubelet and by Prometheus."""

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from scripts.same_bits import free_ports
from tests.e2e.running import ROOT, train
from tests.errors import raises
from tests.waiting import PATIENCE, wait_until
from trainer.errors import WRONG_INPUT, ConfigError
from trainer.monitoring.health import Health
from trainer.monitoring.http import serve


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def server(health: Health) -> Iterator[ThreadingHTTPServer]:
    server = serve(free_ports(1)[0], health, "gs://bucket/run")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def port(server: ThreadingHTTPServer) -> int:
    return server.server_address[1]


def get(port: int, path: str, seconds: float = PATIENCE, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=seconds) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def parse_metrics(text: str) -> dict[str, float]:
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def metrics(port: int) -> dict[str, float]:
    code, text = get(port, "/metrics")
    assert code == 200
    return parse_metrics(text)


@pytest.mark.parametrize("version", ["", "; version=1.0.0", "; version=abc", ';version="1.0.0"', "; version=99"])
@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_metrics_are_in_the_format_that_the_client_accepts(
    port: int, kind: str, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": kind + version})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        text, media_type = response.read().decode(), response.headers.get_content_type()
    assert media_type == kind
    parse = openmetrics if "openmetrics" in kind else text_string_to_metric_families
    assert "kubetune_last_progress_age_seconds" in {family.name for family in parse(text)}
    assert capsys.readouterr().err == ""


def test_a_healthy_process_reports_its_activity(health: Health, port: int) -> None:
    health.set_activity("opening the data")
    assert get(port, "/healthz") == (200, "opening the data\n")
    assert get(port, "/healthz?verbose=1")[0] == 200
    assert get(port, "/readyz") == (404, "the paths are /healthz and /metrics\n")


def test_a_stall_is_503_with_the_reason_until_there_is_progress(
    health: Health, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    health.stuck_after = 0.1
    health.set_activity("validation")
    time.sleep(0.2)
    for _ in range(3):
        code, text = get(port, "/healthz")
        assert code == 503
        assert re.match(r"stalled: no progress for \d+ s \(runtime.stuck_after=0.1\) in: validation", text)
    err = capsys.readouterr().err
    assert err.count("stalled: no progress") == 1  # logged once, with the stack of the main thread
    assert "in test_a_stall_is_503_with_the_reason_until_there_is_progress" in err
    health.stuck_after = 100
    assert get(port, "/healthz")[0] == 200


def test_metrics_appear_once_their_values_are_known(health: Health, port: int) -> None:
    first = metrics(port)
    assert first["kubetune_info"] == 1
    assert first["kubetune_last_progress_age_seconds"] < PATIENCE
    assert first["process_resident_memory_bytes"] > 1e6
    assert not {"kubetune_step", "kubetune_loss", "kubetune_last_step_age_seconds"} & first.keys()
    assert "kubetune_checkpoint_age_seconds" not in first
    health.enter_phase("head")
    health.record_steps(12, 2)
    health.record_checkpoint(seconds_ago=60)
    health.set_gauges(loss=0.5, images_per_second=100, goodput_ratio=0.7, data_wait_ratio=0.1, workers=4)
    then = metrics(port)
    assert {k: v for k, v in then.items() if k.startswith("kubetune_") and not k.endswith("_age_seconds")} == {
        "kubetune_info": 1, "kubetune_step": 12, "kubetune_epoch": 2, "kubetune_loss": 0.5,
        "kubetune_images_per_second": 100, "kubetune_goodput_ratio": 0.7, "kubetune_data_wait_ratio": 0.1,
        "kubetune_workers": 4,
    }  # fmt: skip
    assert 0 <= then["kubetune_last_step_age_seconds"] < PATIENCE
    assert 60 <= then["kubetune_checkpoint_age_seconds"] < 60 + PATIENCE
    time.sleep(0.1)
    assert metrics(port)["kubetune_last_step_age_seconds"] > then["kubetune_last_step_age_seconds"]
    assert 'kubetune_info{phase="head",run="gs://bucket/run",version="' in get(port, "/metrics")[1]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ipv6_too(port: int) -> None:
    assert get(port, "/healthz", host="[::1]")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", ""])
def test_a_port_in_use_is_an_error(health: Health, host: str) -> None:
    with socket.create_server((host, 0)) as other:
        taken = other.getsockname()[1]
        with raises(ConfigError, key="runtime.http_port", value=taken, problem="already in use", fix="or null"):
            serve(taken, health, "")


def test_a_port_in_use_ends_a_run_with_2_at_once(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = f"runtime.http_port={other.getsockname()[1]}"
        error = train(port, f"output_dir={tmp_path}/run", code=WRONG_INPUT).stderr
    assert error.startswith("error: runtime.http_port=")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


HANGING = """
import ctypes, sys, threading
from trainer.monitoring.http import serve
from trainer.monitoring.health import health
def shorten_limit():
    sys.stdin.readline()
    health.stuck_after = 0.1
threading.Thread(target=shorten_limit, daemon=True).start()
serve(int(sys.argv[1]), health, "")
print("ready", flush=True)
{library}(None).sleep(900)
"""


@pytest.mark.parametrize("keeps_the_lock", [False, True])
def test_a_main_thread_blocked_in_c_is_detected(keeps_the_lock: bool) -> None:
    """`ctypes.CDLL` releases the GIL, as TensorFlow does; `PyDLL` holds it, so that requests time out."""
    (port,) = free_ports(1)
    program = HANGING.format(library="ctypes.PyDLL" if keeps_the_lock else "ctypes.CDLL")
    command = [sys.executable, "-c", program, str(port)]

    def times_out() -> bool:
        try:
            get(port, "/healthz", seconds=2)
        except TimeoutError:
            return True
        return False

    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            if keeps_the_lock:
                wait_until(times_out, process=child)
            else:
                assert get(port, "/healthz")[0] == 200
                child.stdin.write("\n")
                child.stdin.flush()
                wait_until(lambda: get(port, "/healthz")[0] == 503, process=child)
        finally:
            child.kill()


@pytest.mark.parametrize(("error", "logged"), [(BrokenPipeError(), 0), (TimeoutError(), 0), (ValueError("damaged"), 1)])
def test_only_errors_of_the_handler_itself_are_logged(
    server: ThreadingHTTPServer, port: int, capsys: pytest.CaptureFixture[str], error: Exception, logged: int
) -> None:
    broken = patch.object(server, "finish_request", side_effect=error)
    with broken, socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        assert client.recv(1) == b""  # the connection is closed after the error is handled
    assert capsys.readouterr().err.count("ValueError: damaged") == logged
