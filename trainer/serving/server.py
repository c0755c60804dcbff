"""The server process: it listens before the model is loaded, and stops listening before it ends."""

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
from trainer.monitoring.log import last_words, log
from trainer.serving.app import Service
from trainer.serving.export_files import Export
from trainer.serving.settings import Settings

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

HEAD_SECONDS = 10.0  # for the head of a request, from the connection or its first byte on
IDLE_SECONDS = 75.0  # a connection without a request; longer than the 60 s of usual load balancers
FRESH_SECONDS = 1.0  # for the first request of a connection that was accepted right before the end
BACKLOG = 1024
HEAD_BYTES = 32 * 1024


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for the head of a request, and a shutdown that drops none already sent.

    `_slow` runs while a head has begun and is not whole, and closes the connection.
    """

    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            if self._slow is None:
                self._await_head(HEAD_SECONDS)
        elif self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has sent all may still listen; asyncio would close on both sides."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._slow is not None:
            self._slow.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close, but wait a moment for a first request that may already be in the kernel."""
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self._slow is not None):
            self._await_head(FRESH_SECONDS)
        else:
            super().shutdown()

    def _await_head(self, seconds: float) -> None:
        if self._slow is not None:
            self._slow.cancel()
        self._slow = self.loop.call_later(seconds, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's server; the signals are ours, and a connection that the kernel has accepted is served."""

    listener: socket.socket

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        def connection() -> asyncio.Protocol:
            return Connection(self.config, self.server_state, self.lifespan.state)

        held = self.listener.dup()  # so that closing it does not reset who is between the kernel and us
        held.setblocking(False)
        for server in self.servers:
            server.close()
        while True:
            try:
                accepted, _ = held.accept()
            except OSError:
                break
            accepted.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(connection, accepted)
        held.close()
        await super().shutdown(sockets)


def serve(settings: Settings, export: Export, load: Callable[[Export], ServedModel]) -> None:
    """Answer until a signal comes, and then until all is answered.

    Raises:
        ConfigError: the port cannot be had.
        DataError: the model cannot be loaded.
        Interrupted: answers were still missing when `drain` was over.
    """
    host, port = settings.host, settings.port
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"host={host} port={port} cannot be served ({error.strerror or error}); end what holds the port, or give "
            "another one"
        ) from None
    with listener:
        asyncio.run(_serve(settings, export, load, listener))


async def _serve(
    settings: Settings, export: Export, load: Callable[[Export], ServedModel], listener: socket.socket
) -> None:
    service = Service(settings, export)
    server = Server(
        uvicorn.Config(
            service.app,
            interface="asgi3",  # a bound method is not recognised
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
            last_words(f"\n{number.name}: stopping at once; {_requests(service.active)} not answered")
            os._exit(INTERRUPTED)
        service.leaving = True
        if service.model is None:
            last_words(f"interrupted: {number.name} before the model was loaded; nothing is lost")
            os._exit(INTERRUPTED)  # the thread that loads cannot be stopped
        log.info(f"{number.name}: taking requests for {settings.linger:g} s more, then answering what is left")
        loop.call_later(settings.linger, setattr, server, "should_exit", True)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    workers = service.workers()
    loading = asyncio.create_task(_load(service, server, load))
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(f"listening on http://{host}:{port}/ while {export.folder} is loaded")
    await server.serve(sockets=[listener])
    for task in (loading, *workers):
        task.cancel()
    if loading.done():
        loading.result()  # raises what kept the model from being loaded
    await asyncio.sleep(0.1)  # for what was cut off to be counted
    if lost := service.lost + service.active:
        raise Interrupted(f"{_requests(lost)} not answered within drain={settings.drain:g} s")
    log.info(f"{signals[0]}: every request that was taken is answered")


def _requests(count: int) -> str:
    return f"{count} request was" if count == 1 else f"{count} requests were"


async def _load(service: Service, server: Server, load: Callable[[Export], ServedModel]) -> None:
    """Load the model in a thread, so that /healthz answers meanwhile; a failure ends the server."""

    def load_and_warm_up() -> tuple[ServedModel, list[int]]:
        model = load(service.export)
        return model, model.warm_up(service.settings.batch)

    try:
        service.model, sizes = await asyncio.to_thread(load_and_warm_up)
    except Exception:
        server.should_exit = True
        raise
    log.info(f"ready: {len(service.export.classes)} classes, warm for batches of {', '.join(map(str, sizes))}")
