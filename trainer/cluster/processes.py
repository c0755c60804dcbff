"""Start a module of this package in another process, or restart this process."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a process that runs a module of this package.

    The module is imported from this package in any working directory. `python -m` alone would search the working
    directory first, which may have a folder `trainer` or a file `json.py`.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


def replace_process(
    arguments: Sequence[str], environment: Mapping[str, str], has_stop_request: Callable[[], bool]
) -> NoReturn:
    """Replace this process by a new one with the same process ID and command, and with additional arguments.

    The new process inherits the standard streams and no other file descriptor. Exit handlers and `finally` blocks of
    this process do not run. A SIGTERM that arrives now, or that this process has already received, is not lost: it
    stays blocked until the new process installs a handler (`trainer.cluster.signals`). Only the main thread may call
    this.

    Args:
        arguments: appended to the command line of this process.
        environment: all environment variables of the new process.
        has_stop_request: returns whether this process has received a stop request that it has not handled.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(FileNotFoundError):  # macOS has no /proc; libraries leave few descriptors open there
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the descriptor of the listing itself is closed
                os.set_inheritable(descriptor, descriptor <= 2)
    if has_stop_request():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:], *arguments], environment)
