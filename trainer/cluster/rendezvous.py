"""Before TensorFlow starts: every worker finds every other one, or says which it cannot find.

TensorFlow's own start waits for absent peers for ever and says nothing. Here each worker listens on its port; the
others connect to the chief, worker 0, and keep that connection (`ControlChannel`). When all are there, each tries the
port of each other one: the collectives will need every one of these ways. Then the port is free for TensorFlow.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.cluster.control import Connection, ControlChannel, ProtocolError
from trainer.cluster.discovery import Cluster
from trainer.errors import ConfigError, Interrupted

REPORT_SECONDS = 5.0  # between two lines that say who is missing
ANSWER_SECONDS = 5.0  # for a connection and a first answer
REACH_SECONDS = 30.0  # for trying the ports of all others

Note = Callable[[str], None]


def rendezvous(cluster: Cluster, timeout: float, note: Note, check: Callable[[], None]) -> ControlChannel:
    """Find all other workers.

    Args:
        timeout: seconds until giving up.
        note: given who is missing, and why, every few seconds.
        check: called often; raises to leave (a signal came).

    Raises:
        Interrupted: somebody is missing after `timeout`, or cannot be reached by somebody; trying again may help.
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
    note(f"workers: all {cluster.size} are there")
    return peers


class _Listener:
    """This worker's port before TensorFlow takes it: says who is here, and on the chief takes the others in."""

    def __init__(self, cluster: Cluster, deadline: float, note: Note, check: Callable[[], None]) -> None:
        self.cluster, self.deadline = cluster, deadline
        self.connections: dict[int, Connection] = {}
        self._changed = threading.Condition()
        port = int(cluster.addresses[cluster.index].rpartition(":")[2])
        self._socket = self._bind(port, note, check)
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # wakes the accepting thread
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _bind(self, port: int, note: Note, check: Callable[[], None]) -> socket.socket:
        reported = False
        while True:
            try:
                if socket.has_dualstack_ipv6():
                    return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
                return socket.create_server(("", port), backlog=1024)
            except OSError as error:
                check()
                if time.monotonic() > self.deadline:
                    raise Interrupted(
                        f"port {port} of this worker is still taken by another process ({error.strerror}); "
                        "end that process, or give another WORKER_PORT"
                    ) from None
                if not reported:
                    note(f"workers: port {port} is taken by another process here; waiting until it is free")
                reported = True
                time.sleep(0.5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed: TensorFlow's turn
                return
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connected = Connection(connection)
        connection.settimeout(ANSWER_SECONDS)
        joins = False
        try:
            header, _ = connected.receive()
            if header["kind"] != "join":
                connected.send("here", job=self.cluster.job, index=self.cluster.index)
            elif refusal := self._refusal(header):
                connected.send("refused", reason=refusal)
            else:
                joins = True
        except (OSError, ValueError, KeyError):
            pass
        if not joins:
            connected.close()
            return
        connection.setblocking(False)  # from now on nothing is received but its end
        with self._changed:
            old = self.connections.pop(header["index"], None)
            if old:  # the same worker again: its first connection broke, or its process was replaced
                old.close()
            self.connections[header["index"]] = connected
            self._changed.notify_all()

    def _refusal(self, header: dict[str, Any]) -> str | None:
        mine = self.cluster
        if not mine.is_chief:
            return f"worker {mine.index} answers where worker 0 should; the workers have different lists of addresses"
        if (header["job"], header["size"]) != (mine.job, mine.size):
            return f"it belongs to {mine.job} with {mine.size} workers, not to {header['job']} with {header['size']}"
        if not 0 < header["index"] < mine.size:
            return f"worker {header['index']} is none of 1..{mine.size - 1}"
        return None

    def await_all(self, note: Note, check: Callable[[], None]) -> dict[int, Connection]:
        """The connections of all other workers, once they are there."""
        everyone, next_report = range(1, self.cluster.size), time.monotonic() + REPORT_SECONDS / 2
        while True:
            with self._changed:
                self._remove_closed()
                missing = [i for i in everyone if i not in self.connections]
                if not missing:
                    break
                self._changed.wait(0.2)
            check()
            now = time.monotonic()
            if now > next_report or now > self.deadline:
                who = "; ".join(_state(self.cluster.addresses[i], i) for i in missing[:5])
                who += f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
                text = f"{len(missing)} of {self.cluster.size} workers are missing: {who}"
                self._send_to_all("waiting", text=text, over=now > self.deadline)
                if now > self.deadline:
                    raise Interrupted(f"{text}. Waited for runtime.start_timeout; start all workers again to go on")
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
    """The reason why a worker may be missing, as far as it shows from here."""
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError:
        return f"worker {index} ({address}: the name does not resolve yet)"
    return f"worker {index} ({address}: has not called)"


def _join(cluster: Cluster, deadline: float, note: Note, check: Callable[[], None]) -> dict[int, Connection]:
    """Connect to the chief, and wait until all others have."""
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
            why = "something answers there that is no waiting worker; perhaps it is training already, without this one"
        except socket.gaierror:
            why = "the name does not resolve yet"
        except OSError as error:
            why = f"no answer ({error.strerror or error})"
        now = time.monotonic()
        if now > deadline:
            raise Interrupted(
                f"worker 0 ({address}) is missing: {why}. Waited for runtime.start_timeout; "
                "start all workers again to go on"
            )
        if now > next_report:
            note(f"workers: worker 0 ({address}) is missing: {why}")
            next_report = now + REPORT_SECONDS
        time.sleep(0.3)


def _await_start(connected: Connection, deadline: float, note: Note, check: Callable[[], None]) -> Connection:
    """Wait for the chief's "go", which comes when all workers are there; until then it reports who is missing."""
    connected.socket.settimeout(0.5)
    while True:
        check()
        try:  # peek: what comes after belongs to `ControlChannel`
            first = connected.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            if time.monotonic() > deadline + ANSWER_SECONDS:
                raise Interrupted("worker 0 went silent while the others were waited for") from None
            continue
        if not first:
            raise ConnectionError("worker 0 closed the connection")
        connected.socket.settimeout(ANSWER_SECONDS)
        header, _ = connected.receive()
        connected.socket.settimeout(0.5)
        if header["kind"] == "waiting":
            if header["over"]:
                raise Interrupted(f"{header['text']}. Waited for runtime.start_timeout")
            note(f"workers: {header['text']}")
        elif header["kind"] == "refused":
            raise ConfigError(f"worker 0 refuses this worker: {header['reason']}")
        elif header["kind"] == "go":
            return connected


def _connect(address: str) -> Connection:
    host, _, port = address.rpartition(":")
    return Connection(socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS))


def _reach_all(cluster: Cluster, peers: ControlChannel) -> None:
    """Try every other worker's port; raises `Interrupted`, on every worker, with the ones that cannot be reached."""
    others = [(i, address) for i, address in enumerate(cluster.addresses) if i != cluster.index]
    faults = [fault for i, address in others for fault in _reach(cluster, i, address)]
    faults = peers.reduce("reach", faults, lambda everyone: [fault for one in everyone for fault in one])
    if faults:
        raise Interrupted("the workers cannot all reach each other (a network policy?): " + "; ".join(faults[:5]))


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
