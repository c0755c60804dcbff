"""Rendezvous before TensorFlow starts: all workers connect, or log which ones are missing and why.

TensorFlow itself waits for absent peers forever, without a message. Here each worker listens on its port, and the
others connect to the chief, worker 0; these connections become the `ControlChannel`. Then each worker tries the port of
each other one, because the collectives need all these routes, and frees its own port for TensorFlow.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.cluster.control import Connection, ControlChannel, ProtocolError
from trainer.cluster.discovery import Cluster
from trainer.errors import ConfigError, Interrupted

REPORT_SECONDS = 5.0  # between two log lines with the missing workers
RESPONSE_SECONDS = 5.0  # timeout of a connection and its first response
REACH_SECONDS = 30.0  # timeout of reaching the ports of all others

RETRY = "start all workers again"

Note = Callable[[str], None]


def rendezvous(cluster: Cluster, timeout: float, note: Note, check: Callable[[], None]) -> ControlChannel:
    """Connect all workers.

    Args:
        timeout: in seconds.
        note: logs the missing workers, with reasons, every few seconds.
        check: called often; raises to cancel, as after a signal.

    Raises:
        Interrupted: a worker is missing after `timeout`, or cannot reach another one; a restart may succeed.
        ConfigError: a peer belongs to another job.
    """
    if cluster.size == 1:
        return ControlChannel(cluster, {})
    note(f"workers: this is {cluster.index} of {cluster.size} ({cluster.source}); waiting for the others")
    deadline = time.monotonic() + timeout
    with _Listener(cluster, deadline, note, check) as listener:
        connections = listener.await_all(note, check) if cluster.is_chief else _join(cluster, deadline, note, check)
        peers = ControlChannel(cluster, connections)
        with peers.propagate_failures():
            _reach_all(cluster, peers)
    note(f"workers: all {cluster.size} are connected")
    return peers


class _Listener(contextlib.AbstractContextManager["_Listener"]):
    """Server on this worker's port until TensorFlow uses it: identifies this worker; the chief accepts the others."""

    def __init__(self, cluster: Cluster, deadline: float, note: Note, check: Callable[[], None]) -> None:
        self.cluster, self.deadline = cluster, deadline
        self.connections: dict[int, Connection] = {}
        self._changed = threading.Condition()
        port = int(cluster.addresses[cluster.index].rpartition(":")[2])
        self._socket = self._bind(port, note, check)
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # wakes the accepting thread
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bind(self, port: int, note: Note, check: Callable[[], None]) -> socket.socket:
        reported = False
        while True:
            try:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
            except OSError as error:
                check()
                if time.monotonic() > self.deadline:
                    problem = f"port {port} of this worker is in use by another process ({error.strerror})"
                    raise Interrupted(problem, fix="end that process, or set another WORKER_PORT") from None
                if not reported:
                    note(f"workers: port {port} is in use by another process; waiting until it is free")
                reported = True
                time.sleep(0.5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed by `__exit__`
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connected = Connection(connection)
        connection.settimeout(RESPONSE_SECONDS)
        joins = False
        try:
            header, _ = connected.receive()
            if header["kind"] != "join":
                connected.send("identity", job=self.cluster.job, index=self.cluster.index)
            elif refusal := self._refusal(header):
                connected.send("refused", reason=refusal)
            else:
                joins = True
        except (OSError, ValueError, KeyError):
            pass
        if not joins:
            connected.close()
            return
        connection.setblocking(False)  # only its end is received from now on
        with self._changed:
            old = self.connections.pop(header["index"], None)
            if old:  # a reconnect: the first connection broke, or the process was restarted
                old.close()
            self.connections[header["index"]] = connected
            self._changed.notify_all()

    def _refusal(self, header: dict[str, Any]) -> str | None:
        mine = self.cluster
        if not mine.is_chief:
            return f"worker {mine.index} is at the address of worker 0; the workers have different lists of addresses"
        if (header["job"], header["size"]) != (mine.job, mine.size):
            return f"this is {mine.job} with {mine.size} workers, not {header['job']} with {header['size']}"
        if not 0 < header["index"] < mine.size:
            return f"worker {header['index']} is not one of 1..{mine.size - 1}"
        return None

    def await_all(self, note: Note, check: Callable[[], None]) -> dict[int, Connection]:
        """Wait for the connections of all other workers."""
        next_report = time.monotonic() + REPORT_SECONDS / 2
        while True:
            with self._changed:
                self._remove_closed()
                missing = [i for i in range(1, self.cluster.size) if i not in self.connections]
                if not missing:
                    break
                self._changed.wait(0.2)
            check()
            now = time.monotonic()
            if now > next_report or now > self.deadline:
                workers = ", ".join(_state(self.cluster.addresses[i], i) for i in missing[:5])
                workers += f", and {len(missing) - 5} more" if len(missing) > 5 else ""
                text = f"{len(missing)} of {self.cluster.size} workers are missing: {workers}"
                self._send_to_all("waiting", text=text, over=now > self.deadline)
                if now > self.deadline:
                    raise Interrupted(text, key="runtime.start_timeout", fix=RETRY)
                note(f"workers: {text}")
                next_report = now + REPORT_SECONDS
        self._send_to_all("go")
        return dict(self.connections)

    def _send_to_all(self, kind: str, **facts: Any) -> None:
        for connected in list(self.connections.values()):
            with contextlib.suppress(OSError):  # `ControlChannel` will notice
                connected.send(kind, **facts)

    def _remove_closed(self) -> None:
        for index, connected in list(self.connections.items()):
            try:
                ended = connected.socket.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            if ended:
                connected.close()
                del self.connections[index]


def _state(address: str, index: int) -> str:
    """A worker that is missing, and why, as far as this worker can detect."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError:
        return f"worker {index} ({address}: the name does not resolve yet)"
    return f"worker {index} ({address}: has not connected)"


def _join(cluster: Cluster, deadline: float, note: Note, check: Callable[[], None]) -> dict[int, Connection]:
    """Connect to the chief, and wait until all other workers have."""
    next_report, why = time.monotonic() + REPORT_SECONDS / 2, ""
    address = cluster.addresses[0]
    while True:
        check()
        try:
            connected = _connect(address)
            try:
                connected.send("join", job=cluster.job, index=cluster.index, size=cluster.size)
                return {0: _await_start(connected, deadline, note, check)}
            except BaseException:
                connected.close()
                raise
        except ProtocolError:
            why = "another server uses its port; it may be training already, without this worker"
        except socket.gaierror:
            why = "the name does not resolve yet"
        except OSError as error:
            why = f"no response ({error.strerror or error})"
        now = time.monotonic()
        if now > deadline:
            raise Interrupted(f"worker 0 ({address}) is missing: {why}", key="runtime.start_timeout", fix=RETRY)
        if now > next_report:
            note(f"workers: worker 0 ({address}) is missing: {why}")
            next_report = now + REPORT_SECONDS
        time.sleep(0.3)


def _await_start(connected: Connection, deadline: float, note: Note, check: Callable[[], None]) -> Connection:
    """Wait for the chief's "go", sent when all workers are connected; until then log which ones are missing."""
    connected.socket.settimeout(0.5)
    while True:
        check()
        try:  # peek: what follows is for `ControlChannel`
            first = connected.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            if time.monotonic() > deadline + RESPONSE_SECONDS:
                raise Interrupted("worker 0 stopped responding in the rendezvous", fix=RETRY) from None
            continue
        if not first:
            raise ConnectionError("worker 0 closed the connection")
        connected.socket.settimeout(RESPONSE_SECONDS)
        header, _ = connected.receive()
        connected.socket.settimeout(0.5)
        if header["kind"] == "waiting":
            if header["over"]:
                raise Interrupted(header["text"], key="runtime.start_timeout", fix=RETRY)
            note(f"workers: {header['text']}")
        elif header["kind"] == "refused":
            raise ConfigError(f"worker 0 refuses this worker: {header['reason']}", fix="start all workers alike")
        elif header["kind"] == "go":
            return connected


def _connect(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return Connection(socket.create_connection((host.strip("[]"), int(port)), RESPONSE_SECONDS))


def _reach_all(cluster: Cluster, peers: ControlChannel) -> None:
    """Try every other worker's port; on failures of any worker raise `Interrupted` on all of them."""
    others = [(i, address) for i, address in enumerate(cluster.addresses) if i != cluster.index]
    faults = [fault for i, address in others for fault in _reach(cluster, i, address)]
    faults = peers.reduce("reach", faults, lambda gathered: [fault for faults in gathered for fault in faults])
    if faults:
        problem = "not all workers can reach each other: " + ", ".join(faults[:5])
        raise Interrupted(problem, fix="check network policies, then start all workers again")


def _reach(cluster: Cluster, index: int, address: str) -> list[str]:
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        try:
            with contextlib.closing(_connect(address)) as connected:
                connected.send("who")
                header, _ = connected.receive()
            if (header["job"], header["index"]) != (cluster.job, index):
                return [f"{address} is worker {header['index']} of {header['job']}, not worker {index}"]
            return []
        except OSError as error:
            if time.monotonic() > deadline:
                return [f"worker {cluster.index} cannot reach worker {index} at {address} ({error.strerror or error})"]
            time.sleep(0.3)
