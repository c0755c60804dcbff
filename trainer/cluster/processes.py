"""Start a module of this package in another process, or restart this process."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def build_module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment variables of a process that runs a module of this package.

    `module` is a full name such as "trainer.plan". It is imported from this package in any working directory;
    `python -m` alone would first search the working directory, which may have a folder `trainer` or a file `json.py`.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


def replace_process(
    arguments: Sequence[str], environment: Mapping[str, str], has_stop_request: Callable[[], bool]
) -> NoReturn:
    """Replace this process with a new one that has the same process ID and command line, plus additional arguments.

    The new process inherits only the standard streams, no other file descriptors. This process's exit handlers and
    `finally` blocks do not run. A SIGTERM that arrives now, or that this process has already received, is not lost: it
    stays pending until the new process unblocks SIGTERM (`trainer.cluster.signals`). Only the main thread may call
    this.

    Args:
        arguments: arguments to append to this process's command line.
        environment: all environment variables of the new process.
        has_stop_request: returns whether this process has received a stop request that it has not handled.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(FileNotFoundError):  # macOS has no /proc; libraries leave few descriptors open there
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # `listdir` has already closed its own descriptor
                os.set_inheritable(descriptor, descriptor <= 2)
    if has_stop_request():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:], *arguments], environment)
