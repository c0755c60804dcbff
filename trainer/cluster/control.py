"""The other workers of a run: exchanging small things, noticing who is gone, failing together.

Beside TensorFlow's collectives every worker keeps one TCP connection to worker 0, the chief. Training never waits for
it; it carries scores, checkpoints on resume and the order to stop, and a beat every two seconds. A collective that
waits for a dead or frozen peer may wait for ever; the silence on this connection is what ends it.
"""

import contextlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trainer.arrays import pack, unpack
from trainer.cluster.discovery import Cluster
from trainer.errors import BUG, INTERRUPTED, ConfigError, TrainerError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import last_words

MAGIC = b"kubetune"  # distinguishes workers from whatever else answers (TensorFlow's own server, a web server)
HEADER = struct.Struct("!8sIQ")  # magic, bytes of JSON, bytes of payload
LONGEST_HEADER = 1 << 20
CHUNK = 1 << 20
HEARTBEAT_INTERVAL = 2.0
HEARTBEAT_TIMEOUT = 20.0
COMMIT_SECONDS = 5.0  # what a write that is under way is given before a lost peer ends the process


class ProtocolError(ConnectionError):
    """The other side is not a worker that waits for its peers."""


class Connection:
    """One connection to a peer. `send` may be called from any thread, `receive` from one.

    Attributes:
        heard: time.monotonic() of the last bytes that arrived.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket, self.heard = connected, time.monotonic()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()

    def send(self, kind: str, payload: bytes = b"", **facts: Any) -> None:
        """Send one message.

        Raises:
            OSError: the connection is gone.
        """
        header = json.dumps({"kind": kind, **facts}).encode()
        with self._sending:
            self.socket.sendall(HEADER.pack(MAGIC, len(header), len(payload)) + header)
            if payload:
                self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for one message: its header and its payload.

        Raises:
            ProtocolError: the other side speaks something else.
            OSError: the connection is gone, or its timeout has passed.
        """
        magic, length, payload = HEADER.unpack(self._exactly(HEADER.size))
        if magic != MAGIC or length > LONGEST_HEADER:
            raise ProtocolError("something else answers there")
        return json.loads(self._exactly(length)), self._exactly(payload)

    def _exactly(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = self.socket.recv(min(left, CHUNK))
            if not part:
                raise ConnectionError("closed")
            self.heard = time.monotonic()
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close; the peer sees the end at once."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class ControlChannel:
    """The connections of worker `cluster.index` to the others; with one worker every operation is immediate.

    Operations that gather, broadcast or compare must be called by all workers in the same order.

    Attributes:
        on_stop: called with the reason when another worker received a request to stop.
        on_end: called with (exit code, reason) before a lost or failed peer ends this process.
    """

    def __init__(self, cluster: Cluster, connections: dict[int, Connection]) -> None:
        self.cluster, self.sockets = cluster, connections
        self.index, self.size, self.is_chief = cluster.index, cluster.size, cluster.is_chief
        self.on_stop: Callable[[str], None] = lambda _reason: None
        self.on_end: Callable[[int, str], None] = lambda _code, _reason: None
        self._inbox: dict[int, queue.SimpleQueue[tuple[str, bytes]]] = {i: queue.SimpleQueue() for i in connections}
        self._left: set[int] = set()
        self._leaving = False
        self._alone = False
        self._ending = threading.Lock()
        self._committing = threading.Lock()
        for peer, connection in connections.items():
            connection.socket.settimeout(None)
            connection.heard = time.monotonic()
            threading.Thread(target=self._listen, args=(peer, connection), name=f"peer-{peer}", daemon=True).start()
        if connections:
            threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def gather(self, topic: str, payload: bytes) -> list[bytes] | None:
        """Every worker's bytes, by index, on the chief; None on the others."""
        if not self.is_chief:
            self._send(0, topic, payload)
            return None
        return [payload, *(self._next(peer, topic) for peer in sorted(self.sockets))]

    def broadcast_bytes(self, topic: str, payload: bytes = b"") -> bytes:
        """The chief's bytes on every worker."""
        if not self.is_chief:
            return self._next(0, topic)
        for peer in sorted(self.sockets):
            self._send(peer, topic, payload)
        return payload

    def broadcast(self, topic: str, make: Callable[[], Any]) -> Any:
        """The result of `make` on the chief (called there only), on every worker; plain JSON values."""
        if self.size == 1:
            return make()
        return json.loads(self.broadcast_bytes(topic, json.dumps(make()).encode() if self.is_chief else b""))

    def reduce(self, topic: str, value: Any, function: Callable[[list[Any]], Any]) -> Any:
        """On every worker, the result of `function` on the chief for the list of all workers' plain JSON values."""
        everyone = self.gather(topic, json.dumps(value).encode())
        return self.broadcast(topic, lambda: function([json.loads(one) for one in everyone or ()]))

    def broadcast_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The chief's arrays, by name, on every worker."""
        if self.size == 1:
            return arrays
        return unpack(self.broadcast_bytes(topic, pack(arrays) if self.is_chief else b""))

    def gather_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]] | None:
        """Every worker's arrays, by name, on the chief in the order of the workers; None on the others."""
        everyone = self.gather(topic, pack(arrays))
        return None if everyone is None else [unpack(content) for content in everyone]

    def require_equal(self, topic: str, facts: dict[str, Any]) -> None:
        """Check that all workers hold the same facts, {"name": plain JSON value}.

        Raises:
            ConfigError: they do not; names each difference and the workers.
        """
        lines = "\n".join(f"  {line}" for line in self.reduce(topic, facts, differences))
        if lines:
            raise ConfigError(
                f"the workers do not have the same {topic}; give all of them the same image and arguments:\n{lines}"
            )

    def any_worker(self, topic: str, here: bool) -> bool:
        """Whether `here` is true on any worker."""
        return self.reduce(topic, bool(here), any)

    def barrier(self, topic: str) -> None:
        """Wait until every worker is here."""
        self.gather(topic, b"")
        self.broadcast_bytes(topic)

    def _send(self, peer: int, topic: str, payload: bytes) -> None:
        try:
            self.sockets[peer].send("value", payload, topic=topic)
        except OSError as error:
            self._lost(peer, f"its connection broke ({error})")

    def _next(self, peer: int, topic: str) -> bytes:
        with health.waiting_for(f"worker {peer}"):
            received, payload = self._inbox[peer].get()
        assert received == topic, f"worker {peer} is at {received!r}, worker {self.index} at {topic!r}"
        return payload

    def broadcast_stop(self, reason: str) -> None:
        """Have the other workers stop as well."""
        self._spread("stop", reason=reason)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Around a write that should be finished, if it takes seconds, even when a peer is lost meanwhile."""
        with self._committing:
            yield

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """Around all of a worker's work: a failure of one ends all of them, with its exit code and its message."""
        try:
            yield
        except BaseException as error:
            if self.sockets and not self._leaving:
                self._leaving = True
                code, message = BUG, f"{type(error).__name__}: {error}"
                if isinstance(error, TrainerError):
                    code, message = error.exit_code, str(error)
                self._spread("failed", code=code, message=message, worker=self.index)
            raise

    def disconnect(self) -> None:
        """Announce the end of this worker, which then is no loss to the others."""
        self._leaving = True
        self._spread("left")

    def detach_workers(self) -> None:
        """On the chief, when it needs nothing more of the others: what becomes of them no longer matters to it."""
        self._alone = True

    def _spread(self, kind: str, **facts: Any) -> None:
        for peer, connection in self.sockets.items():
            if peer not in self._left:
                try:
                    connection.send(kind, **facts)
                except OSError:
                    continue  # `_listen` notices the end, `_beat` the silence

    def _listen(self, peer: int, connection: Connection) -> None:
        while True:
            try:
                header, payload = connection.receive()
            except (OSError, ValueError):
                self._lost(peer, "it ended without a word")
                return
            if header["kind"] == "value":
                self._inbox[peer].put((header["topic"], payload))
            elif header["kind"] == "stop" and not self._alone:
                if self.is_chief:
                    self._spread("stop", reason=header["reason"])
                self.on_stop(header["reason"])
            elif header["kind"] == "left":
                self._left.add(peer)
            elif header["kind"] == "failed":
                self._left.add(peer)
                if not self._alone:
                    self._end_as_peer(header["code"], header["message"], header["worker"], sender=peer)

    def _beat(self) -> None:
        while not self._leaving:
            time.sleep(HEARTBEAT_INTERVAL)
            self._spread("beat")
            for peer, connection in self.sockets.items():
                silence = time.monotonic() - connection.heard
                if silence > HEARTBEAT_TIMEOUT:
                    self._lost(peer, f"no word for {silence:.0f} s")

    def _lost(self, peer: int, how: str) -> None:
        if not (peer in self._left or self._leaving or self._alone):
            self.end(INTERRUPTED, f"lost worker {peer} ({self.cluster.addresses[peer]}): {how}")

    def _end_as_peer(self, code: int, message: str, worker: int, sender: int) -> None:
        """End because `worker` failed. Its bug is not ours: started again, the run may well go on."""
        if code == BUG:
            code, message = INTERRUPTED, f"worker {worker} ended with a bug ({message}); its log has the traceback"
        elif worker == sender:
            message = f"worker {worker}: {message}"
        self.end(code, message, worker)

    def end(self, code: int, message: str, worker: int | None = None) -> None:
        """End this process and the others, from any thread: the main one may hang in a collective for ever."""
        with self._ending:
            if self._leaving:
                return
            self._leaving = True
            self._spread("failed", code=code, message=message, worker=self.index if worker is None else worker)
            self._committing.acquire(timeout=COMMIT_SECONDS)
            word = "interrupted" if code == INTERRUPTED else "error"
            try:
                last_words(f"{word}: {message}")
                termination.leave(code, message)  # first: what follows writes to the run's disk, which may hang
                self.on_end(code, message)
                sys.stdout.flush()
            finally:
                os._exit(code)


def differences(everyone: list[dict[str, Any]]) -> list[str]:
    """The facts that differ between workers, one "name: value on worker 0, value on worker 1" a line."""
    lines = []
    for name in sorted({key for facts in everyone for key in facts}):
        values = [json.dumps(facts.get(name)) for facts in everyone]
        other = next((worker for worker, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            lines.append(f"{name}: {values[0]} on worker 0, {values[other]} on worker {other}")
    return lines
