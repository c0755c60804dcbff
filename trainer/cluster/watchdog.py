"""Start a training process's watchdog: a separate process, because all threads of the training process need the GIL.

TensorFlow holds the GIL in some calls, above all while its servers connect, which never returns if a peer has failed.
No signal handler, timer, control channel or HTTP thread can run then. Therefore `start` starts a process that runs
`trainer.cluster.watchdog_process`, and sends it this process's state every `INTERVAL_SECONDS` and at each change.

A process that is blocked in C code can choose its exit code only in C. `_arm_exit` makes the C library wait for a byte
from the watchdog and then call `_exit`. If the process does not exit, the watchdog sends SIGKILL.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.cluster.processes import build_module_command
from trainer.cluster.watchdog_process import INTERVAL_SECONDS, STACK_SIGNAL, encode_indices
from trainer.config.schema import Runtime
from trainer.errors import INTERRUPTED
from trainer.monitoring.health import health
from trainer.monitoring.log import log


class _SignalEvent(ctypes.Structure):
    """glibc's `struct sigevent`: what the C library does when a read completes."""

    _fields_ = (
        ("value", ctypes.c_void_p), ("number", ctypes.c_int), ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("reserved", ctypes.c_byte * 32),
    )  # fmt: skip


class _ReadRequest(ctypes.Structure):
    """glibc's `struct aiocb` on 64-bit machines: a request for an asynchronous read.

    `internal` covers the remaining fields, including `aio_offset`. All of them are 0.
    """

    _fields_ = (
        ("descriptor", ctypes.c_int), ("opcode", ctypes.c_int), ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p), ("count", ctypes.c_size_t), ("event", _SignalEvent),
        ("internal", ctypes.c_byte * 96),
    )  # fmt: skip


_MAX_CHARACTER_BYTES = 6  # of a character in a JSON text in UTF-8: a control character is \u001f
_SIGEV_THREAD = 2  # value of `sigevent.sigev_notify`: call a function in a new thread
_processes: list[subprocess.Popen[bytes]] = []  # the watchdog process, between `start` and `stop`
_keep_alive: list[Any] = []  # objects that the C library uses until this process ends


def start(
    runtime: Runtime, control: ControlChannel, signals: socket.socket, listener: socket.socket | None, **labels: str
) -> int | None:
    """Start this process's watchdog, and send it this process's state every `INTERVAL_SECONDS` and at each change.

    Must be called before TensorFlow is imported.

    Args:
        runtime: the run's settings, of which `termination_log` and `log_format` also apply to the watchdog.
        control: the control channel, whose connections the watchdog observes.
        signals: `StopFlag.unread`, the end of the wake-up pipe with the signal numbers that no thread has read yet.
        listener: the listening socket for `/healthz`, on which the watchdog responds when this process cannot; None if
            there is no HTTP server.
        labels: labels of JSON log lines, as in `trainer.monitoring.log.configure`.

    Returns:
        The process ID of the watchdog; None if it cannot be started, which is logged.
    """
    exit_reader, exit_writer = os.pipe()
    stack_reader, stack_writer = os.pipe()
    state_reader, state_writer = os.pipe()
    for writer in (state_writer, stack_writer):
        os.set_blocking(writer, False)  # a suspended watchdog does not read
    faulthandler.register(STACK_SIGNAL, file=stack_writer, all_threads=True)
    with contextlib.suppress(OSError, AttributeError):  # without it, the watchdog can only send SIGKILL
        _arm_exit(exit_reader)
    peers = {
        peer: (connection.socket.fileno(), control.cluster.addresses[peer])
        for peer, connection in control.connections.items()
    }
    settings = {
        "process": os.getpid(), "state": state_reader, "exit": exit_writer, "stack": stack_reader,
        "signals": signals.fileno(), "listener": listener.fileno() if listener else None, "peers": peers,
        "termination_log": runtime.termination_log, "json_lines": runtime.log_format == "json", "labels": labels,
    }  # fmt: skip
    if listener:
        listener.setblocking(False)  # both processes accept connections: `accept` must not block if the other is first
    inherited_fds = [state_reader, exit_writer, stack_reader, signals.fileno(), *(fd for fd, _ in peers.values())]
    command, environment = build_module_command("trainer.cluster.watchdog_process", json.dumps(settings))
    try:
        child = subprocess.Popen(
            command, pass_fds=[*inherited_fds, *([listener.fileno()] if listener else [])], env=environment,
            stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
    except OSError as error:
        log.warning(f"watchdog: cannot be started ({error.strerror or error})")
        return None
    # `exit_writer` stays open in this process. Otherwise the watchdog's exit would close the pipe's last writer, and
    # the end of file would complete the read and exit this process.
    _processes.append(child)
    os.close(state_reader)
    os.close(stack_reader)

    def send_state() -> None:
        # The pipe is full if the watchdog is suspended, and closed if it was killed. Training continues in both cases.
        with contextlib.suppress(OSError):
            os.write(state_writer, encode_state(control.list_watched_peers()))

    def send_states() -> None:
        """Send the state periodically until the watchdog ends. Runs in a thread."""
        while child.poll() is None:
            send_state()
            time.sleep(INTERVAL_SECONDS)
        if child not in _processes:  # `stop` killed it
            return
        log.warning(f"watchdog: has ended (exit code {child.returncode}); the run continues without it")

    health.on_change = send_state
    send_state()
    threading.Thread(target=send_states, name="watchdog", daemon=True).start()
    return child.pid


def stop() -> None:
    """Kill the watchdog if there is one, and wait for its exit, because it keeps the port of `/healthz` open."""
    while _processes:
        child = _processes.pop()
        child.kill()
        child.wait()


def encode_state(watched_peers: Iterable[int]) -> bytes:
    """Encode this process's state for the watchdog as one JSON line of at most 4096 bytes.

    A write of at most 4096 bytes to a pipe is atomic (PIPE_BUF on Linux), even if the pipe is almost full. The activity
    is truncated to the bytes that are left: at least 500 characters with 2000 workers and the longest name of a phase.
    """
    state = {"activity": "", "phase": health.phase, "step": health.values.get("step"),
             "limit": health.unresponsive_timeout, "watched": encode_indices(watched_peers)}  # fmt: skip
    free_bytes = select.PIPE_BUF - len(_encode_line(state))
    return _encode_line(state | {"activity": health.describe()[: max(free_bytes, 0) // _MAX_CHARACTER_BYTES]})


def _encode_line(state: dict[str, Any]) -> bytes:
    return json.dumps(state, ensure_ascii=False).encode(errors="replace") + b"\n"


def _arm_exit(descriptor: int) -> None:
    """Make the C library exit this process with code 75 when a byte, or the end of file, can be read from `descriptor`.

    This requests an asynchronous read, on whose completion a new thread calls `_exit`. Raises OSError if the C library
    rejects the request, and AttributeError if it has no `aio_read`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    exit_address = ctypes.cast(libc["_exit"], ctypes.c_void_p).value
    buffer = ctypes.create_string_buffer(1)
    event = _SignalEvent(INTERRUPTED, 0, _SIGEV_THREAD, exit_address)  # `value` is the argument of `_exit`
    request = _ReadRequest(descriptor, 0, 0, ctypes.addressof(buffer), 1, event)
    _keep_alive.extend([buffer, request])
    if libc.aio_read(ctypes.byref(request)):
        raise OSError(ctypes.get_errno(), "aio_read")
