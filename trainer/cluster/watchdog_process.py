"""The watchdog process, which acts for a training process in which Python cannot run, because TensorFlow holds the GIL.

While the training process sends no state, the watchdog observes what the kernel has received for it: signals, peers'
messages and closed connections, and requests to `/healthz`, to which the watchdog responds. It ends the training
process if a thread of that process would do so, or after a timeout. It first logs the stacks of all threads and writes
the termination message; the exit code is 75.

The watchdog imports few modules, because every training process starts one.
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

from trainer.cluster.protocol import MAGIC, PREFIX, translate_peer_failure
from trainer.errors import INTERRUPTED
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import configure, erase_display, log_unbuffered

INTERVAL_SECONDS = 1.0  # between two states from the process, and between two checks by the watchdog
UNRESPONSIVE_SECONDS = 4.0  # time without a state after which the watchdog acts for the process
SIGNAL_TIMEOUT_SECONDS = 12.0  # time without a state after a signal; longer than known calls that hold the GIL
PEER_TIMEOUT_SECONDS = 60.0  # time without bytes from a peer; long, since the peer may hold its GIL in the same call
EXIT_TIMEOUT_SECONDS = 3.0  # from the request to exit until SIGKILL
STACK_SIGNAL = signal.SIGUSR1  # makes the process write its threads' stacks (`faulthandler`)
RETRY = "nothing that was saved is lost; start the same command again to resume"  # fix in messages


@dataclass
class Peer:
    """A peer and the state of its connection, from which the process currently does not read."""

    index: int
    address: str
    closed: bool = False  # the peer has closed the connection
    silent_seconds: float = 0.0  # since the last bytes arrived
    messages: list[dict[str, Any]] = field(default_factory=list)  # headers of the messages that are not read yet


@dataclass
class Observation:
    """What the watchdog knows about a process that sends no state."""

    seconds: float  # since the process's last state
    timeout: float  # seconds without a state after which the watchdog ends the process
    activity: str  # what the process was doing, from its last state
    signal_name: str | None  # "SIGTERM" or "SIGINT" if the process has received it but has not read it, else None
    peers: list[Peer]  # peers whose loss or failure ends the process


def decide_end_reason(observation: Observation) -> str | None:
    """Return the reason to end an unresponsive process, or None if there is no reason yet.

    In order of precedence: a peer has failed, has closed its connection without notice, or has sent nothing for
    `PEER_TIMEOUT_SECONDS`; a signal is still unread `SIGNAL_TIMEOUT_SECONDS` after the last state; the process has
    exceeded its timeout.
    """
    if observation.seconds < UNRESPONSIVE_SECONDS:
        return None
    blocked = f"Python had not run for {observation.seconds:.0f} s in: {observation.activity}"
    for peer in observation.peers:
        failed = next((m for m in peer.messages if m.get("kind") == "failed"), None)
        if failed:
            _, message = translate_peer_failure(failed["code"], failed["message"], failed["worker"], sender=peer.index)
            return f"{message}; {blocked}"
        cause = "connection closed without notice" if peer.closed else f"no heartbeat for {peer.silent_seconds:.0f} s"
        has_left = any(m.get("kind") == "left" for m in peer.messages)
        if (peer.closed or peer.silent_seconds > PEER_TIMEOUT_SECONDS) and not has_left:
            return f"lost worker {peer.index} ({peer.address}): {cause}; {blocked}"
    if observation.signal_name and observation.seconds > SIGNAL_TIMEOUT_SECONDS:
        return f"{observation.signal_name}, and {blocked}; {RETRY}"
    if observation.seconds > observation.timeout:
        return f"{blocked}, longer than its limit of {observation.timeout:g} s; {RETRY}"
    return None


def parse_unread_messages(received: bytes) -> list[dict[str, Any]]:
    """Parse the headers of control-channel messages that the process has not read yet.

    `received` can start in the middle of a message, if the process has read its first bytes, and can end in the middle
    of another message. Incomplete headers are skipped.
    """
    headers = []
    offset = received.find(MAGIC)
    with contextlib.suppress(ValueError):  # the process may have read the prefix of a message, but not its header
        first_header, _ = json.JSONDecoder().raw_decode(received[: max(offset, 0) or None].decode())
        headers += [first_header] if isinstance(first_header, dict) else []
    while offset >= 0 and len(received) >= offset + PREFIX.size:
        _, header_bytes, _ = PREFIX.unpack_from(received, offset)
        with contextlib.suppress(ValueError):
            headers.append(json.loads(received[offset + PREFIX.size : offset + PREFIX.size + header_bytes]))
        offset = received.find(MAGIC, offset + PREFIX.size)
    return headers


class _Watchdog:
    """The watchdog of this process's parent. `settings` is the JSON object that `trainer.cluster.watchdog` passes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process, self.settings = settings["process"], settings
        self.signals = socket.socket(fileno=settings["signals"])
        self.connections = {int(i): (socket.socket(fileno=fd), a) for i, (fd, a) in settings["peers"].items()}
        self.listener = socket.socket(fileno=settings["listener"]) if settings["listener"] is not None else None
        self.state: dict[str, Any] = {
            "activity": "starting", "limit": float("inf"), "watched": "0", "phase": health.phase, "step": None,
        }  # fmt: skip
        self._unread_state = b""  # the beginning of the next state, whose line is incomplete
        self.seconds = 0.0  # since the last state; time while either process is suspended does not count
        self._unread_bytes: dict[int, tuple[int, float]] = {}  # peer -> (unread bytes, `seconds` at their change)

    def run(self) -> None:
        """Receive states until the process ends, and check the process while it sends none."""
        for name in ("state", "stack"):
            os.set_blocking(self.settings[name], False)
        poll = select.poll()
        poll.register(self.settings["state"], select.POLLIN)
        last_time = time.monotonic()
        while os.getppid() == self.process:
            self.log_stacks()
            if not poll.poll(INTERVAL_SECONDS * 1000):
                now = time.monotonic()
                # At most twice the interval: after the machine was suspended, the process gets time to send a state.
                self.seconds += min(now - last_time, 2 * INTERVAL_SECONDS)
                last_time = now
                self.check()
                continue
            received = os.read(self.settings["state"], 1 << 16)
            if not received:
                return
            state, self._unread_state = parse_newest_state(self._unread_state + received)
            self.state = state or self.state
            self.seconds, self._unread_bytes, last_time = 0.0, {}, time.monotonic()

    def check(self) -> None:
        """If the process is unresponsive, respond to `/healthz`, and end the process if there is a reason.

        Time while the process is suspended (SIGSTOP) does not count.
        """
        if self.seconds < UNRESPONSIVE_SECONDS:
            return
        if _is_stopped(self.process):
            self.seconds, self._unread_bytes = 0.0, {}
            return
        self.respond()
        peers = [self.observe(index) for index in decode_indices(self.state["watched"])]
        signums = _peek(self.signals, size=16)
        signal_name = next((signal.Signals(n).name for n in signums if n in (signal.SIGTERM, signal.SIGINT)), None)
        observation = Observation(self.seconds, self.state["limit"], self.state["activity"], signal_name, peers)
        if reason := decide_end_reason(observation):
            self.end(reason)

    def observe(self, index: int) -> Peer:
        """Observe the connection to a peer without consuming its bytes."""
        connection, address = self.connections[index]
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        num_unread = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0]
        previous_num, last_change = self._unread_bytes.get(index, (num_unread, 0.0))
        last_change = last_change if previous_num == num_unread else self.seconds
        self._unread_bytes[index] = (num_unread, last_change)
        messages = parse_unread_messages(_peek(connection, num_unread) if num_unread else b"")
        return Peer(index, address, bool(poll.poll(0)), self.seconds - last_change, messages)

    def respond(self) -> None:
        """Respond to waiting HTTP clients: with 200 to `/healthz` before the process's timeout, otherwise with 503."""
        text = f"{self.state['activity']}; Python has not run for {self.seconds:.0f} s"
        deadline = time.monotonic() + INTERVAL_SECONDS  # slow clients must not delay the watchdog's checks
        while self.listener and time.monotonic() < deadline:
            try:
                client, _ = self.listener.accept()
            except OSError:  # no client is waiting
                return
            with contextlib.suppress(OSError), client:
                client.settimeout(INTERVAL_SECONDS / 4)
                is_healthz = client.recv(1024).startswith(b"GET /healthz")
                status = "200 OK" if is_healthz and self.seconds <= self.state["limit"] else "503 Service Unavailable"
                header = f"HTTP/1.0 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
                client.sendall(f"{header}{text}\n".encode())

    def end(self, reason: str) -> None:
        """Log the process's stacks, and let the process exit with code 75; send SIGKILL if it does not exit."""
        try:
            health.phase = self.state["phase"]
            if self.state["step"] is not None:
                health.set_gauges(step=self.state["step"])
            erase_display(1, 2)  # the process cannot erase its progress display
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, STACK_SIGNAL)
            self.log_stacks(0.5)
            log_unbuffered(f"interrupted: {reason}")
            termination.write(INTERRUPTED, reason)
        finally:
            with contextlib.suppress(OSError):  # the process has already ended
                os.write(self.settings["exit"], b"x")
        if not _wait_until(lambda: os.getppid() != self.process, EXIT_TIMEOUT_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)

    def log_stacks(self, seconds: float = 0.0) -> None:
        """Log the stacks that the process writes to its pipe, until it has written nothing for `seconds`."""
        if stacks := _read_all(self.settings["stack"], seconds):
            log_unbuffered(f"stacks of the threads:\n{stacks}")


def encode_indices(indices: Iterable[int]) -> str:
    """Encode different indices as the bits of a number in hexadecimal, so that 2000 peers take 500 bytes."""
    return f"{sum(1 << index for index in indices):x}"


def decode_indices(text: str) -> list[int]:
    """Return the indices that `encode_indices` encoded, sorted."""
    bits = int(text, 16)
    return [index for index in range(bits.bit_length()) if bits >> index & 1]


def parse_newest_state(received: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """Parse the newest complete state in `received`, which consists of JSON lines. Other lines are skipped.

    Returns:
        The state (None if no line is a JSON object) and the bytes after the last line break.
    """
    *lines, incomplete_line = received.split(b"\n")
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            if isinstance(state := json.loads(line), dict):
                return state, incomplete_line
    return None, incomplete_line


def _peek(connection: socket.socket, size: int) -> bytes:
    """Return up to `size` received bytes without consuming them; b"" if there are none."""
    with contextlib.suppress(OSError):
        return connection.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return b""


def _is_stopped(process: int) -> bool:
    """Return whether a signal or a debugger has suspended a process (`man 5 proc`, state T or t)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _read_all(descriptor: int, seconds: float) -> str:
    """Read what another process writes to a pipe, until it has written nothing for `seconds`."""
    chunks: list[bytes] = []
    poll = select.poll()  # `select.select` does not support descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    while poll.poll(seconds * 1000) and len(chunks) < 100 and (chunk := os.read(descriptor, 1 << 16)):
        chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace").strip()


def _wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll a condition until it is true or `timeout` seconds have passed; return whether it is true."""
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def main(arguments: Iterable[str]) -> None:
    """Run the watchdog of the parent process. The only argument is the JSON object from `trainer.cluster.watchdog`."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the watchdog ends when the process ends
    (json_settings,) = arguments
    settings = json.loads(json_settings)
    configure(settings["json_lines"], **settings["labels"])
    termination.set_path(settings["termination_log"])
    _Watchdog(settings).run()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
