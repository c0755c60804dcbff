"""Stop requests: the first SIGTERM or SIGINT sets a flag, the second ends the process at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable

from trainer.errors import INTERRUPTED, StopRequested
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import last_words

RETRY = "start the same command again, nothing is lost"


def end_at_once() -> None:
    """Let SIGTERM end the process at once with exit code 75; for commands that have nothing to save.

    The kernel drops a signal to the first process of a container that has no handler for it, so that the pod would run
    until the end of its grace period (`man 7 pid_namespaces`).
    """

    def end(_number: int, _frame: object) -> None:
        last_words(f"interrupted: SIGTERM; {RETRY}")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGTERM, end)


def ignore_sigterm() -> None:
    """Ignore SIGTERM, so that the exit code no longer changes.

    Python restores the default handlers before it shuts down TensorFlow; a signal then would fail a finished run.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopFlag:
    """A flag that is set by a signal to this process or by a stop request of another worker.

    A Python handler runs only when the main thread returns from TensorFlow, perhaps many steps later. So a thread reads
    the signal's number from the wake-up pipe and sets the flag at once; the compiled step reads the flag.

    Attributes:
        reason: why to stop; None without a request.
        on_signal: called with the reason after a signal to this process.
        on_request: called once with the reason of the first request.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.on_signal: Callable[[str], None] = lambda _reason: None
        self.on_request: Callable[[str], None] = lambda _reason: None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._signals = 0  # to this process, not counting stop requests of peers
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self.install()

    def install(self) -> None:
        """Install the handlers; again after the strategy exists, as TensorFlow's coordination service replaces them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def request(self, reason: str) -> None:
        """Set the flag; later reasons are ignored."""
        if self.reason is None:
            self.reason = reason
            self.on_request(reason)

    def check(self, where: str) -> None:
        """Raise StopRequested if the flag is set; for loops that wait with a time limit and have nothing to save."""
        health.progress()
        if self.reason:
            raise StopRequested(f"{self.reason} {where}", fix=RETRY)

    def _watch(self) -> None:
        while True:
            for number in self._reader.recv(16):
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                name = signal.Signals(number).name
                self._signals += 1
                if self._signals > 1:
                    last_words(f"\n{name}: stopping at once")
                    termination.write(INTERRUPTED, f"{name} a second time: stopped at once")
                    os._exit(INTERRUPTED)
                self.request(name)
                last_words(f"\n{name}: saving at the next step, then stopping (again to stop at once)")
                self.on_signal(name)
