"""The routes: what a client may ask, and the form of the answers."""

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.monitoring.log import log_traceback
from trainer.serving.batching import Batcher, Full
from trainer.serving.export_files import Answer, Export, Unreadable
from trainer.serving.metrics import Observed
from trainer.serving.requests import TOGETHER, Asked, Refused, Room, busy, read_body, read_instances, read_predict
from trainer.serving.settings import Settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

ROUTES = ("/", "/predict", "/healthz", "/readyz", "/metrics", "/v1/models")
POLICY = (  # of the page: it holds all it needs, and asks nobody but this server
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOADING = '<!doctype html><title>kubetune</title><meta http-equiv="refresh" content="2">The model is being loaded.'

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """One model behind HTTP, from the first request that it refuses because it loads to the last that it answers.

    Attributes:
        model: None until it is loaded and warm.
        leaving: asked to stop: not ready any more, and connections end with their next answer.
        active: requests that are being answered.
        lost: requests that the end of the process cut off.
    """

    def __init__(self, settings: Settings, export: Export) -> None:
        self.settings, self.export = settings, export
        self.model: ServedModel | None = None
        self.leaving, self.active, self.lost = False, 0, 0
        self.observed = Observed(settings, export, lambda: sum(map(len, self._batchers)), lambda: self.active)
        self._room = Room(TOGETHER * settings.max_bytes)
        self._parser = ThreadPoolExecutor(1, "parsing")  # one at a time: JSON takes many times its size in memory
        self._asker = ThreadPoolExecutor(1, "model")
        self._classifier, self._explainer = (self._batcher(explain) for explain in (False, True))
        self._batchers = (self._classifier, self._explainer)
        self._page = resources.files("trainer.serving").joinpath("page.html").read_bytes()
        models = "/v1/models/{name}"
        routes = [
            Route("/", self.answered(self.home)),
            Route("/healthz", self.answered(self.health)),
            Route("/readyz", self.answered(self.readiness)),
            Route("/metrics", self.answered(self.metrics)),
            Route("/predict", self.answered(self.predict), methods=["POST"]),
            Route("/v1/models", self.answered(self.models)),
            *(Route(f"{models}{version}:{verb}", self.answered(self.instances), methods=["POST"])
              for version in ("", "/versions/{version}") for verb in ("predict", "explain")),
            *(Route(f"{models}{version}", self.answered(self.status)) for version in ("", "/versions/{version}")),
        ]  # fmt: skip
        self._routes: ASGIApp = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    def _batcher(self, explain: bool) -> Batcher:
        def ask(images: list[bytes]) -> list[Answer | Unreadable]:
            assert self.model is not None
            began = time.monotonic()
            answers = (self.model.explain if explain else self.model.classify)(images)
            self.observed.batches.observe(len(images))
            self.observed.batch_seconds.observe(time.monotonic() - began)
            self.observed.predicted([answer for answer in answers if isinstance(answer, Answer)])
            return answers

        s = self.settings
        limits = {"size": s.batch, "queue": s.queue, "pixels": s.max_pixels}
        return Batcher(ask, self._asker, window=s.window_ms / 1000, **limits)

    def workers(self) -> list[asyncio.Task[None]]:
        """The tasks that gather batches; they must run beside the server."""
        return [asyncio.create_task(batcher.work()) for batcher in self._batchers]

    def not_ready(self) -> str:
        """Why requests should go elsewhere; empty where they may come."""
        return "stopping" if self.leaving else "" if self.model else "the model is being loaded"

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application: each request is counted, and the last answer of a connection says so."""
        if scope["type"] != "http":
            return
        began, code = time.monotonic(), "none"

        async def count_and_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                if self.leaving and not any(name.lower() == b"connection" for name, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self.active += 1
        try:
            await self._routes(scope, receive, count_and_send)
        except asyncio.CancelledError:  # `drain` is over
            self.lost += 1
            if code == "none":
                await _json({"error": "the server has stopped; ask another"}, 503)(scope, receive, count_and_send)
        finally:
            self.active -= 1
            route = _route(scope["path"])
            self.observed.requests.labels(route, code).inc()
            self.observed.seconds.labels(route).observe(time.monotonic() - began)

    def answered(self, handle: Handler) -> Handler:
        """The same handler, whose refusals and bugs become answers."""

        async def safely(request: Request) -> Response:
            try:
                return await handle(request)
            except Refused as refusal:
                return _json({"error": refusal.text}, refusal.status, refusal.headers)
            except Full:
                full = busy(f"of the {self.settings.queue} images that may wait there is no room for yours")
                return _json({"error": full.text}, full.status, full.headers)
            except Exception as error:
                log_traceback(error)
                return _json({"error": "a bug in the server; its log has the traceback"}, 500)

        return safely

    async def _asked(self, request: Request, read: Callable[[bytes], Asked]) -> tuple[Asked, list[Answer]]:
        if self.model is None:
            raise busy("the model is being loaded")
        with self._room.held() as reserve:
            body = await read_body(request, reserve, self.settings.max_bytes)
            asked = await asyncio.get_running_loop().run_in_executor(self._parser, read, body)
            del body
            if asked.explain and not self.model.explains:
                raise Refused(400, "this export has no signature `explain`; export again with this version of kubetune")
            answers = await (self._explainer if asked.explain else self._classifier).ask(asked.pictures)
        for picture, answer in zip(asked.pictures, answers, strict=True):
            if isinstance(answer, Unreadable):
                raise Refused(400, f"{picture.name} cannot be decoded ({answer.reason})")
        return asked, answers

    async def predict(self, request: Request) -> Response:
        """The `top_k` most probable classes of each image, and where the model looked if that is asked."""
        kind, query = request.headers.get("content-type", ""), dict(request.query_params)
        asked, answers = await self._asked(request, lambda body: read_predict(body, kind, query, self.settings))
        predictions = []
        for picture, answer in zip(asked.pictures, answers, strict=True):
            best = np.argsort(-answer.probabilities, kind="stable")[: asked.top_k]
            classes = [{"class": self.export.classes[i], "probability": float(answer.probabilities[i])} for i in best]
            entry: dict[str, Any] = {"name": picture.name, "classes": classes}
            if answer.heatmap is not None:
                resize = (self.export.reference or {}).get("resize", "stretch")  # crop: the centre of the image alone
                entry["heatmap"] = {"png": _as_png(answer.heatmap), "resize": str(resize)}
            predictions.append(entry)
        return _json({"model": self.settings.name, "version": self.export.version, "predictions": predictions})

    async def instances(self, request: Request) -> Response:
        """The REST API of KServe and TensorFlow Serving: rows of probabilities."""
        self._known(request)
        explain = request.url.path.endswith(":explain")
        asked, answers = await self._asked(request, lambda body: read_instances(body, self.settings, explain))
        columns = {"probabilities": [answer.probabilities.tolist() for answer in answers]}
        if asked.explain:
            for name in ("embedding", "heatmap"):
                columns[name] = [getattr(answer, name).tolist() for answer in answers]
        if asked.columns:
            return _json({"outputs": columns if asked.explain else columns["probabilities"]})
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return _json({"predictions": rows if asked.explain else columns["probabilities"]})

    def _known(self, request: Request) -> None:
        name, version = request.path_params["name"], request.path_params.get("version", self.export.version)
        if name != self.settings.name:
            raise Refused(404, f"there is no model {name!a} here, only {self.settings.name}")
        if version != self.export.version:
            raise Refused(404, f"there is no version {version!a} here, only {self.export.version}")

    async def status(self, request: Request) -> Response:
        """The status of the model for KServe (`ready`) and TensorFlow Serving (`model_version_status`)."""
        self._known(request)
        state = "UNLOADING" if self.leaving else "AVAILABLE" if self.model else "LOADING"
        fine = {"error_code": "OK", "error_message": ""}
        body = {
            "name": self.settings.name,
            "ready": not self.not_ready(),
            "model_version_status": [{"version": self.export.version, "state": state, "status": fine}],
        }
        return _json(body, 503 if self.not_ready() else 200)

    async def models(self, _request: Request) -> Response:
        """The names of the models: one."""
        return _json({"models": [self.settings.name]})

    async def health(self, _request: Request) -> Response:
        """Liveness: 200 also while the model loads."""
        return _text("ok\n")

    async def readiness(self, _request: Request) -> Response:
        """Readiness: 503 while the model loads and once the server is leaving."""
        why = self.not_ready()
        return _text(f"{why or 'ready'}\n", 503 if why else 200)

    async def metrics(self, request: Request) -> Response:
        """The metrics in the format that Prometheus asks for."""
        self.observed.ready.set(not self.not_ready())
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, self.observed.registry)
        return Response(text, headers={"Content-Type": kind})

    async def home(self, request: Request) -> Response:
        """The page for people; KServe's liveness for others."""
        if "text/html" not in request.headers.get("accept", ""):
            return _json({"status": "alive"})
        if self.model is None:
            return Response(LOADING, 503, media_type="text/html", headers={"Retry-After": "2"})
        facts = {
            "name": self.settings.name,
            "version": self.export.version,
            "classes": len(self.export.classes),
            "max_bytes": self.settings.max_bytes,
            "explains": self.model.explains,
        }
        page = self._page.replace(b"{{facts}}", json.dumps(facts).encode())
        guards = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return Response(page, media_type="text/html", headers=guards)


def _route(path: str) -> str:
    """The label of a path in the metrics: one of a few, whatever is asked."""
    if path.startswith("/v1/models/"):
        verb = next((verb for verb in (":predict", ":explain") if path.endswith(verb)), "")
        return f"/v1/models/NAME{verb}"
    return path if path in ROUTES else "other"


def _as_png(heatmap: np.ndarray) -> str:
    """A heatmap, float32 [h, w] in 0..1, as a grey PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(heatmap, 0, 1) * 255).astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")  # ASCII: nothing can go wrong


def _text(body: str, status: int = 200) -> Response:
    return Response(body, status, media_type="text/plain")


def _no_route(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    here = " ".join([*ROUTES, "/v1/models/NAME", "/v1/models/NAME:predict"])
    text = f"here are {here}" if error.status_code == 404 else f"{error.detail.lower()}"
    return _json({"error": text}, error.status_code, dict(error.headers or {}))
