"""`/healthz` and `/metrics` of this process, on `runtime.http_port`.

Served by threads of their own, so that a main thread that hangs in TensorFlow is seen. One that hangs and keeps
Python's lock lets nothing answer: then the probe runs into its time limit, which means the same.
"""

import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import trainer
from trainer.errors import ConfigError
from trainer.monitoring.health import Health
from trainer.monitoring.log import log

GAUGES = {
    "step": "Optimizer steps of the run so far",
    "epoch": "Epoch of the run that is trained, counted from 1 over all phases",
    "loss": "Mean training loss of the last logging interval",
    "images_per_second": "Images trained a second in the last logging interval, over all workers",
    "goodput_ratio": "Share of the time since the first start of the run that went into steps that are kept",
    "data_wait_ratio": "Share of the last logging interval in which this worker waited for data",
    "workers": "Workers of the run",
    "last_step_age_seconds": "Seconds since this worker took its last step",
    "last_progress_age_seconds": "Seconds since anything got on, as /healthz judges it",
    "checkpoint_age_seconds": "Seconds between the state that is saved (at first: the start of training) and now",
}
PLAIN = "text/plain; charset=utf-8"
SECONDS = 10.0  # for a client to send its request


class HealthCollector(Collector):
    """The health of a process as Prometheus metrics, read at each scrape; what is not known yet is left out."""

    def __init__(self, health: Health, run: str) -> None:
        self.health, self.run = health, run

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        health = self.health
        facts = {"run": self.run, "phase": health.phase, "version": trainer.__version__}
        yield InfoMetricFamily("kubetune", "The run, the phase it is in, and the version of kubetune", facts)
        values: dict[str, float | None] = {
            **health.values,
            "last_step_age_seconds": health.step_age,
            "last_progress_age_seconds": health.seconds_since_progress,
            "checkpoint_age_seconds": health.checkpoint_age,
        }
        for name, text in GAUGES.items():
            if (value := values.get(name)) is not None:
                yield GaugeMetricFamily(f"kubetune_{name}", text, value)


class _Server(ThreadingHTTPServer):
    request_queue_size = 16

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        both = socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both else socket.AF_INET
        super().__init__(("::" if both else "0.0.0.0", port), handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 as well
        TCPServer.server_bind(self)  # the one between asks for the name of this host, which may take long

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's concern."""


def serve(port: int, health: Health, run: str) -> ThreadingHTTPServer:
    """Answer on `port` from now on, on all addresses.

    Raises:
        ConfigError: the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(HealthCollector(health, run))
    ProcessCollector(registry=registry)
    reported = threading.Event()  # the log has the reason why the process is stuck

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/healthz":
                reason = health.stall_reason()
                _log_once(reason, reported)
                self._answer(503 if reason else 200, PLAIN, f"{reason or health.describe()}\n".encode())
            elif path == "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept") or "")
                self._answer(200, kind, encode(registry))
            else:
                self._answer(404, PLAIN, b"here are /healthz and /metrics\n")

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes are not worth a line."""

    try:
        server = _Server(port, Handler)
    except OSError as error:
        raise ConfigError(
            f"runtime.http_port={port} cannot be served ({error.strerror or error}); end what holds the port, give "
            "another one, or null to serve nothing"
        ) from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _log_once(reason: str | None, reported: threading.Event) -> None:
    """Log that the process is stuck, once each time, and where: its end is near."""
    if reason is None:
        reported.clear()
    elif not reported.is_set():
        reported.set()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.error(f"{reason}; the main thread is at:\n{stack}")
