"""A server in a process of its own, asked over the network."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds for TensorFlow to be imported and a model to be warm, on a machine that does other things


class Served:
    """`python -m trainer.serve` on a free port; `with` ends it."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.serve", "port=0", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.said(r"listening on http://127\.0\.0\.1:(\d+)/")[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until it has said something."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if found := re.search(pattern, self.output):
                return found
            assert self.process.poll() is None or self._reader.is_alive(), f"ended: {self.output}"
            time.sleep(0.05)
        raise AssertionError(f"never said {pattern!r}: {self.output}")

    def ready(self) -> Served:
        self.said(r"ready: \d+ classes")
        return self

    def metrics(self) -> dict[str, float]:
        """`name{label,...}` -> value, as Prometheus reads it."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            s.name + ("{" + ",".join(s.labels.values()) + "}" if s.labels else ""): s.value
            for family in families
            for s in family.samples
        }

    def tell(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 60) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
