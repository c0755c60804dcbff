"""`/healthz` and `/metrics` of this process, on `runtime.http_port`.

Threads serve them, so that they report a main thread that is blocked in TensorFlow. If it holds Python's GIL, the probe
times out, with the same effect.
"""

import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import trainer
from trainer.errors import ConfigError
from trainer.monitoring.health import Health
from trainer.monitoring.log import log

GAUGES = {
    "step": "Optimizer steps of the run so far",
    "epoch": "Current epoch of the run, counted from 1 over all phases",
    "loss": "Mean training loss of the last logging interval",
    "images_per_second": "Images per second in the last logging interval, over all workers",
    "goodput_ratio": "Fraction of the time since the first start of the run spent on steps that count",
    "data_wait_ratio": "Fraction of the last logging interval in which this worker waited for data",
    "workers": "Workers of the run",
    "last_step_age_seconds": "Seconds since this worker took its last step",
    "last_progress_age_seconds": "Seconds since the last progress, as in /healthz",
    "checkpoint_age_seconds": "Seconds since the last saved state (at first, the start of training)",
}
TIMEOUT = 10.0  # seconds for a client to send its request


class HealthCollector(Collector):
    """The health of a process as Prometheus metrics, read at each scrape; unknown values are left out."""

    def __init__(self, health: Health, run: str) -> None:
        self.health, self.run = health, run

    def collect(self) -> Iterator[Metric]:
        health = self.health
        facts = {"run": self.run, "phase": health.phase, "version": trainer.__version__}
        yield InfoMetricFamily("kubetune", "The run, its phase, and the version of kubetune", facts)
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
        TCPServer.server_bind(self)  # HTTPServer would resolve the name of this host, which may take long

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


def serve(port: int, health: Health, run: str) -> ThreadingHTTPServer:
    """Serve `/healthz` and `/metrics` on `port` of all addresses. Raises ConfigError if the port is in use."""
    metrics = CollectorRegistry()
    metrics.register(HealthCollector(health, run))
    ProcessCollector(registry=metrics)
    reported = threading.Event()  # the current stall is in the log

    class Handler(MetricsHandler):
        timeout = TIMEOUT
        registry = metrics

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                return super().do_GET()
            code, text = 404, "the paths are /healthz and /metrics"
            if path == "/healthz":
                reason = health.stall_reason()
                _log_once(reason, reported)
                code, text = (503, reason) if reason else (200, health.describe())
            body = f"{text}\n".encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    try:
        server = _Server(port, Handler)
    except OSError as error:
        problem = f"cannot be served ({error.strerror or error})"
        fix = "end the process that uses it, give another port, or null to serve nothing"
        raise ConfigError(problem, key="runtime.http_port", value=port, fix=fix) from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _log_once(reason: str | None, reported: threading.Event) -> None:
    """Log each stall once, with the stack of the main thread."""
    if reason is None:
        reported.clear()
    elif not reported.is_set():
        reported.set()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.error(f"{reason}; stack of the main thread:\n{stack}")
