"""A small export, a server of it in a process of its own, and a client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.images import photo
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Exported:
    """A run's `output_dir` with an export, and its model; TensorFlow is imported only by the tests that need it."""

    folder: Path
    model: keras.Model

    @classmethod
    def create(cls, folder: Path) -> Exported:
        from tests.exporting.subjects import bundle_for, small_model
        from trainer.exporting.saved_model import export_saved_model

        model = small_model()
        export_saved_model(bundle_for(model), folder / "export" / "saved_model" / "1")
        return cls(folder, model)

    @property
    def names(self) -> list[str]:
        return (self.folder / "export/saved_model/1/assets/labels.txt").read_text(encoding="utf-8").splitlines()

    def probabilities(self, files: list[bytes]) -> np.ndarray:
        """Float32 [n, classes], decoded and classified as in the evaluation."""
        import tensorflow as tf

        from trainer.data.decoding import decode_image

        pixels = [decode_image(tf.constant(data), 32, "stretch") for data in files]
        return np.asarray(self.model(tf.cast(tf.stack(pixels), tf.float32), training=False))


class Served:
    """`python -m trainer.serve` on a free port; leaving the `with` block kills it."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        command = [sys.executable, "-m", "trainer.serve", "port=0", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)/")[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches."""

        def find() -> re.Match[str] | None:
            has_ended = not self._reader.is_alive()
            match = re.search(pattern, self.output)
            assert match or not has_ended, f"ended without {pattern!r}: {self.output}"
            return match

        match = wait_until(find, lambda: f"no {pattern!r} in {self.output}")
        assert match
        return match

    def ready(self) -> Served:
        self.wait_for(r"ready: \d+ classes")
        return self

    def metrics(self) -> dict[str, float]:
        """`name{label,...}` -> value, as Prometheus reads it."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            s.name + ("{" + ",".join(s.labels.values()) + "}" if s.labels else ""): s.value
            for family in families
            for s in family.samples
        }

    def send(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_code(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Clients:
    """Threads that send one request after the other, and count versions and codes of the responses."""

    def __init__(self, served: Served, count: int = 4) -> None:
        self.codes: Counter[int] = Counter()
        self.versions: list[str] = []  # in the order of the responses
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(served.url, number)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _send(self, url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while not self._stopping.is_set():
                response = client.post("/predict", files={"file": (f"{number}.jpg", photo(number))})
                self.codes[response.status_code] += 1
                self.versions.append(response.json()["version"])

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
