"""The server process: listens before the model is loaded, and finishes accepted requests before it exits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.errors import INTERRUPTED, ConfigError, Interrupted
from trainer.monitoring.log import log, log_unbuffered
from trainer.serving.app import Service
from trainer.serving.export_files import Export
from trainer.serving.settings import Settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

    Load = Callable[[Export], ServedModel]

HEAD_SECONDS = 10.0  # time limit for the head of a request, from the connection or its first byte on
IDLE_SECONDS = 75.0  # time limit of an idle connection; longer than the usual 60 s of load balancers
FRESH_SECONDS = 1.0  # wait for the first request of a connection accepted just before the shutdown
BACKLOG = 1024
HEAD_BYTES = 32 * 1024


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for the head of a request, and a shutdown that loses no request."""

    _head_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._head_timeout is None:
                self._await_head(HEAD_SECONDS)
        elif self._head_timeout is not None:
            self._head_timeout.cancel()
            self._head_timeout = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """Support half-closed connections: a client that has sent its request may still wait for the response."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timeout is not None:
            self._head_timeout.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close; wait `FRESH_SECONDS` if a first request may already be in the buffers of the kernel."""
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self._head_timeout is not None):
            self._await_head(FRESH_SECONDS)
        else:
            super().shutdown()

    def _await_head(self, seconds: float) -> None:
        if self._head_timeout is not None:
            self._head_timeout.cancel()
        self._head_timeout = self.loop.call_later(seconds, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers; serves all connections that the kernel has accepted."""

    listener: socket.socket

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        def connection() -> asyncio.Protocol:
            return Connection(self.config, self.server_state, self.lifespan.state)

        listener = self.listener.dup()  # closing the last descriptor would reset connections in the backlog
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
                await asyncio.get_running_loop().connect_accepted_socket(connection, accepted)
        await super().shutdown(sockets)


def serve(settings: Settings, export: Export, load: Load) -> None:
    """Serve until a signal is received and every accepted request is answered.

    Raises:
        ConfigError: the port is not available.
        DataError: the model cannot be loaded.
        Interrupted: requests were not answered within `drain`.
    """
    host, port = settings.host, settings.port
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on host={host} ({error})", key="port", value=port, fix="free the port, or give another one"
        ) from None
    with listener:
        asyncio.run(_serve(settings, export, load, listener))


async def _serve(settings: Settings, export: Export, load: Load, listener: socket.socket) -> None:
    service = Service(settings, export)
    server = Server(
        uvicorn.Config(
            service.app,
            interface="asgi3",  # not detected for a bound method
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=round(IDLE_SECONDS),
            timeout_graceful_shutdown=math.ceil(settings.drain),
            h11_max_incomplete_event_size=HEAD_BYTES,
        )
    )
    server.listener = listener
    loop = asyncio.get_running_loop()
    signals: list[str] = []

    def stop(number: signal.Signals) -> None:
        signals.append(number.name)
        if len(signals) > 1:
            log_unbuffered(f"\n{number.name}: exiting now with {service.active} requests in progress")
            os._exit(INTERRUPTED)
        service.stopping = True
        if service.model is None:
            log_unbuffered(f"interrupted: {number.name} before the model was loaded; no request was lost")
            os._exit(INTERRUPTED)  # the loading thread cannot be stopped
        log.info(f"{number.name}: accepting requests for another {settings.linger:g} s, then finishing them")
        loop.call_later(settings.linger, setattr, server, "should_exit", True)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    batching = service.start_batching()
    loading = asyncio.create_task(_load(service, server, load))
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(f"listening on http://{host}:{port}/ while {export.folder} is loaded")
    await server.serve(sockets=[listener])
    for task in (loading, *batching):
        task.cancel()
    if loading.done():
        loading.result()  # raises the error of the load
    await asyncio.sleep(0.1)  # cancelled requests are counted
    if lost := service.lost + service.active:
        raise Interrupted(f"{lost} requests not answered", key="drain", value=settings.drain, fix="give more seconds")
    log.info(f"{signals[0]}: every accepted request was answered")


async def _load(service: Service, server: Server, load: Load) -> None:
    """Load the model in a thread, so that /healthz responds meanwhile; an error stops the server."""
    try:
        model = await asyncio.to_thread(load, service.export)
        sizes = await asyncio.to_thread(model.warm_up, service.settings.batch)
    except Exception:
        server.should_exit = True
        raise
    service.model = model
    log.info(f"ready: {len(service.export.classes)} classes, warm for batches of {', '.join(map(str, sizes))}")
