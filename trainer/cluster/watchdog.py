"""Watchdog of a training process: a separate process, because every other guard is a thread and needs Python's GIL.

TensorFlow holds the GIL in some calls, above all while its servers connect, which takes forever if a peer has failed.
No signal handler, timer, control channel or HTTP thread runs then. Therefore `start` creates a process that runs
`watchdog_process` and receives the state of this process every second and at each change.

A process that is blocked in C can choose its exit code only in C. `_arm_exit` lets the C library wait for a byte from
the watchdog and then call `_exit`. If that fails, the watchdog sends SIGKILL.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import socket
import subprocess
import threading
import time
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.cluster.processes import module_command
from trainer.cluster.watchdog_process import INTERVAL_SECONDS, STACK_SIGNAL
from trainer.config.schema import Runtime
from trainer.errors import INTERRUPTED
from trainer.monitoring.health import health
from trainer.monitoring.log import log


class _SignalEvent(ctypes.Structure):
    """`struct sigevent` of glibc."""

    _fields_ = (
        ("value", ctypes.c_void_p), ("number", ctypes.c_int), ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("reserved", ctypes.c_byte * 32),
    )  # fmt: skip


class _ReadRequest(ctypes.Structure):
    """`struct aiocb` of glibc on 64-bit machines."""

    _fields_ = (
        ("descriptor", ctypes.c_int), ("opcode", ctypes.c_int), ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p), ("count", ctypes.c_size_t), ("event", _SignalEvent),
        ("internal", ctypes.c_byte * 96),
    )  # fmt: skip


_SIGEV_THREAD = 2
_processes: list[subprocess.Popen[bytes]] = []  # the watchdog, once it has started
_keep_alive: list[Any] = []  # objects that the C library and the watchdog use until the process ends


def start(
    runtime: Runtime, control: ControlChannel, signals: socket.socket, listener: socket.socket | None, **labels: str
) -> int | None:
    """Start the watchdog of this process, and return its process ID; None if it cannot start.

    Must be called before TensorFlow is imported.

    Args:
        signals: `StopFlag.unread`, the socket with the signal numbers that no thread has read.
        listener: the socket of `/healthz`, on which the watchdog responds while this process cannot; None if there is
            no server.
        labels: of the log, as in `monitoring.log.configure`.
    """
    exit_reader, exit_writer = os.pipe()
    stack_reader, stack_writer = os.pipe()
    state_reader, state_writer = os.pipe()
    for writer in (state_writer, stack_writer):
        os.set_blocking(writer, False)  # the watchdog may be stopped
    faulthandler.register(STACK_SIGNAL, file=stack_writer, all_threads=True)
    with contextlib.suppress(OSError, AttributeError):  # another C library: the watchdog sends SIGKILL
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
        listener.setblocking(False)  # since both processes accept, the connection can be gone
    passed = [state_reader, exit_writer, stack_reader, signals.fileno(), *(fd for fd, _ in peers.values())]
    command, environment = module_command("trainer.cluster.watchdog_process", json.dumps(settings))
    try:
        child = subprocess.Popen(
            command, pass_fds=[*passed, *([listener.fileno()] if listener else [])], env=environment,
            stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
    except OSError as error:
        log.warning(f"watchdog: cannot be started ({error.strerror or error})")
        return None
    # The write end of `exit` remains open here, so that the end of the watchdog does not end this process.
    _keep_alive.append(exit_writer)
    _processes.append(child)
    os.close(state_reader)
    os.close(stack_reader)

    def send_state() -> None:
        # A full pipe means that the watchdog is suspended, a closed one that it was killed. Training continues.
        with contextlib.suppress(OSError):
            os.write(state_writer, _encode_state(control))

    def send_states() -> None:
        while child.poll() is None:
            send_state()
            time.sleep(INTERVAL_SECONDS)
        if child not in _processes:  # `stop`
            return
        log.warning(f"watchdog: has ended (exit code {child.returncode}); the run continues without it")

    health.on_change = send_state
    send_state()
    threading.Thread(target=send_states, name="watchdog", daemon=True).start()
    return child.pid


def stop() -> None:
    """End the watchdog if there is one, and wait for it, because the socket of `/healthz` is open in it too."""
    while _processes:
        child = _processes.pop()
        child.kill()
        child.wait()


def _encode_state(control: ControlChannel) -> bytes:
    """Encode the state of this process for the watchdog, in one line that a pipe writes atomically."""
    state = {"activity": health.describe()[:500], "phase": health.phase, "step": health.values.get("step"),
             "limit": health.unresponsive_timeout, "watched": control.watched_peers()}  # fmt: skip
    return json.dumps(state).encode() + b"\n"


def _arm_exit(descriptor: int) -> None:
    """Let the C library end this process with exit code 75 as soon as a byte can be read from a descriptor."""
    library = ctypes.CDLL(None, use_errno=True)
    function = ctypes.cast(library["_exit"], ctypes.c_void_p).value
    buffer = ctypes.create_string_buffer(1)
    event = _SignalEvent(INTERRUPTED, 0, _SIGEV_THREAD, function)
    request = _ReadRequest(descriptor, 0, 0, ctypes.addressof(buffer), 1, event)
    _keep_alive.extend([buffer, request])
    if library.aio_read(ctypes.byref(request)):
        raise OSError(ctypes.get_errno(), "aio_read")
