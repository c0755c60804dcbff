"""The server's ASGI application: routes, responses, and the number of requests in progress."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.monitoring.exposition import encode_metrics
from trainer.monitoring.log import log_traceback
from trainer.serving.batching import Batcher
from trainer.serving.export_files import Export, Prediction
from trainer.serving.metrics import ServingMetrics, VersionMetrics
from trainer.serving.prediction_log import open_log
from trainer.serving.requests import (
    ClientBudget,
    EncodedImage,
    MemoryBudget,
    PredictRequest,
    make_unavailable_error,
    parse_instances,
    parse_predict,
    read_body,
)
from trainer.serving.settings import Settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

FIXED_ROUTES = ("/", "/predict", "/healthz", "/readyz", "/metrics", "/v1/models")
CSP = (  # content security policy: the page has no external resources and connects only to this server
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")  # a client's X-Request-Id that is logged and returned unchanged
LOADING_PAGE = '<!doctype html><title>kubetune</title><meta http-equiv="refresh" content="2">The model is being loaded.'


@dataclass(eq=False)
class ServedVersion:
    """A loaded version of the model, with its queues. It is in use while requests wait for its predictions."""

    export: Export
    model: ServedModel
    batchers: Mapping[bool, Batcher]  # by whether heatmaps are computed
    tasks: list[asyncio.Task[None]]  # one task per batcher, which runs it
    requests: int = 0  # number of requests that wait for predictions

    def close(self) -> None:
        """Stop the tasks that form batches."""
        for task in self.tasks:
            task.cancel()


class Service:
    """The HTTP service for one model. It also responds while the model is being loaded, and until the server exits.

    `export` is the version to load first. Raises ConfigError if the prediction log cannot be written.
    """

    def __init__(self, settings: Settings, export: Export) -> None:
        self.settings = settings
        self.version: ServedVersion | None = None  # None until the first version is loaded and warmed up
        self._loading = export  # the version to load first
        self._replaced: set[ServedVersion] = set()  # earlier versions that are still in use
        self.stopping = False  # after a signal: the service is not ready, and responses close their connections
        self.active = 0  # number of requests in progress, to any route
        self.cancelled = 0  # number of requests that were cancelled at the end of `drain`
        self.log = open_log(settings.log, settings.log_seconds)
        self.metrics = ServingMetrics(settings, self.log)
        self.metrics.ready.set_function(lambda: not self.get_unready_reason())
        self.metrics.active.set_function(lambda: self.active)
        self.metrics.queued.set_function(self._count_queued)
        self._memory = MemoryBudget(settings.max_bytes)
        self._clients = ClientBudget(settings.max_pixels)
        self._parser = ThreadPoolExecutor(1, "parsing")  # one request at a time: parsed JSON is many times its size
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._page = resources.files("trainer.serving").joinpath("page.html").read_bytes()
        model_paths = [f"/v1/models/{{name}}{version}" for version in ("", "/versions/{version}")]
        verb_paths = [f"{path}:{verb}" for path in model_paths for verb in ("predict", "explain")]
        routes = [
            Route("/", self.get_page),
            Route("/healthz", Response("ok\n", media_type="text/plain"), methods=["GET"]),
            Route("/readyz", self.get_readiness),
            Route("/metrics", self.get_metrics),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/v1/models", _make_json_response({"models": [settings.name]}), methods=["GET"]),
            *(Route(path, self.predict_instances, methods=["POST"]) for path in verb_paths),
            *(Route(path, self.get_status) for path in model_paths),
        ]
        handlers: Any = {HTTPException: _respond_to_http_error, Exception: _respond_to_bug}
        self._routes: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)

    @property
    def export(self) -> Export:
        """The version that is served, or the version that is being loaded if no version is served yet."""
        return self.version.export if self.version else self._loading

    def serve_version(self, export: Export, model: ServedModel) -> None:
        """Serve this version from now on. Requests that are already waiting get predictions from the previous version.

        Must be called in the event loop.
        """
        metrics = VersionMetrics(self.metrics, export)
        batchers = {explain: self._create_batcher(model, metrics, explain) for explain in (False, True)}
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        previous, self.version = self.version, ServedVersion(export, model, batchers, tasks)
        self.metrics.current = metrics
        if previous:
            self._replaced.add(previous)
            self._close_unused()

    def _close_unused(self) -> None:
        """Close the replaced versions for which no request waits."""
        for version in [version for version in self._replaced if not version.requests]:
            version.close()
            self._replaced.remove(version)

    def close(self) -> None:
        """Stop the tasks that form batches, for all versions."""
        for version in (self.version, *self._replaced):
            if version:
                version.close()

    def close_log(self) -> None:
        """Write the rest of the prediction log, within ten seconds. Must be called once, after `close`."""
        if self.log:
            self.log.close()

    @property
    def loading(self) -> bool:
        """Whether no version of the model is loaded yet."""
        return self.version is None

    def _count_queued(self) -> int:
        versions = [version for version in (self.version, *self._replaced) if version]
        return sum(len(batcher) for version in versions for batcher in version.batchers.values())

    def _create_batcher(self, model: ServedModel, metrics: VersionMetrics, explain: bool) -> Batcher:
        """Create the queue for predictions with or without heatmaps (`explain`)."""

        def run_model(images: list[EncodedImage]) -> list[Prediction | str]:
            """Predict a batch, and record its size, its duration and the predictions in the metrics."""
            start_time = time.monotonic()
            predictions = model.predict([image.data for image in images], explain)
            self.metrics.batches.observe(len(images))
            self.metrics.batch_seconds.observe(time.monotonic() - start_time)
            metrics.record(images, predictions)
            return predictions

        settings = self.settings
        limits = {"max_batch": settings.batch, "max_queued": settings.queue, "max_pixels": settings.max_pixels}
        return Batcher(run_model, self._model_thread, window_seconds=settings.window_ms / 1000, **limits)

    @contextlib.contextmanager
    def _use_current_version(self) -> Iterator[ServedVersion]:
        """Yield the version that is served, which stays in use until the context ends.

        Raises HTTPException 503 if no version is loaded.
        """
        version = self.version
        if version is None:
            raise make_unavailable_error("the model is being loaded")
        version.requests += 1
        try:
            yield version
        finally:
            version.requests -= 1
            self._close_unused()

    def get_unready_reason(self) -> str:
        """Return why the service is not ready; "" if it is ready."""
        return "stopping" if self.stopping else "" if self.version else "the model is being loaded"

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an HTTP request as an ASGI application, and count it. While the server stops, close the connection."""
        if scope["type"] != "http":
            return
        start_time, code, request_id = time.monotonic(), "none", get_request_id(scope)
        scope.setdefault("state", {})["id"] = request_id

        async def count_and_send(message: Message) -> None:
            """Send a part of the response, after adding headers and noting the status code."""
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self.stopping and not any(name.lower() == b"connection" for name, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self.active += 1
        try:
            with contextlib.suppress(Exception):  # Starlette raises an exception again after `_respond_to_bug`
                await self._routes(scope, receive, count_and_send)
        except asyncio.CancelledError:  # after `drain` seconds
            self.cancelled += 1
            if code == "none":
                response = _make_json_response(
                    {"error": "the server has stopped; send the request to another one"}, status=503
                )
                await response(scope, receive, count_and_send)
        finally:
            self.active -= 1
            route = _get_route_label(scope["path"])
            self.metrics.requests.labels(route, code).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start_time)

    async def _predict_images(
        self, request: Request, parse: Callable[..., PredictRequest], *arguments: Any
    ) -> tuple[Export, PredictRequest, list[Prediction]]:
        """Read a request, parse it with `parse(body, *arguments)`, and predict all its images with the same version.

        Returns the version, the parsed request, and one prediction per image. Raises HTTPException if the request is
        invalid, an image cannot be decoded, the model is being loaded, or the server is overloaded.
        """
        if self.version is None:
            raise make_unavailable_error("the model is being loaded")
        with self._memory.reservation() as reserve:
            body = await read_body(request, reserve, self.settings.max_bytes)
            parsed = await asyncio.get_running_loop().run_in_executor(self._parser, parse, body, *arguments)
            del body
            images = [replace(image, request_id=request.state.id) for image in parsed.images]
            client = request.client.host if request.client else ""
            with self._use_current_version() as version:
                self._check_version(request, version.export)
                if parsed.explain and not version.model.explains:
                    raise HTTPException(400, "this export has no signature `explain`; export it again")
                try:
                    with self._clients.reservation(client, images):
                        predictions = await version.batchers[parsed.explain].predict(images)
                except asyncio.QueueFull:
                    problem = f"the queue of {self.settings.queue} images has no room for yours"
                    raise make_unavailable_error(problem) from None
        for image, prediction in zip(images, predictions, strict=True):
            if isinstance(prediction, str):
                raise HTTPException(400, f"{image.name} cannot be decoded ({prediction})")
        return version.export, parsed, predictions

    async def predict(self, request: Request) -> Response:
        """Respond with the `top_k` most probable classes of each image and, with `explain`, its heatmap."""
        content_type, query = request.headers.get("content-type", ""), dict(request.query_params)
        export, parsed, predictions = await self._predict_images(
            request, parse_predict, content_type, query, self.settings
        )
        prediction_objects = []
        for image, prediction in zip(parsed.images, predictions, strict=True):
            probabilities = prediction.probabilities  # float32 [classes]
            top_indices = np.argsort(-probabilities, kind="stable")[: parsed.top_k]
            classes = [{"class": export.classes[i], "probability": float(probabilities[i])} for i in top_indices]
            prediction_object: dict[str, Any] = {"name": image.name, "classes": classes}
            if prediction.heatmap is not None:
                reference = export.reference or {}
                geometry = {  # which area the heatmap covers; crop: the central square, ignore: before EXIF rotation
                    "resize": str(reference.get("resize", "stretch")),
                    "orientation": str(reference.get("orientation", "ignore")),
                }
                prediction_object["heatmap"] = {"png": _encode_png(prediction.heatmap), **geometry}
            prediction_objects.append(prediction_object)
        return _make_json_response(
            {"model": self.settings.name, "version": export.version, "predictions": prediction_objects}
        )

    async def predict_instances(self, request: Request) -> Response:
        """Respond in the format of KServe and TensorFlow Serving, with each image's probabilities of all classes.

        If the path ends in `:explain` or the signature is `explain`, add each image's embedding and heatmap.
        """
        self._check_model(request)
        explain = request.url.path.endswith(":explain")
        _, parsed, predictions = await self._predict_images(request, parse_instances, self.settings, explain)
        names = ("probabilities", "embedding", "heatmap") if parsed.explain else ("probabilities",)
        columns = {name: [getattr(prediction, name).tolist() for prediction in predictions] for name in names}
        if not parsed.explain:
            return _make_json_response({"outputs" if parsed.columnar else "predictions": columns["probabilities"]})
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return _make_json_response({"outputs": columns} if parsed.columnar else {"predictions": rows})

    def _check_model(self, request: Request) -> None:
        name = request.path_params["name"]
        if name != self.settings.name:
            raise HTTPException(404, f"there is no model {name!a}; available: {self.settings.name}")
        self._check_version(request, self.export)

    def _check_version(self, request: Request, export: Export) -> None:
        version = request.path_params.get("version", export.version)
        if version != export.version:
            raise HTTPException(404, f"there is no version {version!a}; available: {export.version}")

    async def get_status(self, request: Request) -> Response:
        """Respond with the model's status: `ready` as in KServe, `model_version_status` as in TensorFlow Serving.

        The status code is 503 while the service is not ready.
        """
        self._check_model(request)
        state = "UNLOADING" if self.stopping else "AVAILABLE" if self.version else "LOADING"
        status = {"error_code": "OK", "error_message": ""}
        versions = [{"version": self.export.version, "state": state, "status": status}]
        body = {"name": self.settings.name, "ready": not self.get_unready_reason(), "model_version_status": versions}
        return _make_json_response(body, 503 if self.get_unready_reason() else 200)

    async def get_readiness(self, _request: Request) -> Response:
        """Respond to a readiness probe: 200, or 503 while the first version is being loaded or the server stops."""
        reason = self.get_unready_reason()
        return Response(f"{reason or 'ready'}\n", 503 if reason else 200, media_type="text/plain")

    async def get_metrics(self, request: Request) -> Response:
        """Respond with the metrics, in a text format that the header `Accept` allows."""
        accept = request.headers.get("accept", "")
        text, content_type = await asyncio.to_thread(encode_metrics, self.metrics.registry, accept)
        return Response(text, headers={"Content-Type": content_type})

    async def get_page(self, request: Request) -> Response:
        """Respond to browsers with the upload page, and to other clients with KServe's liveness status."""
        if "text/html" not in request.headers.get("accept", ""):
            return _make_json_response({"status": "alive"})
        if self.version is None:
            return Response(LOADING_PAGE, 503, media_type="text/html", headers={"Retry-After": "2"})
        server = {"name": self.settings.name, "version": self.export.version, "classes": len(self.export.classes)}
        server |= {"max_bytes": self.settings.max_bytes, "explains": self.version.model.explains}
        page = self._page.replace(b"{{server}}", json.dumps(server).encode())
        headers = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return Response(page, media_type="text/html", headers=headers)


def get_request_id(scope: Scope) -> str:
    """Return a request's identifier: its header X-Request-Id if that matches `REQUEST_ID`, else a new random one."""
    client_id = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return client_id if REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex


def _get_route_label(path: str) -> str:
    """Return a path's label in the metrics. The set of labels is fixed, so that clients cannot create time series."""
    if path.startswith("/v1/models/"):
        verb = next((verb for verb in (":predict", ":explain") if path.endswith(verb)), "")
        return f"/v1/models/NAME{verb}"
    return path if path in FIXED_ROUTES else "other"


def _encode_png(heatmap: np.ndarray) -> str:
    """Encode a heatmap, float32 [h, w] with values in 0..1, as a grayscale PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(heatmap, 0, 1) * 255).astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _make_json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")  # ASCII: encoding cannot fail


async def _respond_to_http_error(_request: Request, error: HTTPException) -> Response:
    problem = error.detail
    if problem == "Not Found":  # Starlette's router has raised the error
        problem = f"there is no such route; available: {' '.join(FIXED_ROUTES)} /v1/models/NAME /v1/models/NAME:predict"
    return _make_json_response({"error": problem}, error.status_code, error.headers)


async def _respond_to_bug(_request: Request, error: Exception) -> Response:
    log_traceback(error)
    return _make_json_response({"error": "internal error; the log of the server has the traceback"}, status=500)
