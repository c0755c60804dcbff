"""Run a command of this package in a child process, because TensorFlow can be configured only once per process."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import trainer
from trainer.errors import BUG, TrainerError

# Environment variables that a command does not inherit: they would make a run wait for other workers (read by
# `trainer.cluster.discovery`), or select one job of a sweep (`trainer.cli.sweep`).
CLUSTER_VARIABLES = (
    "TF_CONFIG",
    "WORKER_COUNT",
    "JOB_COMPLETION_INDEX",
    "JOB_INDEX",
    "REPLICATED_JOB_REPLICAS",
    "SWEEP_JOB",
)
_PREFIXES = ("error: ", "interrupted: ", "drift: ", "refused: ", "unreadable: ")  # prefixes of a command's last message
MAX_LINES = 40  # number of last log lines that are retained, to extract the reason for a failure


class CommandFailed(TrainerError):
    """A command ended with an exit code other than 0."""

    def __init__(self, problem: str, exit_code: int) -> None:
        """Create the error. `problem` is the command's last message."""
        super().__init__(problem)
        self.exit_code = exit_code


def run_command(module: str, arguments: Sequence[str], show_log: bool) -> list[str]:
    """Run `python -m MODULE ARGUMENTS`, and return the last `MAX_LINES` lines of its log.

    A KeyboardInterrupt is passed to the command as SIGINT. It is raised again after the command has stopped.

    Args:
        module: name of the module, such as "trainer.evaluate".
        arguments: command-line arguments.
        show_log: print the log to `sys.stdout`.

    Raises:
        CommandFailed: the exit code is not 0. If a signal ended the command, the error's `exit_code` is 1.
        KeyboardInterrupt: the call was interrupted.
    """
    environment = {name: value for name, value in os.environ.items() if name not in CLUSTER_VARIABLES}
    package_parent = str(Path(trainer.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    lines: deque[str] = deque(maxlen=MAX_LINES)
    interrupted = False
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        process_group=0,  # otherwise Ctrl-C in a terminal would reach the command twice: directly and from here
    ) as process:
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    lines.append(line.rstrip("\n"))
                    if show_log:
                        print(line, end="")
                exit_code = process.wait()
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                interrupted = True
            except BaseException:
                process.terminate()
                raise
    if interrupted:
        raise KeyboardInterrupt
    if exit_code != 0:
        raise CommandFailed(find_reason(list(lines)) or f"ended with {exit_code}", exit_code if exit_code > 0 else BUG)
    return list(lines)


def find_reason(lines: Sequence[str]) -> str:
    """Extract a failed command's last message from the lines of its log.

    The message begins with an outcome such as "error: ", which is removed, and may have several lines. If the log has
    no such message, return its last three lines, or "" if it is empty.
    """
    for i in range(len(lines) - 1, -1, -1):
        if prefix := next((outcome for outcome in _PREFIXES if lines[i].startswith(outcome)), None):
            return "\n".join([lines[i].removeprefix(prefix), *lines[i + 1 :]])
    return "\n".join(lines[-3:])
