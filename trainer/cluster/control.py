"""Control channel: a TCP connection from each worker to the chief, next to TensorFlow's collectives.

It carries values that must be equal on all workers (scores, plans, the checkpoint of a resumed run), stop requests,
failures, and a heartbeat every two seconds. A TensorFlow collective can block forever on a dead or frozen peer, so a
worker that loses a peer ends its own process.
"""

import contextlib
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.cluster.discovery import Cluster
from trainer.cluster.protocol import MAGIC, PREFIX, translate_peer_failure
from trainer.errors import BUG, INTERRUPTED, ConfigError, TrainerError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import exit_at_once, log_unbuffered
from trainer.storage.arrays import pack, unpack

MAX_HEADER_BYTES = 1 << 20  # a longer header is not from a worker; it is rejected before it is read
MAX_RECV_BYTES = 1 << 20  # maximum number of bytes per `recv` call
HEARTBEAT_INTERVAL_SECONDS = 2.0
HEARTBEAT_TIMEOUT_SECONDS = 20.0  # a peer from which no bytes arrive for this time is lost; ten missed heartbeats
COMMIT_TIMEOUT_SECONDS = 5.0  # maximum time that `ControlChannel.end` waits for a write in `ControlChannel.committing`


class ProtocolError(ConnectionError):
    """The peer is not a worker: the bytes that it sends do not follow the workers' protocol."""


class Connection:
    """A connection to a peer. Any thread may call `send`; only one thread may call `receive`."""

    def __init__(self, connected_socket: socket.socket) -> None:
        self.socket = connected_socket
        self.last_received = time.monotonic()  # when bytes last arrived
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send_lock = threading.Lock()

    def send(self, kind: str, payload: bytes = b"", **fields: Any) -> None:
        """Send a message with JSON values as header fields. Raises OSError if the connection is broken or timed out."""
        header = json.dumps({"kind": kind, **fields}).encode()
        with self._send_lock:
            self.socket.sendall(PREFIX.pack(MAGIC, len(header), len(payload)) + header)
            if payload:
                self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for one message, and return its header, which has the key "kind", and its payload.

        Raises ProtocolError if the peer is not a worker, another OSError if the connection is closed, broken or timed
        out, and ValueError if the header is not valid JSON.
        """
        magic, header_bytes, payload_bytes = PREFIX.unpack(self.receive_exactly(PREFIX.size))
        if magic != MAGIC or header_bytes > MAX_HEADER_BYTES:
            raise ProtocolError("the peer is not a worker")
        return json.loads(self.receive_exactly(header_bytes)), self.receive_exactly(payload_bytes)

    def receive_exactly(self, count: int) -> bytes:
        """Wait for `count` bytes. Raises OSError if the connection is closed, broken or timed out."""
        chunks = []
        missing = count
        while missing:
            chunk = self.socket.recv(min(missing, MAX_RECV_BYTES))
            if not chunk:
                raise ConnectionError("the peer closed the connection")
            self.last_received = time.monotonic()
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """Close the connection in both directions without waiting."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class ControlChannel:
    """This worker's connections for collective operations, stop requests and failures.

    The chief is connected to all other workers, and every other worker only to the chief. A single worker has no
    connections: the operations return its own values. All workers must call the collective operations (gather,
    broadcast, reduce, barrier, and the methods built on them) in the same order. `topic` names an operation; if a
    worker receives a value for a different topic than its own, it fails with an AssertionError.

    If a peer fails or is lost while a collective operation waits for it, the operation does not raise an exception:
    `end` exits the process.
    """

    def __init__(self, cluster: Cluster, connections: dict[int, Connection]) -> None:
        self.cluster, self.connections = cluster, connections
        self.index, self.size, self.is_chief = cluster.index, cluster.size, cluster.is_chief
        self.on_stop: Callable[[str], None] = lambda _reason: None  # called with the reason of a peer's stop request
        self.on_end: Callable[[int, str], None] = lambda _code, _reason: None  # called by `end`, right before the exit
        # Received values of collective operations by peer, as (topic, payload).
        self._inbox: dict[int, queue.SimpleQueue[tuple[str, bytes]]] = {i: queue.SimpleQueue() for i in connections}
        self._departed_peers: set[int] = set()  # peers that have announced their end or failure
        self._shutting_down = False  # this worker has disconnected or failed
        self._ignore_peers = False
        self._end_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        for peer, connection in connections.items():
            connection.socket.settimeout(None)
            connection.last_received = time.monotonic()
            threading.Thread(target=self._listen, args=(peer, connection), name=f"peer-{peer}", daemon=True).start()
        if connections:
            threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def gather(self, topic: str, payload: bytes) -> list[bytes] | None:
        """Send `payload` to the chief. Returns the payloads of all workers, in index order, on the chief; else None."""
        if not self.is_chief:
            self._send(0, topic, payload)
            return None
        return [payload, *(self._receive(peer, topic) for peer in sorted(self.connections))]

    def broadcast_bytes(self, topic: str, payload: bytes = b"") -> bytes:
        """Return the chief's `payload` on every worker; the other workers' `payload` is ignored."""
        if not self.is_chief:
            return self._receive(0, topic)
        for peer in sorted(self.connections):
            self._send(peer, topic, payload)
        return payload

    def broadcast(self, topic: str, make: Callable[[], Any]) -> Any:
        """Call `make` on the chief only, and return its result, a JSON value, on every worker.

        An exception in `make` is raised on the chief only; the other workers wait until the chief reports its failure.
        """
        if self.size == 1:
            return make()
        return json.loads(self.broadcast_bytes(topic, json.dumps(make()).encode() if self.is_chief else b""))

    def reduce(self, topic: str, value: Any, function: Callable[[list[Any]], Any]) -> Any:
        """Return `function(values)` on every worker, where `values` lists each worker's `value` in index order.

        `value` and the result of `function` must be JSON values. `function` is called on the chief only.
        """
        gathered = self.gather(topic, json.dumps(value).encode())
        return self.broadcast(topic, lambda: function([json.loads(content) for content in gathered or ()]))

    def broadcast_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the chief's named arrays on every worker; the other workers' `arrays` is ignored."""
        if self.size == 1:
            return arrays
        return unpack(self.broadcast_bytes(topic, pack(arrays) if self.is_chief else b""))

    def gather_arrays(self, topic: str, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]] | None:
        """Send named arrays to the chief. Returns all workers' arrays, in index order, on the chief; else None."""
        gathered = self.gather(topic, pack(arrays))
        return None if gathered is None else [unpack(content) for content in gathered]

    def require_equal(self, topic: str, values: dict[str, Any]) -> None:
        """Raise ConfigError on all workers, with a list of the differences, unless all pass the same named values.

        `topic` is the plural noun in the message, such as "devices"; `values` are JSON values by name.
        """
        if differences := self.reduce(topic, values, list_differences):
            problem = "\n".join([f"the workers do not have the same {topic}:", *(f"  {line}" for line in differences)])
            raise ConfigError(problem, fix="start all of them with the same image and arguments")

    def any_worker(self, topic: str, value: bool) -> bool:
        """Return whether `value` is true on any worker."""
        return self.reduce(topic, bool(value), any)

    def barrier(self, topic: str) -> None:
        """Wait until every worker has called `barrier`."""
        self.gather(topic, b"")
        self.broadcast_bytes(topic)

    def _send(self, peer: int, topic: str, payload: bytes) -> None:
        try:
            self.connections[peer].send("value", payload, topic=topic)
        except OSError as error:
            self._end_unless_expected(peer, f"connection broken ({error})")

    def _receive(self, peer: int, topic: str) -> bytes:
        with health.waiting_for(f"worker {peer}"):
            peer_topic, payload = self._inbox[peer].get()
        assert peer_topic == topic, f"worker {peer} is at {peer_topic!r}, worker {self.index} at {topic!r}"
        return payload

    def broadcast_stop(self, reason: str) -> None:
        """Send a stop request to all other workers; their `on_stop` is called with `reason`."""
        self._send_to_all("stop", reason=reason)

    def committing(self) -> contextlib.AbstractContextManager[bool]:
        """Return a context manager for a write, such as a checkpoint's commit, that `end` should not interrupt.

        Before `end` exits the process, it waits up to `COMMIT_TIMEOUT_SECONDS` until the block has ended.
        """
        return self._commit_lock

    @contextlib.contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """Report an exception in the block to the other workers, and re-raise it.

        The other workers log the exception's message and exit with its exit code, or with 75 if it is a bug. A worker
        reports only to the chief, which forwards the report to the others.
        """
        try:
            yield
        except BaseException as error:
            if self.connections and not self._shutting_down:
                self._shutting_down = True
                health.on_change()
                code, message = BUG, f"{type(error).__name__}: {error}"
                if isinstance(error, TrainerError):
                    code, message = error.exit_code, str(error)
                self._send_to_all("failed", code=code, message=message, worker=self.index)
            raise

    def disconnect(self) -> None:
        """Announce this worker's planned end, so that its peers do not fail when its connections close.

        Afterwards this worker ignores lost peers, and `end` does nothing.
        """
        self._shutting_down = True
        health.on_change()
        self._send_to_all("left")

    def ignore_peer_failures(self) -> None:
        """Ignore lost peers, peers' failures, and peers' stop requests from now on.

        The chief calls this after scoring, when it exports and writes the report without the other workers.
        """
        self._ignore_peers = True
        health.on_change()

    def list_watched_peers(self) -> list[int]:
        """Return the indices of the peers whose loss or failure ends this process."""
        return [] if self._shutting_down or self._ignore_peers else sorted({*self.connections} - self._departed_peers)

    def _send_to_all(self, kind: str, **fields: Any) -> None:
        """Send a message to all connected peers that have not announced their end; ignore broken connections."""
        for peer, connection in self.connections.items():
            # `_listen` detects a closed connection, `_send_heartbeats` a timeout.
            with contextlib.suppress(OSError):
                if peer not in self._departed_peers:
                    connection.send(kind, **fields)

    def _listen(self, peer: int, connection: Connection) -> None:
        """Receive the messages of a peer until its connection closes. Runs in a thread per peer."""
        while True:
            try:
                header, payload = connection.receive()
            except (OSError, ValueError):
                self._end_unless_expected(peer, "connection closed without notice")
                return
            if header["kind"] == "value":
                self._inbox[peer].put((header["topic"], payload))
            elif header["kind"] == "stop" and not self._ignore_peers:
                if self.is_chief:
                    self._send_to_all("stop", reason=header["reason"])
                self.on_stop(header["reason"])
            elif header["kind"] in ("left", "failed"):
                self._departed_peers.add(peer)
                health.on_change()
                if header["kind"] == "failed" and not self._ignore_peers:
                    code, message = translate_peer_failure(
                        header["code"], header["message"], header["worker"], sender=peer
                    )
                    self.end(code, message, header["worker"])

    def _send_heartbeats(self) -> None:
        """Send heartbeats, and end this process if a peer's heartbeats are missing. Runs in a thread."""
        while not self._shutting_down:
            time.sleep(HEARTBEAT_INTERVAL_SECONDS)
            self._send_to_all("heartbeat")
            for peer, connection in self.connections.items():
                if (age := time.monotonic() - connection.last_received) > HEARTBEAT_TIMEOUT_SECONDS:
                    self._end_unless_expected(peer, f"no heartbeat for {age:.0f} s")

    def _end_unless_expected(self, peer: int, cause: str) -> None:
        if not (peer in self._departed_peers or self._shutting_down or self._ignore_peers):
            self.end(INTERRUPTED, f"lost worker {peer} ({self.cluster.addresses[peer]}): {cause}")

    def end(self, code: int, message: str, worker: int | None = None) -> None:
        """End this process and its peers after a failure.

        Any thread may call this, because the main thread can be blocked in a collective. The call returns only if this
        worker has already disconnected or failed; then it does nothing.

        Args:
            code: exit code of this process, which is also sent to the peers.
            message: the problem, for the log, the termination message and `on_end`; it is also sent to the peers.
            worker: index of the worker that failed; defaults to this worker.
        """
        with self._end_lock:
            if self._shutting_down:
                return
            self._shutting_down = True
            self._send_to_all("failed", code=code, message=message, worker=self.index if worker is None else worker)
            self._commit_lock.acquire(timeout=COMMIT_TIMEOUT_SECONDS)
            kind = "interrupted" if code == INTERRUPTED else "error"
            try:
                with contextlib.suppress(OSError):  # stderr may be on a full disk
                    log_unbuffered(f"{kind}: {message}")
                termination.write(code, message)  # before `on_end`, which writes to the run's disk and can block
                self.on_end(code, message)
                sys.stdout.flush()
            finally:
                exit_at_once(code)


def list_differences(by_worker: list[dict[str, Any]]) -> list[str]:
    """Describe the values that differ between workers, one line per name: "NAME: V on worker 0, W on worker N".

    Args:
        by_worker: each worker's JSON values by name, in index order. A missing value counts as null.

    Returns:
        Lines sorted by name. N is the first worker whose value differs from worker 0's value.
    """
    lines = []
    for name in sorted({name for values in by_worker for name in values}):
        values = [json.dumps(named_values.get(name)) for named_values in by_worker]
        worker = next((index for index, value in enumerate(values) if value != values[0]), None)
        if worker is not None:
            lines.append(f"{name}: {values[0]} on worker 0, {values[worker]} on worker {worker}")
    return lines
