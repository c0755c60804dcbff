"""Run a command of this package in a process of its own: TensorFlow and signal handlers are set up once per process."""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import trainer
from trainer.errors import BUG, TrainerError

# Variables by which a run would wait for other workers, or run one job of a sweep (`cluster.discovery`, `cli.sweep`).
OF_CLUSTERS = ("TF_CONFIG", "WORKER_COUNT", "JOB_COMPLETION_INDEX", "JOB_INDEX", "REPLICATED_JOB_REPLICAS", "SWEEP_JOB")
_OUTCOMES = ("error: ", "interrupted: ", "drift: ", "refused: ", "unreadable: ")  # beginnings of the last message
MAX_LINES = 40  # at the end of the log, in which the reason of a failure is searched for


class CommandFailed(TrainerError):
    """A command ended with another exit code than 0."""

    def __init__(self, problem: str, exit_code: int) -> None:
        """Create the error; `problem` is the last message of the command."""
        super().__init__(problem)
        self.exit_code = exit_code


def run_command(module: str, arguments: Sequence[str], show_log: bool) -> list[str]:
    """Run `python -m MODULE` with arguments, and return the last lines of its log.

    An interruption (KeyboardInterrupt) is passed to the command as SIGINT, and this waits until it has stopped.

    Raises:
        CommandFailed: its exit code is not 0.
        KeyboardInterrupt: again, after the command has stopped.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_CLUSTERS}
    package = str(Path(trainer.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
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
        process_group=0,  # so that Ctrl-C in a terminal reaches it once, from here
    ) as process:
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    lines.append(line.rstrip("\n"))
                    if show_log:
                        print(line, end="")
                code = process.wait()
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                interrupted = True
            except BaseException:
                process.terminate()
                raise
    if interrupted:
        raise KeyboardInterrupt
    if code != 0:
        raise CommandFailed(find_reason(list(lines)) or f"ended with {code}", code if code > 0 else BUG)
    return list(lines)


def find_reason(lines: Sequence[str]) -> str:
    """Return the last message of a log with its continuation lines, without the outcome; "" if there is none."""
    for i in range(len(lines) - 1, -1, -1):
        if outcome := next((text for text in _OUTCOMES if lines[i].startswith(text)), None):
            return "\n".join([lines[i].removeprefix(outcome), *lines[i + 1 :]])
    return "\n".join(lines[-3:])
