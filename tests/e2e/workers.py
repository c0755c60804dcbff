"""Several workers of one run as processes of this machine, each told by TF_CONFIG who it is."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.same_bits import free_ports
from tests.e2e.running import ROOT, assert_same_weights, command, run

# As `running.SMALL`, with a batch that 1, 2, 3 and 4 workers can share, and pieces of the same size for all of them:
# the kernels of a convolution add up in another order for another number of images.
SHARED = (
    "experiment=quickstart",
    "debug.max_examples=90",
    "training.batch_size=12",
    "training.ema=0.9",
    "phases.head.epochs=2",
    "phases.fine_tune.epochs=2",
    "phases.fine_tune.thaw=from_block:block_13",
    "runtime.checkpoint_every='4 steps'",
    "runtime.log_every='4 steps'",
    "runtime.start_timeout=60",
    "export.formats=[saved_model]",
)


class Workers:
    """Started workers; what each prints goes to a file of its own."""

    def __init__(self, folder: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.folder, self.processes = folder, list(processes)

    def __getitem__(self, index: int) -> subprocess.Popen[str]:
        return self.processes[index]

    def said(self, index: int) -> str:
        """Everything a worker printed so far."""
        return (self.folder / f"worker-{index}.log").read_text()

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit codes of all workers; kills what is left after `seconds` and fails."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a worker hangs; worker 0 said:\n{self.said(0)[-2000:]}") from None
        finally:
            self.kill()

    def wait_for(self, text: str, index: int = 0, seconds: float = 120) -> None:
        """Until a worker has printed `text`."""
        self.wait_until(lambda: text in self.said(index), f"worker {index} to say {text!r}", seconds)

    def wait_until(self, true: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            ended = [p.poll() for p in self.processes]
            if time.monotonic() > deadline or all(code is not None for code in ended):
                said = "\n".join(f"--- {i}: {self.said(i)[-1500:]}" for i in range(len(self.processes)))
                self.kill()
                raise AssertionError(f"waited in vain for {what}; exit codes {ended}\n{said}")
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 whatever still runs, frozen or not."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def start_workers(
    folder: Path, count: int, *overrides: str, own: dict[int, Sequence[str]] | None = None, size: int | None = None
) -> Workers:
    """Start `count` workers of a run of `size` (all of them when None); `own` are further overrides of single ones."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(size or count)]
    processes = []
    for index in range(count):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task),
        }  # fmt: skip
        with open(folder / f"worker-{index}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    command(*overrides, *(own or {}).get(index, ())), cwd=ROOT, env=environment, text=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return Workers(folder, processes)


def train_alone_and_by_two(folder: Path, *overrides: str) -> tuple[Path, Path]:
    """Train the same with one worker in two pieces and with two workers, a cache for each: bit for bit the same weights.

    Returns:
        the output folders of the one and of the two.
    """
    one, two = folder / "one", folder / "two"
    pieces = ("training.accumulate=2", f"runtime.cache_dir={folder}/cache-alone")  # of the size that a worker has
    alone = run(*overrides, *pieces, f"output_dir={one}")
    assert alone.returncode == 0, alone.stderr
    own = {i: [f"runtime.cache_dir={folder}/cache-{i}"] for i in range(2)}
    workers = start_workers(folder / "workers", 2, *overrides, f"output_dir={two}", own=own)
    assert workers.wait(400) == [0, 0], workers.said(0)
    assert_same_weights(one, two)
    return one, two
