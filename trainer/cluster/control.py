"""Control channel: a TCP connection from each worker to the chief for small messages, heartbeats and failures.

In addition to TensorFlow's collectives it carries scores, checkpoints on resume, stop requests, and a heartbeat every
two seconds. A collective may block forever on a dead or frozen peer; the heartbeat timeout ends the process then.
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

MAGIC = b"kubetune"  # distinguishes workers from other servers (TensorFlow's own, a web server)
HEADER = struct.Struct("!8sIQ")  # magic, bytes of JSON, bytes of payload
LONGEST_HEADER = 1 << 20
CHUNK = 1 << 20
HEARTBEAT_INTERVAL = 2.0
HEARTBEAT_TIMEOUT = 20.0
COMMIT_SECONDS = 5.0  # that a write in progress may take before a lost peer ends the process


class ProtocolError(ConnectionError):
    """The other side is not a worker in its rendezvous."""


class Connection:
    """One connection to a peer. `send` may be called from any thread, `receive` from one.

    Attributes:
        last_received: time.monotonic() of the last bytes that arrived.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket, self.last_received = connected, time.monotonic()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()

    def send(self, kind: str, payload: bytes = b"", **facts: Any) -> None:
        """Send one message. Raises OSError if the connection is closed."""
        header = json.dumps({"kind": kind, **facts}).encode()
        with self._sending:
            self.socket.sendall(HEADER.pack(MAGIC, len(header), len(payload)) + header)
            if payload:
                self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for one message: its header and its payload.

        Raises:
            ProtocolError: the other side uses another protocol.
            OSError: the connection is gone, or its timeout has passed.
        """
        magic, length, payload = HEADER.unpack(self._exactly(HEADER.size))
        if magic != MAGIC or length > LONGEST_HEADER:
            raise ProtocolError("the peer is not a worker")
        return json.loads(self._exactly(length)), self._exactly(payload)

    def _exactly(self, count: int) -> bytes:
        parts, left = [], count
        while left:
            part = self.socket.recv(min(left, CHUNK))
            if not part:
                raise ConnectionError("closed")
            self.last_received = time.monotonic()
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the connection at once, also for the peer."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class ControlChannel:
    """The connections of worker `cluster.index`; with one worker every operation returns at once.

    Collective operations (gather, broadcast, reduce, barrier) must be called by all workers in the same order.

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
            connection.last_received = time.monotonic()
            threading.Thread(target=self._listen, args=(peer, connection), name=f"peer-{peer}", daemon=True).start()
        if connections:
            threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

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
        """The result of `make`, which only the chief calls, on every worker; plain JSON values."""
        if self.size == 1:
            return make()
        return json.loads(self.broadcast_bytes(topic, json.dumps(make()).encode() if self.is_chief else b""))

    def reduce(self, topic: str, value: Any, function: Callable[[list[Any]], Any]) -> Any:
        """Apply `function`, on the chief, to the list of all workers' plain JSON values; the result on every worker."""
        gathered = self.gather(topic, json.dumps(value).encode())
        return self.broadcast(topic, lambda: function([json.loads(content) for content in gathered or ()]))

    def broadcast_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The chief's arrays, by name, on every worker."""
        if self.size == 1:
            return arrays
        return unpack(self.broadcast_bytes(topic, pack(arrays) if self.is_chief else b""))

    def gather_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]] | None:
        """Every worker's arrays, by name, on the chief in the order of the workers; None on the others."""
        gathered = self.gather(topic, pack(arrays))
        return None if gathered is None else [unpack(content) for content in gathered]

    def require_equal(self, topic: str, facts: dict[str, Any]) -> None:
        """Raise a ConfigError with the differences unless all workers have the same facts, plain JSON by name."""
        if lines := self.reduce(topic, facts, differences):
            problem = "\n".join([f"the workers do not have the same {topic}:", *(f"  {line}" for line in lines)])
            raise ConfigError(problem, fix="start all of them with the same image and arguments")

    def any_worker(self, topic: str, value: bool) -> bool:
        """Return whether `value` is true on any worker."""
        return self.reduce(topic, bool(value), any)

    def barrier(self, topic: str) -> None:
        """Wait until every worker calls this."""
        self.gather(topic, b"")
        self.broadcast_bytes(topic)

    def _send(self, peer: int, topic: str, payload: bytes) -> None:
        try:
            self.sockets[peer].send("value", payload, topic=topic)
        except OSError as error:
            self._lost(peer, f"connection broken ({error})")

    def _next(self, peer: int, topic: str) -> bytes:
        with health.waiting_for(f"worker {peer}"):
            received, payload = self._inbox[peer].get()
        assert received == topic, f"worker {peer} is at {received!r}, worker {self.index} at {topic!r}"
        return payload

    def broadcast_stop(self, reason: str) -> None:
        """Send a stop request to the other workers."""
        self._send_to_all("stop", reason=reason)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Let the write inside finish, within `COMMIT_SECONDS`, before a lost peer ends this process."""
        with self._committing:
            yield

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """End all workers if the block fails on one, with its exit code and message."""
        try:
            yield
        except BaseException as error:
            if self.sockets and not self._leaving:
                self._leaving = True
                code, message = BUG, f"{type(error).__name__}: {error}"
                if isinstance(error, TrainerError):
                    code, message = error.exit_code, str(error)
                self._send_to_all("failed", code=code, message=message, worker=self.index)
            raise

    def disconnect(self) -> None:
        """Announce the regular end of this worker to the others."""
        self._leaving = True
        self._send_to_all("left")

    def detach_workers(self) -> None:
        """Ignore the ends and failures of the other workers from now on; for the chief, when it needs them no more."""
        self._alone = True

    def _send_to_all(self, kind: str, **facts: Any) -> None:
        for peer, connection in self.sockets.items():
            if peer not in self._left:
                try:
                    connection.send(kind, **facts)
                except OSError:
                    continue  # `_listen` detects the end, `_send_heartbeats` the timeout

    def _listen(self, peer: int, connection: Connection) -> None:
        while True:
            try:
                header, payload = connection.receive()
            except (OSError, ValueError):
                self._lost(peer, "connection closed without notice")
                return
            if header["kind"] == "value":
                self._inbox[peer].put((header["topic"], payload))
            elif header["kind"] == "stop" and not self._alone:
                if self.is_chief:
                    self._send_to_all("stop", reason=header["reason"])
                self.on_stop(header["reason"])
            elif header["kind"] == "left":
                self._left.add(peer)
            elif header["kind"] == "failed":
                self._left.add(peer)
                if not self._alone:
                    self._end_as_peer(header["code"], header["message"], header["worker"], sender=peer)

    def _send_heartbeats(self) -> None:
        while not self._leaving:
            time.sleep(HEARTBEAT_INTERVAL)
            self._send_to_all("heartbeat")
            for peer, connection in self.sockets.items():
                age = time.monotonic() - connection.last_received
                if age > HEARTBEAT_TIMEOUT:
                    self._lost(peer, f"no heartbeat for {age:.0f} s")

    def _lost(self, peer: int, how: str) -> None:
        if not (peer in self._left or self._leaving or self._alone):
            self.end(INTERRUPTED, f"lost worker {peer} ({self.cluster.addresses[peer]}): {how}")

    def _end_as_peer(self, code: int, message: str, worker: int, sender: int) -> None:
        """End because `worker` failed; with 75 after a bug there, because a restart may succeed."""
        if code == BUG:
            code, message = INTERRUPTED, f"worker {worker} failed with a bug ({message}); its log has the traceback"
        elif worker == sender:
            message = f"worker {worker}: {message}"
        self.end(code, message, worker)

    def end(self, code: int, message: str, worker: int | None = None) -> None:
        """End this process and the others, from any thread: the main one may be blocked in a collective."""
        with self._ending:
            if self._leaving:
                return
            self._leaving = True
            self._send_to_all("failed", code=code, message=message, worker=self.index if worker is None else worker)
            self._committing.acquire(timeout=COMMIT_SECONDS)
            kind = "interrupted" if code == INTERRUPTED else "error"
            try:
                last_words(f"{kind}: {message}")
                termination.write(code, message)  # before `on_end`, which writes to the run's disk and may block
                self.on_end(code, message)
                sys.stdout.flush()
            finally:
                os._exit(code)


def differences(everyone: list[dict[str, Any]]) -> list[str]:
    """The facts that differ between workers, each as "name: value on worker 0, value on worker 1"."""
    lines = []
    for name in sorted({key for facts in everyone for key in facts}):
        values = [json.dumps(facts.get(name)) for facts in everyone]
        other = next((worker for worker, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            lines.append(f"{name}: {values[0]} on worker 0, {values[other]} on worker {other}")
    return lines
