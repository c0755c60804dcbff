"""Signal handlers. In training, the first SIGTERM or SIGINT sets a flag, and the second ends the process at once."""

import select
import signal
import socket
import threading
from collections.abc import Callable

from trainer.errors import INTERRUPTED, StopRequested
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import exit_at_once, log_unbuffered

STOP_TIMEOUT_SECONDS = 90.0  # of one step after a stop request; a pod is killed after 120 s (k8s/base/job.yaml)
RETRY = "start the same command again, nothing is lost"


def exit_on_sigterm() -> None:
    """Install a SIGTERM handler that exits at once with code 75, while there is nothing to save.

    Without a handler the kernel drops the signal for the first process of a container (`man 7 pid_namespaces`), and the
    pod would run until the end of its grace period.
    """

    def end(_signum: int, _frame: object) -> None:
        log_unbuffered(f"interrupted: SIGTERM; {RETRY}")
        exit_at_once(INTERRUPTED)

    signal.signal(signal.SIGTERM, end)
    _unblock()


def _unblock() -> None:
    """Let SIGTERM in, which `trainer.cluster.processes.replace_process` has blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def ignore_sigterm() -> None:
    """Ignore SIGTERM during shutdown, when Python's restored default handler would let a finished run fail."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_without_progress(end: Callable[[int, str], None], message: str, seconds: float = STOP_TIMEOUT_SECONDS) -> None:
    """Call `end` with exit code 75 and the message if there is no progress in the next `seconds`; returns at once."""

    def check() -> None:
        if health.seconds_since_progress >= seconds:
            end(INTERRUPTED, message)

    timer = threading.Timer(seconds, check)
    timer.daemon = True
    timer.start()


class StopFlag:
    """A flag that a signal to this process or a stop request of another worker sets.

    A Python signal handler runs only when the main thread returns from TensorFlow, perhaps many steps later. Therefore
    a thread reads signal numbers from the wake-up file descriptor and sets the flag at once. The compiled training step
    reads the flag.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # of the first stop request
        self.on_signal: Callable[[str], None] = lambda _name: None  # called for the first signal, after the flag is set
        self.on_request: Callable[[str], None] = lambda _reason: None  # called once, for the first stop request
        self.unread, self._writer = socket.socketpair()  # carries signal numbers that no thread has read yet
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self.install()

    def install(self) -> None:
        """Install the handlers; call it again after TensorFlow's coordination service has replaced them."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda _signum, _frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        _unblock()

    def request(self, reason: str) -> None:
        """Set the flag; later reasons are ignored."""
        if self.reason is None:
            self.reason = reason
            self.on_request(reason)

    def has_request(self) -> bool:
        """Return whether the flag is set, or will be because a signal has been received."""
        return self.reason is not None or bool(select.select([self.unread], [], [], 0)[0])

    def check(self, when: str) -> None:
        """Record progress, and raise StopRequested if the flag is set. For loops that have nothing to save."""
        health.record_progress()
        if self.reason:
            raise StopRequested(f"{self.reason} {when}", fix=RETRY)

    def _watch(self) -> None:
        count = 0  # of signals to this process, without stop requests of peers
        readable = select.poll()
        readable.register(self.unread, select.POLLIN)
        while True:
            readable.poll()  # `recv` alone would consume signals before it has the GIL, and hide them from the watchdog
            for signum in self.unread.recv(16):
                if signum not in (signal.SIGTERM, signal.SIGINT):
                    continue
                name = signal.Signals(signum).name
                count += 1
                if count > 1:
                    log_unbuffered(f"\n{name}: stopping at once")
                    termination.write(INTERRUPTED, f"{name} a second time: stopped at once")
                    exit_at_once(INTERRUPTED)
                self.request(name)
                log_unbuffered(f"\n{name}: saving at the next step, then stopping (again to stop at once)")
                self.on_signal(name)
