"""The server process, which listens while the model is being loaded, and finishes accepted requests before it exits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.errors import INTERRUPTED, ConfigError, Interrupted, format_count
from trainer.monitoring.log import log, log_unbuffered
from trainer.serving.app import Service
from trainer.serving.export_files import Export
from trainer.serving.reload import follow_versions, load_first_version
from trainer.serving.settings import Settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

    LoadModel = Callable[[Export], ServedModel]

# For a request's head (request line and headers): from the connection, and for later requests from the first byte.
HEAD_TIMEOUT_SECONDS = 10.0
IDLE_TIMEOUT_SECONDS = 75.0  # until an idle connection is closed; longer than load balancers' usual 60 s
FIRST_REQUEST_TIMEOUT_SECONDS = 1.0  # for a connection's first request during the shutdown
MAX_BACKLOG = 1024  # maximum number of connections that the kernel queues until they are accepted
MAX_HEAD_BYTES = 32 * 1024  # maximum size of a request's head


class Connection(H11Protocol):
    """uvicorn's HTTP connection, with a timeout for each request's head, and a shutdown that loses no request."""

    _head_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_head_timeout(HEAD_TIMEOUT_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Pass data to uvicorn, and start or cancel the timeout for a request's head."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._head_timeout is None:
                self._set_head_timeout(HEAD_TIMEOUT_SECONDS)
        else:
            self._set_head_timeout(None)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep a half-closed connection open: a client that has sent its request may still wait for the response."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_head_timeout(None)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close the connection, but first wait for a request that may have arrived and has not been read yet."""
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self._head_timeout is not None):
            self._set_head_timeout(FIRST_REQUEST_TIMEOUT_SECONDS)
        else:
            super().shutdown()

    def _set_head_timeout(self, seconds: float | None) -> None:
        """Close the connection after `seconds`, which replaces an earlier timeout; None only cancels the timeout."""
        if self._head_timeout is not None:
            self._head_timeout.cancel()
        self._head_timeout = None if seconds is None else self.loop.call_later(seconds, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's server, without its signal handlers; before it exits, it serves the connections in the backlog."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept all connections in the backlog, then shut down as uvicorn does."""

        def new_connection() -> asyncio.Protocol:
            return Connection(self.config, self.server_state, self.lifespan.state)

        assert sockets
        listener = sockets[0].dup()  # closing the last descriptor would reset connections in the backlog
        listener.setblocking(False)
        for server in self.servers:
            server.close()
        with listener:
            while True:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    break
                accepted.setblocking(False)
                await asyncio.get_running_loop().connect_accepted_socket(new_connection, accepted)
        await super().shutdown(sockets)


class HttpService(Protocol):
    """A service that `run_service` can run: an ASGI application with its state."""

    settings: Any  # has the attributes host, linger (seconds) and drain (seconds)
    stopping: bool  # `run_service` sets this after a signal
    active: int  # number of requests in progress
    cancelled: int  # number of requests that were cancelled at the end of `drain`

    @property
    def loading(self) -> bool:
        """Whether the model is still being loaded. A signal then exits the process immediately."""

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request as an ASGI application."""

    def close(self) -> None:
        """Stop the tasks or threads of the service."""

    def close_log(self) -> None:
        """Write the rest of the prediction log. Called once, after `close`."""


AnyService = TypeVar("AnyService", bound=HttpService)


def serve(settings: Settings, export: Export, load_model: LoadModel) -> None:
    """Serve an export until SIGTERM or SIGINT is received and every accepted request has a response.

    A signal before the model is loaded, and a second signal, exit the process immediately with code 75.

    Args:
        settings: the server's settings.
        export: the version to load first.
        load_model: loads an export; called in a thread.

    Raises:
        ConfigError: the port is not available, or the prediction log cannot be written.
        DataError: no version of the model can be loaded.
        Interrupted: requests were still in progress `drain` seconds after the server had stopped accepting new ones.
    """

    with listen(settings.host, settings.port) as listener:
        log_suffix = f" while {export.folder} is loaded"
        run_service(lambda: Service(settings, export), listener, lambda service: _load(service, load_model), log_suffix)


def listen(host: str, port: int) -> socket.socket:
    """Open a server's listening socket. Raises ConfigError if the address or the port is not available."""
    dual_stack = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=MAX_BACKLOG, dualstack_ipv6=dual_stack)
    except OSError as error:
        problem, fix = f"cannot listen on host={host} ({error})", "free the port, or give another one"
        raise ConfigError(problem, key="port", value=port, fix=fix) from None


def run_service(
    make_service: Callable[[], AnyService],
    listener: socket.socket,
    background_task: Callable[[AnyService], Coroutine[Any, Any, None]],
    log_suffix: str = "",
) -> None:
    """Run a service until a signal stops it and all accepted requests have a response.

    Args:
        make_service: makes the service; called in the event loop.
        listener: the socket from `listen`.
        background_task: the service's background task, such as loading the model; an error in it stops the server.
        log_suffix: text after the server's address in the log line, such as " while the model is loaded".

    Raises:
        Interrupted: requests were still in progress `drain` seconds after the server had stopped accepting new ones.
        Exception: an error from `make_service`; or an error from `background_task`, after the server has stopped.
    """
    asyncio.run(_run_service(make_service, listener, background_task, log_suffix))


async def _run_service(
    make_service: Callable[[], AnyService],
    listener: socket.socket,
    background_task: Callable[[AnyService], Coroutine[Any, Any, None]],
    log_suffix: str,
) -> None:
    """Run a service, as `run_service` does, in an event loop."""
    service = make_service()
    settings = service.settings
    config = uvicorn.Config(
        service.app,
        interface="asgi3",  # uvicorn does not detect it for a bound method
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=MAX_BACKLOG,
        timeout_keep_alive=round(IDLE_TIMEOUT_SECONDS),
        timeout_graceful_shutdown=math.ceil(settings.drain),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    signals: list[str] = []  # names of the received signals

    def stop(received: signal.Signals) -> None:
        """Stop the server gracefully; exit if this is the second signal or the model is being loaded."""
        signals.append(received.name)
        if len(signals) > 1:
            log_unbuffered(f"\n{received.name}: exiting now with {service.active} requests in progress")
            os._exit(INTERRUPTED)
        service.stopping = True
        if service.loading:
            log_unbuffered(f"interrupted: {received.name} before the model was loaded; no request was lost")
            os._exit(INTERRUPTED)  # the thread that loads the model cannot be stopped
        log.info(f"{received.name}: accepting requests for another {settings.linger:g} s, then finishing them")
        loop.call_later(settings.linger, setattr, server, "should_exit", True)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    task = asyncio.create_task(background_task(service))

    def stop_after_error(task: asyncio.Task[None]) -> None:
        server.should_exit |= not task.cancelled() and task.exception() is not None

    task.add_done_callback(stop_after_error)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(f"listening on http://{host}:{port}/{log_suffix}")
    await server.serve(sockets=[listener])
    if task.done():
        task.result()  # raises the error from `background_task`, for example if the model cannot be loaded
    task.cancel()
    await asyncio.sleep(0.1)  # lets cancelled requests be counted
    service.close()
    await asyncio.to_thread(service.close_log)
    if count := service.cancelled + service.active:
        raise Interrupted(
            f"{format_count(count, 'request')} not finished", key="drain", value=settings.drain, fix="give more seconds"
        )
    log.info(f"{signals[0]}: every accepted request got its response")


async def _load(service: Service, load_model: LoadModel) -> None:
    """Load the model in a thread, while the server responds to probes, and then newer versions as they appear.

    Raises the same errors as `load_first_version`.
    """
    failed = await load_first_version(service, load_model)
    if service.settings.poll:
        await follow_versions(service, load_model, failed)
