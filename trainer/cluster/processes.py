"""Start a module of this package as another process, or this process anew."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a process that runs a module of this package, in any working directory.

    `python -m` alone searches the working directory first, where a folder `trainer` or a file `json.py` may be.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


def replace_process(
    arguments: Sequence[str], environment: Mapping[str, str], has_stop_request: Callable[[], bool]
) -> NoReturn:
    """Replace this process by the command with which it began, with further arguments; its process ID remains.

    It has the standard streams, and no other descriptor of this one. A SIGTERM meanwhile, and one that this process has
    received (`has_stop_request`), is pending until the new process has a handler (`trainer.cluster.signals`). What
    Python does at the end of a process is not done. Must be called by the main thread.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(FileNotFoundError):  # not on macOS, where libraries leave few open
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # that of the listing
                os.set_inheritable(descriptor, descriptor <= 2)
    if has_stop_request():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:], *arguments], environment)
