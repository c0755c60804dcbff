"""ASGI application that forwards REST requests to TensorFlow Serving and logs the predictions in its responses.

Bodies are forwarded unchanged. TensorFlow Serving's response does not name the version of the model that predicted.
Therefore the relay adds the number of the newest loaded version to the path of a `:predict` request without a version.
If TensorFlow Serving has unloaded that version (404), the relay requests the newest number and sends the request again.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from trainer.monitoring.exposition import encode_metrics
from trainer.monitoring.log import log, log_traceback
from trainer.relay.recording import Recorder
from trainer.relay.settings import RelaySettings
from trainer.serving.app import get_request_id
from trainer.serving.metrics import ServingMetrics
from trainer.serving.prediction_log import CLOSE_SECONDS, open_log
from trainer.serving.requests import MemoryBudget, read_body
from trainer.serving.settings import Settings

CONNECT_SECONDS = 5.0  # timeout for connecting to TensorFlow Serving
STATUS_SECONDS = 5.0  # timeout of a request for the loaded versions
# Headers that belong to a connection and not to a message, or that every server sets itself. `accept-encoding` is not
# forwarded, so that TensorFlow Serving does not compress responses, because the recorder parses them.
_NOT_FORWARDED = {
    "accept-encoding", "connection", "content-length", "date", "expect", "host", "keep-alive", "proxy-connection", "te",
    "trailer", "transfer-encoding", "upgrade", "x-request-id",
}  # fmt: skip


class Relay:
    """The relay's HTTP service, which `trainer.serving.server.run_service` runs.

    Raises ConfigError if the prediction log cannot be written.
    """

    def __init__(self, settings: RelaySettings) -> None:
        self.settings = settings
        self.version: str | None = None  # number of the newest version that was loaded at the last check
        self.stopping, self.loading, self.ready = False, False, False  # the relay itself loads no model
        self.active = self.cancelled = 0  # requests in progress; requests that were cancelled at the end of `drain`
        self.log = open_log(settings.log, settings.log_seconds)
        serving = Settings(model=settings.model, name=settings.name, log=settings.log, log_sample=settings.log_sample)
        self.metrics = ServingMetrics(serving, self.log)
        self.metrics.ready.set_function(lambda: self.ready and not self.stopping)
        self.metrics.active.set_function(lambda: self.active)
        self.recorder = Recorder(settings.model, self.metrics)
        self._memory = MemoryBudget(settings.max_bytes)
        self._threads = ThreadPoolExecutor(settings.connections, "forwarding")
        url = urlsplit(settings.upstream)
        self._upstream = urllib3.HTTPConnectionPool(
            url.hostname or "", url.port or 80, maxsize=settings.connections, block=True, retries=False
        )
        self._model = f"/v1/models/{quote(settings.name)}"
        self._predict = re.compile(rf"{re.escape(self._model)}(?:/versions/(\d+))?:predict")

    def close(self) -> None:
        """Stop the threads that forward requests."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def close_log(self) -> None:
        """Record the waiting responses, then write the rest of the prediction log; each for at most `CLOSE_SECONDS`."""
        self.recorder.close(CLOSE_SECONDS)
        if self.log:
            self.log.close()

    async def follow_upstream(self) -> None:
        """Update `ready` and `version` from TensorFlow Serving now and every `poll` seconds, until cancelled."""
        while True:
            await self._run(self._update_version)
            await asyncio.sleep(self.settings.poll)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an HTTP request as an ASGI application, and count it in the metrics."""
        if scope["type"] != "http":
            return
        start_time, code, request_id = time.monotonic(), "none", get_request_id(scope)

        async def count_and_send(message: Message) -> None:
            """Send a part of the response, after adding headers and noting the status code."""
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self.stopping:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self.active += 1
        try:
            response = await self._respond(Request(scope, receive), request_id)
            await response(scope, receive, count_and_send)
        except asyncio.CancelledError:  # `drain` seconds after the start of the shutdown
            self.cancelled += 1
        finally:
            self.active -= 1
            route = "predict" if scope["path"].endswith(":predict") else "other"
            self.metrics.requests.labels(route, code).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start_time)

    async def _respond(self, request: Request, request_id: str) -> Response:
        """Respond to `/healthz`, `/readyz` and `/metrics`, and forward any other request."""
        try:
            match request.url.path:
                case "/healthz":
                    return Response("ok\n", media_type="text/plain")
                case "/readyz":
                    ready = await self._run(self._update_version) and not self.stopping
                    return Response("ready\n" if ready else "not ready\n", 200 if ready else 503)
                case "/metrics":
                    accept = request.headers.get("accept", "")
                    text, media_type = await asyncio.to_thread(encode_metrics, self.metrics.registry, accept)
                    return Response(text, headers={"Content-Type": media_type})
            with self._memory.reservation() as reserve:
                body = await read_body(request, reserve, self.settings.max_bytes)
                return await self._run(self._forward, request, body, request_id)
        except HTTPException as error:
            return _make_error_response(error.status_code, error.detail)
        except Exception as error:
            log_traceback(error)
            return _make_error_response(500, "internal error of the relay")

    async def _run(self, function: Any, *arguments: Any) -> Any:
        """Call a function in one of the threads that forward requests, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _forward(self, request: Request, body: bytes, request_id: str) -> Response:
        """Forward a request and return the response; if the response has predictions, pass it to the recorder."""
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        predict_match = self._predict.fullmatch(path) if request.method == "POST" else None
        version = predict_match[1] or self.version if predict_match else None
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _NOT_FORWARDED]
        query = f"?{request.url.query}" if request.url.query else ""

        def send(path: str) -> urllib3.BaseHTTPResponse:
            return self._send(request.method, path + query, body, {**dict(headers), "X-Request-Id": request_id})

        if predict_match and not predict_match[1] and version:
            response = send(f"{self._model}/versions/{version}:predict")
            if response.status == 404:  # no longer loaded
                version = self._update_version()
                response = send(f"{self._model}/versions/{version}:predict" if version else path)
        else:
            response = send(path)
        if predict_match and response.status == 200:
            if version:
                self.recorder.put(version, request_id, response.data)
            else:
                self.metrics.dropped.inc()
        forwarded = {k: v for k, v in response.headers.items() if k.lower() not in _NOT_FORWARDED}
        return Response(response.data, response.status, forwarded)

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """Send a request to TensorFlow Serving, and once more if it closes the connection; return the response.

        Raises HTTPException: 502 it closed the connection twice; 503 it cannot be reached; 504 it took too long.
        """
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=self.settings.timeout)
        for is_retry in (False, True):
            try:
                return self._upstream.urlopen(
                    method, path, body, headers, redirect=False, timeout=timeout, decode_content=False
                )
            except urllib3.exceptions.ProtocolError:  # TensorFlow Serving may just have closed an idle connection
                if is_retry:
                    raise HTTPException(502, "TensorFlow Serving closed the connection") from None
            except urllib3.exceptions.ReadTimeoutError:
                raise HTTPException(504, f"TensorFlow Serving took more than {self.settings.timeout:g} s") from None
            except urllib3.exceptions.HTTPError:
                raise HTTPException(503, "TensorFlow Serving cannot be reached") from None
        raise AssertionError("unreachable")

    def _update_version(self) -> str | None:
        """Request the loaded versions from TensorFlow Serving, update `ready` and `version`, and return the newest one.

        Returns None if no version is loaded or TensorFlow Serving does not respond; `version` then does not change.
        """
        newest = None
        with suppress(urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError):
            timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=STATUS_SECONDS)
            status = json.loads(self._upstream.urlopen("GET", self._model, timeout=timeout).data)
            loaded_versions = [int(v["version"]) for v in status["model_version_status"] if v["state"] == "AVAILABLE"]
            newest = str(max(loaded_versions))
        if newest is None and self.ready:
            log.warning(f"TensorFlow Serving at {self.settings.upstream} has no loaded version, or does not respond")
        if newest and newest != self.version:
            log.info(f"TensorFlow Serving has loaded version {newest}")
        self.ready, self.version = newest is not None, newest or self.version
        return newest


def _make_error_response(status: int, problem: str) -> Response:
    return Response(json.dumps({"error": problem}), status, media_type="application/json")
