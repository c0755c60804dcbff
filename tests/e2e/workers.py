"""Several workers of one run as processes of this machine, configured by TF_CONFIG."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.same_bits import free_ports
from tests.e2e.running import ROOT, SMALL, assert_same_weights, command, train
from tests.waiting import wait_until
from trainer.errors import INTERRUPTED

# A batch that 1, 2, 3 and 4 workers can divide, and one micro-batch size for all of them: the summation order of
# convolution kernels depends on the number of images.
SHARED = (
    *(override for override in SMALL if not override.startswith(("training.batch_size", "runtime.steps_per_call"))),
    "training.batch_size=12",
    "runtime.start_timeout=60",
)

PATIENCE = 600.0  # seconds of waiting for an event, on a machine that is busy with other work


class Workers:
    """Started workers; each logs to a file of its own."""

    def __init__(self, folder: Path, processes: Sequence[subprocess.Popen[str]], addresses: Sequence[str]) -> None:
        self.folder, self.processes, self.addresses = folder, list(processes), tuple(addresses)

    def __getitem__(self, index: int) -> subprocess.Popen[str]:
        return self.processes[index]

    def output(self, index: int) -> str:
        """Output of a worker so far."""
        return (self.folder / f"worker-{index}.log").read_text()

    def start_again(self, index: int) -> None:
        """Start another process of the same index while the first one runs; its own number is the next one."""
        environment = make_environment(self.addresses, index)
        with open(self.folder / f"worker-{len(self.processes)}.log", "w") as log:
            self.processes.append(subprocess.Popen(
                self[index].args, cwd=ROOT, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            ))  # fmt: skip

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Return the exit codes of all workers; after `seconds`, kill the others and fail."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a worker hangs; output of worker 0:\n{self.output(0)[-2000:]}") from None
        finally:
            self.kill()

    def wait_for(self, text: str, index: int = 0, seconds: float = PATIENCE) -> None:
        """Wait until the output of a worker contains `text`."""
        self.wait_until(lambda: text in self.output(index), f"{text!r} in the output of worker {index}", seconds)

    def wait_until(self, true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Wait until a condition is true; fail, and kill all workers, after `seconds` or when all have ended."""

        def is_true() -> bool:
            all_ended = all(p.poll() is not None for p in self.processes)
            result = true()
            assert result or not all_ended, f"all workers have ended: {what}"
            return result

        try:
            wait_until(is_true, what, seconds)
        except AssertionError as error:
            codes = [p.poll() for p in self.processes]
            self.kill()
            outputs = "\n".join(f"--- {i}: {self.output(i)[-1500:]}" for i in range(len(self.processes)))
            raise AssertionError(f"{error}; exit codes {codes}\n{outputs}") from None

    def terminate(self, index: int = 0, seconds: float = PATIENCE) -> None:
        """Send SIGTERM to a worker; assert that all end as interrupted."""
        self[index].send_signal(signal.SIGTERM)
        assert set(self.wait(seconds)) == {INTERRUPTED}, self.output(index)

    def kill(self) -> None:
        """Kill (SIGKILL) all workers that run or are stopped."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def make_environment(addresses: Sequence[str], index: int) -> dict[str, str]:
    """Environment of a worker."""
    task = {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task)}


def start_workers(
    folder: Path, count: int, *overrides: str, own: dict[int, Sequence[str]] | None = None, size: int | None = None
) -> Workers:
    """Start `count` of the `size` workers of a run (None: all); `own` has further overrides of single workers."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(size or count)]
    processes = []
    for index in range(count):
        environment = make_environment(addresses, index)
        with open(folder / f"worker-{index}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    command(*overrides, *(own or {}).get(index, ())), cwd=ROOT, env=environment, text=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return Workers(folder, processes, addresses)


def train_alone_and_by_two(folder: Path, *overrides: str) -> tuple[Path, Path]:
    """Train with one worker in two micro-batches and with two workers; assert equal weights; return both outputs."""
    one, two = folder / "one", folder / "two"
    train(*overrides, "training.accumulate=2", f"runtime.cache_dir={folder}/cache-alone", f"output_dir={one}")
    own = {i: [f"runtime.cache_dir={folder}/cache-{i}"] for i in range(2)}
    workers = start_workers(folder / "workers", 2, *overrides, f"output_dir={two}", own=own)
    assert workers.wait(400) == [0, 0], workers.output(0)
    assert_same_weights(one, two)
    return one, two
