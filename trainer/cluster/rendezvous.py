"""Rendezvous before TensorFlow starts: all workers connect, or log which ones are missing and why.

TensorFlow itself waits for absent peers forever, without a message. Here each worker listens on its port, and workers
1, 2, ... connect to the chief, worker 0. These connections become the `ControlChannel`. Then each worker connects once
to the port of every other worker, because the collectives need all these routes, and frees its own port for TensorFlow.
"""

import contextlib
import itertools
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.cluster.authentication import WrongTokenError, accept_peer, contact_peer
from trainer.cluster.control import Connection, ControlChannel, ProtocolError
from trainer.cluster.discovery import Cluster
from trainer.errors import ConfigError, Interrupted

REPORT_INTERVAL_SECONDS = 5.0  # between log lines that list the missing workers
RESPONSE_TIMEOUT_SECONDS = 5.0  # to open a connection, and for each read and write until the control channel uses it
# Timeout of a connection to this worker's own address; short, since usually no other process responds there.
SELF_CHECK_TIMEOUT_SECONDS = 1.0
REACH_TIMEOUT_SECONDS = 30.0  # to connect to another worker's port, with retries

RETRY = "start all workers again"  # the fix of most errors


def rendezvous(
    cluster: Cluster, timeout: float, log_message: Callable[[str], None], check_cancelled: Callable[[], None]
) -> ControlChannel:
    """Connect all workers, and log every few seconds which workers are missing and why.

    Args:
        timeout: seconds until all workers must be connected.
        log_message: logs a line.
        check_cancelled: called at least every few seconds; raises an exception to cancel, such as after a signal.

    Raises:
        Interrupted: a worker is missing after `timeout`, another process uses this worker's port, or a worker cannot
            reach another worker. A restart may succeed.
        ConfigError: the chief rejects this worker, because its Job, number of workers or addresses differ, or another
            process has the same index.
    """
    if cluster.size == 1:
        return ControlChannel(cluster, {})
    log_message(f"workers: this is {cluster.index} of {cluster.size} ({cluster.source}); waiting for the others")
    with _Rendezvous(cluster, time.monotonic() + timeout, log_message, check_cancelled) as server:
        control = ControlChannel(cluster, server.await_all() if cluster.is_chief else server.join())
        with control.propagate_failures():
            _require_all_reachable(cluster, control)
    log_message(f"workers: all {cluster.size} are connected")
    return control


@dataclass
class _Rendezvous(contextlib.AbstractContextManager["_Rendezvous"]):
    """A server on this worker's port, until TensorFlow uses the port.

    The server responds with this worker's Job and index. On the chief, it also accepts the other workers.
    """

    cluster: Cluster
    deadline: float  # `time.monotonic()` at which all workers must be connected
    log_message: Callable[[str], None]
    check_cancelled: Callable[[], None]

    def __post_init__(self) -> None:
        self.connections: dict[int, Connection] = {}  # on the chief: to the workers that have joined, by index
        self._reported: set[str] = set()  # lines that `_log_once` has logged
        self._process = uuid.uuid4().hex  # distinguishes this process from another process with the same Job and index
        self._changed = threading.Condition()
        self._socket = self._bind(int(self.cluster.addresses[self.cluster.index].rpartition(":")[2]))
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `shutdown` wakes the thread that accepts connections
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bind(self, port: int) -> socket.socket:
        """Listen on this worker's port; if it is in use, wait until it is free, at most until the deadline."""
        is_logged = False
        while True:
            try:
                dual_stack = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if dual_stack else socket.AF_INET
                return socket.create_server(("", port), family=family, dualstack_ipv6=dual_stack, backlog=1024)
            except OSError as error:
                self.check_cancelled()
                self._require_unique_index()
                if time.monotonic() > self.deadline:
                    problem = f"port {port} of this worker is in use by another process ({error.strerror})"
                    raise Interrupted(problem, fix="end that process, or set another WORKER_PORT") from None
                if not is_logged:
                    self.log_message(f"workers: port {port} is in use by another process; waiting until it is free")
                is_logged = True
                time.sleep(0.5)

    def _require_unique_index(self) -> None:
        """Raise ConfigError if another process with the same Job and index responds at this worker's address."""
        cluster, address = self.cluster, self.cluster.addresses[self.cluster.index]
        header: dict[str, Any] = {}
        with (
            contextlib.suppress(OSError, ValueError),
            contextlib.closing(_connect(address, cluster.token, SELF_CHECK_TIMEOUT_SECONDS)) as peer,
        ):
            peer.send("who")
            header, _ = peer.receive()
        same_worker = (header.get("job"), header.get("index")) == (cluster.job, cluster.index)
        if not same_worker or header["process"] == self._process:
            return
        key = "TF_CONFIG" if cluster.source == "TF_CONFIG" else "JOB_COMPLETION_INDEX"
        problem = f"two processes have the index of worker {cluster.index}: another one responds at {address}"
        fix = "give every process its own index; if the other one is an earlier start, wait until it has ended"
        raise ConfigError(problem, key=key, fix=fix)

    def _accept(self) -> None:
        """Accept connections, and respond to each in a separate thread, until the socket is closed."""
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:  # closed by `__exit__`
                return
            threading.Thread(target=self._respond, args=(connection, address), daemon=True).start()

    def _log_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.log_message(text)

    def _respond(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        """Authenticate a peer, and respond to its request: "join" (accept the peer) or "who" (identify this worker)."""
        peer = Connection(connection)
        connection.settimeout(RESPONSE_TIMEOUT_SECONDS)
        has_joined = False
        with contextlib.suppress(OSError, ValueError, KeyError):
            try:
                accept_peer(peer, self.cluster.token)
            except WrongTokenError as error:
                self._log_once(f"workers: {address[0]} connected to this worker: {error}; ignored")
                raise
            header, _ = peer.receive()
            if header["kind"] != "join":
                peer.send("identity", job=self.cluster.job, index=self.cluster.index, process=self._process)
            elif reason := self._check_join(header):
                peer.send("refused", reason=reason)
            else:
                has_joined = True
        if not has_joined:
            return peer.close()
        connection.setblocking(False)  # for `_remove_closed`
        with self._changed:
            if previous := self.connections.pop(header["index"], None):  # broken, or the process has restarted
                previous.close()
            self.connections[header["index"]] = peer
            self._changed.notify_all()

    def _check_join(self, header: dict[str, Any]) -> str | None:
        """Return the reason to reject a request to join; None if it is accepted."""
        cluster = self.cluster
        if not cluster.is_chief:
            problem = "the workers have different lists of addresses"
            return f"worker {cluster.index} is at the address of worker 0; {problem}"
        if (header["job"], header["size"]) != (cluster.job, cluster.size):
            return f"this is {cluster.job} with {cluster.size} workers, not {header['job']} with {header['size']}"
        if not 0 < header["index"] < cluster.size:
            return f"worker {header['index']} is not one of 1..{cluster.size - 1}"
        return None

    def await_all(self) -> dict[int, Connection]:
        """Wait until all other workers are connected, send them "go", and return the connections by index.

        Every few seconds, the chief and all connected workers log which workers are missing. Raises Interrupted if
        workers are missing at the deadline.
        """
        next_report = time.monotonic() + REPORT_INTERVAL_SECONDS / 2
        while True:
            with self._changed:
                self._remove_closed()
                missing = [i for i in range(1, self.cluster.size) if i not in self.connections]
                if not missing:
                    break
                self._changed.wait(0.2)
            self.check_cancelled()
            now = time.monotonic()
            if now > next_report or now > self.deadline:
                description = ", ".join(_describe_missing(self.cluster.addresses[i], i) for i in missing[:5])
                description += f", and {len(missing) - 5} more" if len(missing) > 5 else ""
                problem = f"{len(missing)} of {self.cluster.size} workers are missing: {description}"
                self._send_to_all("waiting", text=problem, over=now > self.deadline)
                if now > self.deadline:
                    raise Interrupted(problem, key="runtime.start_timeout", fix=RETRY)
                self._require_unique_index()
                self.log_message(f"workers: {problem}")
                next_report = now + REPORT_INTERVAL_SECONDS
        self._send_to_all("go")
        return dict(self.connections)

    def _send_to_all(self, kind: str, **fields: Any) -> None:
        for peer in list(self.connections.values()):
            with contextlib.suppress(OSError):  # `ControlChannel` detects a closed connection
                peer.send(kind, **fields)

    def _remove_closed(self) -> None:
        """Remove the connections to workers that have closed them."""
        for index, peer in list(self.connections.items()):
            try:
                closed = peer.socket.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                peer.close()
                del self.connections[index]

    def join(self) -> dict[int, Connection]:
        """Connect to the chief, wait until all other workers are also connected, and return {0: connection}."""
        next_report = time.monotonic() + REPORT_INTERVAL_SECONDS / 2
        cluster, address = self.cluster, self.cluster.addresses[0]
        while True:
            self.check_cancelled()
            self._require_unique_index()  # in every round, since the chief drops this connection if a duplicate joins
            try:
                peer = _connect(address, cluster.token)
                try:
                    peer.send("join", job=cluster.job, index=cluster.index, size=cluster.size)
                    return {0: self._await_start(peer)}
                except BaseException:
                    peer.close()
                    raise
            except ProtocolError:
                reason = "another server uses its port; it might be training already, without this worker"
            except WrongTokenError as error:
                reason = f"{error}; it is of another Job, perhaps one that was deleted"
            except socket.gaierror:
                reason = "the name does not resolve yet"
            except OSError as error:
                reason = f"no response ({error.strerror or error})"
            problem, now = f"worker 0 ({address}) is missing: {reason}", time.monotonic()
            if now > self.deadline:
                raise Interrupted(problem, key="runtime.start_timeout", fix=RETRY)
            if now > next_report:
                self.log_message(f"workers: {problem}")
                next_report = now + REPORT_INTERVAL_SECONDS
            time.sleep(0.3)

    def _await_start(self, peer: Connection) -> Connection:
        """Wait until the chief, `peer`, sends "go", and return `peer`; until then, log which workers are missing.

        Raises ConfigError if the chief rejects this worker, Interrupted if workers are missing at the deadline or the
        chief stops responding, and OSError if the connection is closed.
        """
        while True:
            self.check_cancelled()
            if not select.select([peer.socket], [], [], 0.5)[0]:
                if time.monotonic() > self.deadline + RESPONSE_TIMEOUT_SECONDS:
                    raise Interrupted("worker 0 stopped responding in the rendezvous", fix=RETRY)
                continue
            if not peer.socket.recv(1, socket.MSG_PEEK):
                raise ConnectionError("worker 0 closed the connection")
            header, _ = peer.receive()
            if header["kind"] == "waiting":
                if header["over"]:
                    raise Interrupted(header["text"], key="runtime.start_timeout", fix=RETRY)
                self.log_message(f"workers: {header['text']}")
            elif header["kind"] == "refused":
                fix = "start all workers with the same image and environment variables"
                raise ConfigError(f"worker 0 rejects this worker: {header['reason']}", fix=fix)
            elif header["kind"] == "go":
                return peer


def _describe_missing(address: str, index: int) -> str:
    """Return a missing worker's index and address, and the reason: its host name does not resolve, or no connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError:
        return f"worker {index} ({address}: the name does not resolve yet)"
    return f"worker {index} ({address}: has not connected)"


def _connect(address: str, token: str, timeout: float = RESPONSE_TIMEOUT_SECONDS) -> Connection:
    """Connect to a worker and authenticate. Raises OSError and the errors of `contact_peer`."""
    host, _, port = address.rpartition(":")
    peer = Connection(socket.create_connection((host.strip("[]"), int(port)), timeout))
    try:
        contact_peer(peer, token)
    except BaseException:
        peer.close()
        raise
    return peer


def _require_all_reachable(cluster: Cluster, control: ControlChannel) -> None:
    """Connect to every other worker's port. Raises Interrupted on all workers if any worker cannot reach another."""
    peers = [(i, address) for i, address in enumerate(cluster.addresses) if i != cluster.index]
    failures = [failure for i, address in peers for failure in _check_reachable(cluster, i, address)]
    if failures := control.reduce("reach", failures, lambda by_worker: list(itertools.chain(*by_worker))):
        problem = "not all workers can reach each other: " + ", ".join(failures[:5])
        raise Interrupted(problem, fix="check network policies, then start all workers again")


def _check_reachable(cluster: Cluster, index: int, address: str) -> list[str]:
    """Connect to a worker, with retries for `REACH_TIMEOUT_SECONDS`.

    Returns [] if the worker responds; [description of the failure] if no process or another worker responds.
    """
    deadline = time.monotonic() + REACH_TIMEOUT_SECONDS
    while True:
        try:
            with contextlib.closing(_connect(address, cluster.token)) as peer:
                peer.send("who")
                header, _ = peer.receive()
            if (header["job"], header["index"]) != (cluster.job, index):
                return [f"{address} is worker {header['index']} of {header['job']}, not worker {index}"]
            return []
        except OSError as error:
            if time.monotonic() > deadline:
                return [f"worker {cluster.index} cannot reach worker {index} at {address} ({error.strerror or error})"]
            time.sleep(0.3)
