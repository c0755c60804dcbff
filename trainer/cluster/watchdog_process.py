"""The process of a watchdog: it acts for a training process in which Python does not run, as TensorFlow holds the GIL.

While the state of the process is missing, it observes what the kernel has for the process (signals, bytes of the peers
and closed connections, requests to `/healthz`), responds to `/healthz`, and ends the process if one of its threads
would have ended it, or after the limit, with its stacks in the log, a termination message and exit code 75.

It imports little, because every training process starts one.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.cluster.protocol import HEADER, MAGIC, failure_of_peer
from trainer.errors import INTERRUPTED
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import configure, erase_display, log_unbuffered

INTERVAL_SECONDS = 1.0  # between states of the process, and between checks of the watchdog
UNRESPONSIVE_SECONDS = 4.0  # without a state: then the watchdog acts for the threads of the process
SIGNAL_SECONDS = 12.0  # without a state, after a signal: longer than any known call that holds the GIL
SILENCE_SECONDS = 60.0  # without bytes of a peer, which may be unresponsive for the same cause
EXIT_SECONDS = 3.0  # from the request to exit until SIGKILL
STACK_SIGNAL = signal.SIGUSR1  # the process writes the stacks of its threads
RETRY = "nothing that was saved is lost; start the same command again to resume"


@dataclass
class Peer:
    """What the kernel has of the connection to a peer while the process does not read it."""

    index: int
    address: str
    closed: bool = False  # by the peer
    silent_seconds: float = 0.0  # without further bytes
    messages: list[dict[str, Any]] = field(default_factory=list)  # headers that the process has not read


@dataclass
class Observation:
    """What the watchdog knows of an unresponsive process."""

    seconds: float  # since its last state
    limit: float  # seconds that it may be unresponsive
    activity: str
    signal_name: str | None  # of a signal that no thread has read
    peers: list[Peer]  # those whose end would end this process


def reason_to_end(seen: Observation) -> str | None:
    """Decide whether an unresponsive process ends, and for which reason."""
    if seen.seconds < UNRESPONSIVE_SECONDS:
        return None
    blocked = f"Python had not run for {seen.seconds:.0f} s in: {seen.activity}"
    for peer in seen.peers:
        failed = next((m for m in peer.messages if m.get("kind") == "failed"), None)
        if failed:
            _, message = failure_of_peer(failed["code"], failed["message"], failed["worker"], sender=peer.index)
            return f"{message}; {blocked}"
        cause = "connection closed without notice" if peer.closed else f"no heartbeat for {peer.silent_seconds:.0f} s"
        left = any(m.get("kind") == "left" for m in peer.messages)
        if (peer.closed or peer.silent_seconds > SILENCE_SECONDS) and not left:
            return f"lost worker {peer.index} ({peer.address}): {cause}; {blocked}"
    if seen.signal_name and seen.seconds > SIGNAL_SECONDS:
        return f"{seen.signal_name}, and {blocked}; {RETRY}"
    return f"{blocked}, longer than its limit of {seen.limit:g} s; {RETRY}" if seen.seconds > seen.limit else None


def unread_messages(data: bytes) -> list[dict[str, Any]]:
    """Parse the headers of messages of the control channel, in bytes that may begin within a message."""
    headers, start = [], data.find(MAGIC)
    with contextlib.suppress(ValueError):  # the process has read the lengths of this message
        first, _ = json.JSONDecoder().raw_decode(data[: max(start, 0) or None].decode())
        headers += [first] if isinstance(first, dict) else []
    while start >= 0 and len(data) >= start + HEADER.size:
        _, header_bytes, _ = HEADER.unpack_from(data, start)
        with contextlib.suppress(ValueError):
            headers.append(json.loads(data[start + HEADER.size : start + HEADER.size + header_bytes]))
        start = data.find(MAGIC, start + HEADER.size)
    return headers


class _Watchdog:
    """The descriptors that the watchdog has in common with its process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process, self.settings = settings["process"], settings
        self.signals = socket.socket(fileno=settings["signals"])
        self.connections = {int(i): (socket.socket(fileno=n), a) for i, (n, a) in settings["peers"].items()}
        self.listener = socket.socket(fileno=settings["listener"]) if settings["listener"] is not None else None
        self.state: dict[str, Any] = {"activity": "starting", "limit": float("inf"), "watched": []}
        self.seconds = 0.0  # since the last state, without the time in which a process of the two was stopped
        self._unread_bytes: dict[int, tuple[int, float]] = {}  # by peer: their number, and since which `seconds`

    def run(self) -> None:
        """Receive states until the process ends; act for it while it sends none."""
        os.set_blocking(self.settings["state"], False)
        poll = select.poll()
        poll.register(self.settings["state"], select.POLLIN)
        before = time.monotonic()
        while os.getppid() == self.process:
            if not poll.poll(INTERVAL_SECONDS * 1000):
                now = time.monotonic()
                # At most twice the interval: after a pause of the machine or container the process first has to run.
                self.seconds += min(now - before, 2 * INTERVAL_SECONDS)
                before = now
                self.check()
                continue
            data = os.read(self.settings["state"], 1 << 16)
            if not data:
                return
            self.state = json.loads(data.rstrip(b"\n").rpartition(b"\n")[2])
            self.seconds, self._unread_bytes, before = 0.0, {}, time.monotonic()

    def check(self) -> None:
        """Respond to `/healthz` and end the process if there is a reason, unless it is stopped (SIGSTOP)."""
        if self.seconds < UNRESPONSIVE_SECONDS:
            return
        if _is_stopped(self.process):
            self.seconds, self._unread_bytes = 0.0, {}
            return
        self.respond()
        peers = [self.observe(index) for index in self.state["watched"]]
        name = None
        if select.select([self.signals], [], [], 0)[0]:
            name = signal.Signals(self.signals.recv(1, socket.MSG_PEEK)[0]).name
        seen = Observation(self.seconds, self.state["limit"], self.state["activity"], name, peers)
        if reason := reason_to_end(seen):
            self.end(reason)

    def observe(self, index: int) -> Peer:
        """Observe the connection to a peer without reading from it."""
        connection, address = self.connections[index]
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        unread = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0]
        number, since = self._unread_bytes.get(index, (unread, 0.0))
        since = since if number == unread else self.seconds
        self._unread_bytes[index] = (unread, since)
        data = connection.recv(unread, socket.MSG_PEEK | socket.MSG_DONTWAIT) if unread else b""
        return Peer(index, address, bool(poll.poll(0)), self.seconds - since, unread_messages(data))

    def respond(self) -> None:
        """Respond to waiting requests on the port of `/healthz`: 503 after the limit, 200 before."""
        text = f"{self.state['activity']}; Python has not run for {self.seconds:.0f} s"
        while self.listener:
            try:
                client, _ = self.listener.accept()
            except OSError:  # none is waiting
                return
            with contextlib.suppress(OSError), client:
                client.settimeout(INTERVAL_SECONDS)
                known = client.recv(1024).startswith(b"GET /healthz")
                code = "503 Service Unavailable" if not known or self.seconds > self.state["limit"] else "200 OK"
                header = f"HTTP/1.0 {code}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
                client.sendall(f"{header}{text}\n".encode())

    def end(self, reason: str) -> None:
        """End the process with 75, after its stack is in the log."""
        health.phase = self.state["phase"]
        if self.state["step"] is not None:
            health.set_gauges(step=self.state["step"])
        erase_display(1, 2)  # of the process, which cannot
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, STACK_SIGNAL)
        if stacks := _read_all(self.settings["stack"]):
            log_unbuffered(f"stacks of the threads:\n{stacks}")
        log_unbuffered(f"interrupted: {reason}")
        termination.write(INTERRUPTED, reason)
        os.write(self.settings["exit"], b"x")
        if not _wait_until(lambda: os.getppid() != self.process, EXIT_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Return whether a process is stopped by a signal or a debugger (`man 5 proc`, state T or t)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _read_all(descriptor: int) -> str:
    """Read what another process writes to a pipe, until it has paused for half a second."""
    parts: list[bytes] = []
    while select.select([descriptor], [], [], 0.5)[0] and len(parts) < 100 and (part := os.read(descriptor, 1 << 16)):
        parts.append(part)
    return b"".join(parts).decode(errors="replace").strip()


def _wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def main(arguments: Iterable[str]) -> None:
    """Be the watchdog of the process that started this one, with its settings as JSON in the only argument."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the watchdog ends with its process
    (text,) = arguments
    settings = json.loads(text)
    configure(settings["json_lines"], **settings["labels"])
    termination.set_path(settings["termination_log"])
    _Watchdog(settings).run()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
