"""SIGTERM: what was accepted is answered, and the process ends with a code that says so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.running import catches
from tests.serving.pictures import photo
from tests.serving.running import ROOT, Served
from trainer.errors import DONE, INTERRUPTED, WRONG_INPUT

if TYPE_CHECKING:
    from tests.serving.exported import Exported

LIMITS = ("batch=4", "queue=512", "linger=8")


class Clients:
    """Threads that ask again and again, half of them with a new connection each time, until nobody listens."""

    def __init__(self, served: Served, count: int) -> None:
        self.url = f"{served.url}/predict"
        self.ends: Counter[str] = Counter()
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        client = httpx.Client(timeout=120)
        data = photo(number)
        while not self.over.is_set():
            if number % 2:
                client.close()
                client = httpx.Client(timeout=120)
            try:
                self.ends[str(client.post(self.url, files={"file": data}).status_code)] += 1
            except httpx.ConnectError:  # never accepted
                self.ends["refused"] += 1
                return
            except httpx.HTTPError as error:
                self.ends[repr(error)] += 1

    def join(self) -> Counter[str]:
        for thread in self._threads:
            thread.join(120)
        return self.ends


def test_no_accepted_request_is_lost(exported: Exported) -> None:
    with Served(f"model={exported.folder}", *LIMITS) as served:
        served.ready()
        clients = Clients(served, 12)
        while clients.ends["200"] < 50:
            time.sleep(0.05)
        slow = socket.create_connection(("127.0.0.1", served.port))  # it has said half of a head
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        served.tell()
        served.said("SIGTERM: taking requests for 8 s more")
        assert served.client.get("/readyz").status_code == 503
        status = served.client.get("/v1/models/kubetune")
        assert (status.status_code, status.headers["connection"]) == (503, "close")
        slow.sendall(b"st: a\r\n\r\n")
        assert slow.recv(1000).startswith(b"HTTP/1.1 200 OK")
        ends = clients.join()
        assert ends.keys() == {"200", "refused"}, ends
        assert ends["refused"] == 12
        assert served.end() == DONE
        assert served.output.splitlines()[-1] == "SIGTERM: every request that was taken is answered"


def test_a_second_signal_ends_at_once(exported: Exported) -> None:
    with Served(f"model={exported.folder}", "linger=60") as served:
        served.ready()
        served.tell(signal.SIGINT)
        served.said("SIGINT: taking requests for 60 s more")
        served.tell()
        assert served.end() == INTERRUPTED
        assert "SIGTERM: stopping at once; 0 requests were not answered" in served.output


def test_told_while_the_model_loads_it_ends_at_once(exported: Exported) -> None:
    with Served(f"model={exported.folder}") as served:  # it listens; TensorFlow is imported for seconds
        answer = served.client.post("/predict", files={"file": photo()})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert served.client.get("/healthz").status_code == 200
        assert served.client.get("/readyz").text == "the model is being loaded\n"
        page = served.client.get("/", headers={"Accept": "text/html"})
        assert (page.status_code, "being loaded" in page.text) == (503, True)
        served.tell()
        assert served.end(20) == INTERRUPTED
        assert "interrupted: SIGTERM before the model was loaded; nothing is lost" in served.output


def test_as_the_first_process_of_a_container_it_hears_signals(exported: Exported) -> None:
    """The kernel drops a signal to process 1 that has no handler for it; so there must always be one."""
    with Served(f"model={exported.folder}", "linger=0") as served:
        assert catches(served.process.pid, signal.SIGTERM)
        served.ready()
        assert catches(served.process.pid, signal.SIGTERM)
        assert catches(served.process.pid, signal.SIGINT)
        served.tell()
        assert served.end() == DONE


def test_who_does_not_read_does_not_keep_it_alive(exported: Exported) -> None:
    """A body that never comes: `drain` is over, and the code says that something was not answered."""
    with Served(f"model={exported.folder}", "linger=0", "drain=2") as served:
        served.ready()
        with socket.create_connection(("127.0.0.1", served.port)) as stuck:
            stuck.sendall(
                b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            while served.metrics()["kubetune_serving_active_requests"] < 2:
                time.sleep(0.05)
            began = time.monotonic()
            served.tell()
            assert served.end() == INTERRUPTED
            assert time.monotonic() - began < 30
        assert "1 request was not answered within drain=2 s" in served.output


def run(*arguments: str, cwd: Path, program: str = "") -> subprocess.CompletedProcess[str]:
    """The command to its end; `program` runs before it in the same process."""
    start = f"import runpy, sys; {program or 'pass'}; runpy.run_module('trainer.serve', run_name='__main__', alter_sys=True)"
    return subprocess.run(
        [sys.executable, "-c", start, *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: say what to serve: python -m trainer.serve model=OUTPUT_DIR, of a run, or its export\n"),
        (["outputs/a"], "error: outputs/a: is not key=value; write python -m trainer.serve model=OUTPUT_DIR"),
        (
            ["model=a", "port=0", "port=1"],
            "error: port=1: is given twice; write python -m trainer.serve model=OUTPUT_DIR",
        ),
        (
            ["model=gone"],
            "error: model=gone does not exist (seen from {cwd}); give the output_dir of a run, or its export\n",
        ),
        (
            ["model=a", "prot=1"],
            "error: the configuration has 1 fault:\n  prot: there is no such key; did you mean port?\n",
        ),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == WRONG_INPUT
    assert done.stderr.startswith(message.replace("{cwd}", str(tmp_path)))


def test_help_lists_the_arguments(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == DONE
    assert "  model\n  host=127.0.0.1\n  port=8501\n" in done.stdout


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    for module in ("starlette", "uvicorn", "python_multipart"):
        done = run("model=any", cwd=tmp_path, program=f"sys.modules['{module}'] = None")
        assert done.returncode == WRONG_INPUT
        assert done.stderr == f"error: serving needs {module}, which is not installed: pip install 'kubetune[serve]'\n"


def test_a_port_that_is_taken_and_a_log_that_cannot_be_written(exported: Exported, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(f"model={exported.folder}", f"port={port}", cwd=tmp_path)
    assert done.returncode == WRONG_INPUT
    assert f"error: host=127.0.0.1 port={port} cannot be served (Address already in use" in done.stderr
    done = run(f"model={exported.folder}", "port=0", f"log={tmp_path}", cwd=tmp_path)
    assert done.returncode == WRONG_INPUT
    assert f"error: log={tmp_path} cannot be written (Is a directory); give a file that can, or none\n" in done.stderr


@pytest.mark.slow
def test_a_damaged_export_ends_with_2(exported: Exported, tmp_path: Path) -> None:
    for name, words in (("saved_model.pb", "saved_model.pb is damaged; export again"),
                        ("variables/variables.data-00000-of-00001", "cannot be loaded (")):  # fmt: skip
        folder = tmp_path / name.replace("/", "-") / "1"
        subprocess.run(["cp", "-r", f"{exported.folder}/export/saved_model/1/.", str(folder.parent)], check=True)
        file = folder.parent / name
        file.write_bytes(file.read_bytes()[:3000])
        done = run(f"model={folder.parent}", "port=0", cwd=tmp_path)
        assert done.returncode == WRONG_INPUT, done.stderr
        assert words in done.stderr
