"""Requests to stop: the first SIGTERM or SIGINT sets a flag, the second ends the process at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable

from trainer.errors import INTERRUPTED, StopRequested
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import last_words


def end_at_once() -> None:
    """Have SIGTERM end the process with the code that means "start me again"; for commands that have nothing to save.

    The first process of a container is not even killed by a signal that it has no handler for: the kernel drops it, and
    the pod would go on until its grace period is over (`man 7 pid_namespaces`).
    """

    def end(_number: int, _frame: object) -> None:
        last_words("interrupted: SIGTERM; nothing is lost. Start the same command again to go on")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGTERM, end)


def take_no_signal() -> None:
    """Ignore SIGTERM: from here on the exit code stands.

    Python gives its handlers back before it takes down TensorFlow; a signal in that second would make a failure of a
    run that is done.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopFlag:
    """A flag that a signal sets, here or on another worker.

    A Python handler waits until the main thread returns from TensorFlow, which may be many steps later. So the signal's
    number is read from the wake-up pipe by a thread: the flag is set at once, and the compiled step asks for it.

    Attributes:
        reason: why to stop; None as long as there is no reason.
        on_signal: called with the reason when a signal reached this process.
        on_request: called with the reason once, however it got here.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.on_signal: Callable[[str], None] = lambda _reason: None
        self.on_request: Callable[[str], None] = lambda _reason: None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._signals = 0  # that reached this process: a peer's does not make ours the second one
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self.install()

    def install(self) -> None:
        """Take the signals; again after the strategy exists, for TensorFlow's coordination service takes them away."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def request(self, reason: str) -> None:
        """Set the flag; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            self.on_request(reason)

    def check(self, where: str) -> None:
        """Leave if the flag is set; for loops that wait, each with a time limit of its own, and have nothing to save.

        Raises:
            StopRequested: the flag is set.
        """
        health.progress()
        if self.reason:
            raise StopRequested(f"{self.reason} {where}; nothing is lost. Start the same command again to go on")

    def _watch(self) -> None:
        while True:
            for number in self._reader.recv(16):
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                name = signal.Signals(number).name
                self._signals += 1
                if self._signals > 1:
                    last_words(f"\n{name}: stopping at once")
                    termination.leave(INTERRUPTED, f"{name} a second time: stopped at once")
                    os._exit(INTERRUPTED)
                self.request(name)
                last_words(f"\n{name}: saving at the next step, then stopping (again to stop at once)")
                self.on_signal(name)
