"""Signal handlers. With a `StopFlag`, the first SIGTERM or SIGINT requests a stop, and the second exits the process."""

import select
import signal
import socket
import threading
from collections.abc import Callable

from trainer.errors import INTERRUPTED, StopRequested
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import exit_at_once, log_unbuffered

STOP_TIMEOUT_SECONDS = 90.0  # maximum time of one step after a stop request; a pod is killed after 120 s (k8s/base)
RETRY = "start the same command again, nothing is lost"  # fix in messages about an interruption


def exit_on_sigterm() -> None:
    """Install a SIGTERM handler that exits immediately with code 75, for use while there is nothing to save.

    Without a handler the kernel ignores SIGTERM for the first process of a container (`man 7 pid_namespaces`), and the
    pod would run until the end of its grace period.
    """

    def end(_signum: int, _frame: object) -> None:
        log_unbuffered(f"interrupted: SIGTERM; {RETRY}")
        exit_at_once(INTERRUPTED)

    signal.signal(signal.SIGTERM, end)
    _unblock_sigterm()


def _unblock_sigterm() -> None:
    """Unblock SIGTERM, which is blocked if `trainer.cluster.processes.replace_process` has started this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def ignore_sigterm() -> None:
    """Ignore SIGTERM: at shutdown Python restores the default handler, and a finished run would appear failed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_without_progress(end: Callable[[int, str], None], message: str, seconds: float = STOP_TIMEOUT_SECONDS) -> None:
    """Call `end` with exit code 75 and `message` if no progress is recorded in the next `seconds`.

    Returns immediately: a timer thread calls `end`. Waiting for a peer (`health.waiting_for`) counts as progress.
    """

    def check() -> None:
        if health.seconds_since_progress >= seconds:
            end(INTERRUPTED, message)

    timer = threading.Timer(seconds, check)
    timer.daemon = True
    timer.start()


class StopFlag:
    """A flag that training should stop, set by a signal to this process or by another worker's stop request.

    Python runs a signal handler only when the main thread returns from TensorFlow, which can take many steps.
    Therefore the handlers do nothing: a thread reads the signal numbers from the wake-up file descriptor and sets the
    flag immediately. The compiled training step reads the flag.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # the first stop request's reason, such as "SIGTERM"; None without a request
        self.on_signal: Callable[[str], None] = lambda _name: None  # called for the first signal, after the flag is set
        self.on_request: Callable[[str], None] = lambda _reason: None  # called once, when the flag is set
        self.unread, self._writer = socket.socketpair()  # the wake-up pipe: signal numbers that no thread has read yet
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        self.install()

    def install(self) -> None:
        """Install the signal handlers, in the main thread.

        Must be called again after TensorFlow has started, because its coordination service replaces the handlers.
        """
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda _signum, _frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        _unblock_sigterm()

    def request(self, reason: str) -> None:
        """Set the flag, after a signal or a peer's stop request. Only the first reason is recorded."""
        if self.reason is None:
            self.reason = reason
            self.on_request(reason)

    def has_request(self) -> bool:
        """Return whether the flag is set, or a signal has arrived that no thread has read yet."""
        return self.reason is not None or bool(select.select([self.unread], [], [], 0)[0])

    def check(self, when: str) -> None:
        """Record progress, and raise StopRequested if the flag is set. Loops that have nothing to save call this.

        `when` completes the message, as in "SIGTERM before training".
        """
        health.record_progress()
        if self.reason:
            raise StopRequested(f"{self.reason} {when}", fix=RETRY)

    def _watch(self) -> None:
        """Set the flag at the first SIGTERM or SIGINT, and exit the process at the second one. Runs in a thread."""
        num_signals = 0  # signals to this process; peers' stop requests do not count
        readable = select.poll()
        readable.register(self.unread, select.POLLIN)
        while True:
            readable.poll()  # `recv` alone would consume signals before it has the GIL: the watchdog could not see them
            for signum in self.unread.recv(16):
                if signum not in (signal.SIGTERM, signal.SIGINT):
                    continue
                name = signal.Signals(signum).name
                num_signals += 1
                if num_signals > 1:
                    log_unbuffered(f"\n{name}: stopping at once")
                    termination.write(INTERRUPTED, f"{name} a second time: stopped at once")
                    exit_at_once(INTERRUPTED)
                self.request(name)
                log_unbuffered(f"\n{name}: saving at the next step, then stopping (again to stop at once)")
                self.on_signal(name)
