"""Signals: accepted requests are answered, and the exit code is documented."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.e2e.running import catches
from tests.serving.images import photo
from tests.serving.running import ROOT, Exported, Served
from tests.waiting import PATIENCE, wait_until
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT
from trainer.serving.server import listen, run_service


def post_until_refused(url: str, number: int, ends: Counter[str]) -> None:
    """Post until the port is closed; every second client opens a new connection each time."""
    client, data = httpx.Client(timeout=PATIENCE), photo(number)
    while not ends[f"refused {number}"]:
        if number % 2:
            client.close()
            client = httpx.Client(timeout=PATIENCE)
        try:
            ends[str(client.post(url, files={"file": data}).status_code)] += 1
        except httpx.ConnectError:  # never accepted
            ends[f"refused {number}"] += 1
        except httpx.HTTPError as error:
            ends[repr(error)] += 1


def test_no_accepted_request_is_lost(exported: Exported) -> None:
    ends: Counter[str] = Counter()
    arguments = (f"model={exported.folder}", "batch=4", "queue=512", "linger=8")
    with ThreadPoolExecutor(12) as pool, Served(*arguments) as served:
        served.ready()
        assert catches(served.process.pid, signal.SIGTERM)
        clients = [pool.submit(post_until_refused, f"{served.url}/predict", n, ends) for n in range(12)]
        wait_until(lambda: ends["200"] >= 50, lambda: ends, process=served.process)
        slow = socket.create_connection(("127.0.0.1", served.port))  # has sent half of a head
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        served.send()
        served.wait_for("SIGTERM: .* 8 s")
        assert served.client.get("/readyz").status_code == 503
        status = served.client.get("/v1/models/kubetune")
        assert (status.status_code, status.headers["connection"]) == (503, "close")
        slow.sendall(b"st: a\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 OK")
        wait(clients, PATIENCE)
        assert dict(ends) == {"200": ends["200"]} | {f"refused {n}": 1 for n in range(12)}
        assert served.exit_code() == DONE
        assert "every accepted request got its response" in served.output.splitlines()[-1]


def test_a_second_signal_ends_at_once(exported: Exported) -> None:
    with Served(f"model={exported.folder}", "linger=60") as served:
        served.ready()
        assert catches(served.process.pid, signal.SIGINT)
        served.send(signal.SIGINT)
        served.wait_for("SIGINT: .* 60 s")
        served.send()
        assert served.exit_code() == INTERRUPTED
        assert "SIGTERM: exiting now with 0 requests" in served.output


def test_while_the_model_loads_a_signal_ends_it_at_once(exported: Exported) -> None:
    with Served(f"model={exported.folder}") as served:  # TensorFlow is still being imported
        assert catches(served.process.pid, signal.SIGTERM)  # the kernel drops signals to process 1 without a handler
        response = served.client.post("/predict", files={"file": photo()})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert served.client.get("/healthz").status_code == 200
        assert served.client.get("/readyz").text == "the model is being loaded\n"
        page = served.client.get("/", headers={"Accept": "text/html"})
        assert (page.status_code, "being loaded" in page.text) == (503, True)
        served.send()
        assert served.exit_code() == INTERRUPTED
        assert "interrupted: SIGTERM before the model was loaded" in served.output


def test_an_incomplete_request_does_not_block_the_exit(exported: Exported) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with Served(f"model={exported.folder}", "linger=0", "drain=2") as served:
        served.ready()
        with socket.create_connection(("127.0.0.1", served.port)) as stuck:
            stuck.sendall(head)
            wait_until(lambda: served.metrics()["kubetune_serving_active_requests"] >= 2)
            served.send()
            assert served.exit_code() == INTERRUPTED
        assert "drain=2.0: 1 request not finished" in served.output  # before the timeout of the request


def run(*arguments: str, cwd: Path, program: str = "", code: int = WRONG_INPUT) -> subprocess.CompletedProcess[str]:
    """The command to its end, with this exit code; `program` runs before it in the same process."""
    start = f"import runpy, sys; {program or 'pass'}; runpy.run_module('trainer.serve', run_name='__main__', alter_sys=True)"
    command, environment = [sys.executable, "-c", start, *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "program", "message"),
    [
        ([], "", ".*model=OUTPUT_DIR"),
        (["outputs/a"], "", "outputs/a"),
        (["model=a", "port=0", "port=1"], "", "port"),
        (["model=gone"], "", "model=gone: .*{cwd}; give the output_dir"),
        (["model=a", "prot=1"], "", "(?s:.*)prot.*port"),
        (["model=a"], "sys.modules['starlette'] = None", "starlette is not installed; .*serve"),
        (["model=a"], "sys.modules['uvicorn'] = None", "uvicorn is not installed; .*serve"),
        (["model=a"], "sys.modules['python_multipart'] = None", "python_multipart is not installed; .*serve"),
    ],
)
def test_mistakes_end_with_2_and_a_message(tmp_path: Path, arguments: list[str], program: str, message: str) -> None:
    error = run(*arguments, cwd=tmp_path, program=program).stderr
    assert re.match("error: " + message.replace("{cwd}", str(tmp_path)), error), error


def test_help_lists_the_arguments(tmp_path: Path) -> None:
    listed = run("--help", cwd=tmp_path, code=DONE).stdout
    assert re.search(r"^ +model=\.\.\. .*\n +host=127\.0\.0\.1 .*\n +port=8501 ", listed, re.M), listed


def test_a_port_that_is_in_use_and_a_log_that_cannot_be_written(exported: Exported, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        error = run(f"model={exported.folder}", f"port={port}", cwd=tmp_path).stderr
    assert re.search(f"error: port={port}: .*host=127.0.0.1.*Address already in use", error), error
    folder = tmp_path / "log.jsonl"
    folder.mkdir()
    error = run(f"model={exported.folder}", "port=0", f"log={folder}", cwd=tmp_path).stderr
    assert f"error: log={folder}: cannot be written (Is a directory); give" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "problem"),
    [("saved_model.pb", "corrupt"), ("variables/variables.data-00000-of-00001", "cannot be loaded")],
)
def test_a_damaged_export_ends_with_2(exported: Exported, tmp_path: Path, name: str, problem: str) -> None:
    subprocess.run(["cp", "-r", f"{exported.folder}/export/saved_model/1/.", str(tmp_path)], check=True)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    error = run(f"model={tmp_path}", "port=0", cwd=tmp_path).stderr
    assert re.search(f"error: model={tmp_path}: .*{problem}.*; export it again", error), error


async def respond(_scope: object, _receive: object, _send: object) -> None:
    """Serve no request."""


async def fail(_service: object) -> None:
    await asyncio.sleep(0.2)
    raise RuntimeError("the background task failed")


def test_an_error_of_the_background_task_stops_the_server() -> None:
    """Such as the check of TensorFlow Serving in a relay, without which it would be ready for ever."""
    settings = SimpleNamespace(host="127.0.0.1", linger=0.0, drain=1.0)
    service = SimpleNamespace(
        settings=settings, app=respond, stopping=False, loading=False, active=0, cancelled=0,
        close=lambda: None, close_log=lambda: None,
    )  # fmt: skip
    with listen("127.0.0.1", 0) as listener, pytest.raises(RuntimeError, match="the background task failed"):
        run_service(lambda: service, listener, fail)
