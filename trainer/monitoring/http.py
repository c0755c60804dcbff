"""HTTP server for `/healthz` and `/metrics` of this process, on `runtime.http_port`.

It runs in daemon threads, so that it responds while the main thread is blocked in TensorFlow. If a call holds the GIL,
so that no Python thread runs, a training process's watchdog process (`trainer.cluster.watchdog_process`) responds on
the same listening socket.
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
from prometheus_client.registry import Collector

import trainer
from trainer.errors import ConfigError
from trainer.monitoring.exposition import encode_metrics
from trainer.monitoring.health import Health
from trainer.monitoring.log import log, log_traceback

GAUGES = {  # name of a gauge, which gets the prefix "kubetune_" in Prometheus -> its description
    "step": "Optimizer steps of the run so far",
    "epoch": "Current epoch of the run, counted from 1 over all phases",
    "loss": "Mean training loss of the last logging interval",
    "images_per_second": "Images per second in the last logging interval, over all workers",
    # Steps count unless a later start of the run has to repeat them, since it resumes from an older checkpoint.
    "goodput_ratio": "Fraction of the time since the first start of the run spent on steps that count",
    "data_wait_ratio": "Fraction of the last logging interval in which this worker waited for data",
    "workers": "Workers of the run",
    "last_step_age_seconds": "Seconds since this worker took its last step",
    "last_progress_age_seconds": "Seconds since the last progress, as in /healthz",
    "checkpoint_age_seconds": "Seconds since the last saved state (at first, the start of training)",
}
CLIENT_TIMEOUT_SECONDS = 10.0  # maximum time of each read from a client's connection, and of each write to it


class HealthCollector(Collector):
    """Collects a process's health as Prometheus metrics at each scrape. Gauges without a value are omitted."""

    def __init__(self, health: Health, run_label: str) -> None:
        self.health = health
        self.run_label = run_label

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at a scrape."""
        health = self.health
        labels = {"run": self.run_label, "phase": health.phase, "version": trainer.__version__}
        yield InfoMetricFamily("kubetune", "The run, its phase, and the version of kubetune", labels)
        gauge_values: dict[str, float | None] = {
            **health.values,
            "last_step_age_seconds": health.step_age,
            "last_progress_age_seconds": health.seconds_since_progress,
            "checkpoint_age_seconds": health.checkpoint_age,
        }
        for name, description in GAUGES.items():
            if (value := gauge_values.get(name)) is not None:
                yield GaugeMetricFamily(f"kubetune_{name}", description, value)


class _DualStackServer(ThreadingHTTPServer):
    """An HTTP server on all interfaces, for IPv6 and IPv4 if the host supports dual-stack sockets, else for IPv4."""

    request_queue_size = 16
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # accept IPv4 as well
        TCPServer.server_bind(self)  # HTTPServer.server_bind would resolve the host name, which can be slow

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Log a request handler's exception, unless the client disconnected or timed out."""
        if not isinstance(error := sys.exception(), ConnectionError | TimeoutError):
            log_traceback(error)


def serve(port: int, health: Health, run_label: str) -> ThreadingHTTPServer:
    """Start an HTTP server for `/healthz` and `/metrics` in daemon threads, and return it.

    Args:
        port: TCP port on all interfaces (`runtime.http_port`).
        health: the health that both paths report.
        run_label: value of the label `run` of the metrics, such as the run's output_dir.

    Raises:
        ConfigError: the server cannot listen on `port`.
    """
    registry = CollectorRegistry()
    registry.register(HealthCollector(health, run_label))
    ProcessCollector(registry=registry)
    stall_logged = threading.Event()  # set once the current stall is logged

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            """Respond to `/healthz` and `/metrics`; 404 for any other path."""
            path = self.path.partition("?")[0]
            status = 404
            body = b"the paths are /healthz and /metrics\n"
            content_type = "text/plain; charset=utf-8"
            if path == "/metrics":
                status, (body, content_type) = 200, encode_metrics(registry, self.headers.get("Accept") or "")
            elif path == "/healthz":
                reason = health.describe_stall()
                _log_stall_once(reason, stall_logged)
                status, body = 503 if reason else 200, f"{reason or health.describe()}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log no requests, because probes and Prometheus would fill the log."""

    try:
        server = _DualStackServer(("", port), Handler)
    except OSError as error:
        problem = f"cannot listen on this port ({error.strerror or error})"
        fix = "end the process that uses it, set another port, or null for no server"
        raise ConfigError(problem, key="runtime.http_port", value=port, fix=fix) from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server


def _log_stall_once(reason: str | None, stall_logged: threading.Event) -> None:
    """Log a stall and the main thread's stack once per stall. `reason` describes it; None if there is no stall."""
    if reason is None:
        stall_logged.clear()
    elif not stall_logged.is_set():
        stall_logged.set()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.error(f"{reason}; stack of the main thread:\n{stack}")
