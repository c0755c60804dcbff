"""Random faults on several hosts: the resumed run ends with the same bits as an undisturbed one.

Once on two hosts, and once with virtual replicas on one, two or four of four hosts, a number that each start chooses.
"""

import json
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.running import assert_same_run
from tests.e2e.workers import SHARED, Workers
from tests.hosts.jobs import exits, names, start_job
from tests.hosts.network import Network, needs_root
from trainer.errors import DONE, INTERRUPTED

pytestmark = [needs_root, pytest.mark.slow]

SEED = 7
# Stopped workers and lost links cost the others a heartbeat timeout of twenty seconds each: there are fewer of them.
EVENTS = ("SIGTERM",) * 7 + ("SIGKILL",) * 7 + ("SIGSTOP",) * 3 + ("link down",) * 3
LIMITS = ("runtime.max_restarts_without_progress=50", "runtime.start_timeout=30")
RUN = (*SHARED, *LIMITS, "phases.fine_tune.epochs=80")
# Steps of 16 images in four parts, of live images with mixup, and statistics of normalization over the parts.
VIRTUAL = (
    *(override for override in SHARED if not override.startswith("training.batch_size")), *LIMITS,
    "training.batch_size=16", "training.virtual_replicas=4", "augmentation=light", "augmentation.mixup=0.3",
    "phases.fine_tune.epochs=40", "phases.fine_tune.batch_norm=train", "training.clip_norm=1",
)  # fmt: skip
EXIT_LIMIT = 150.0  # seconds: the longest wait is for a worker that never connects
KILLED = -signal.SIGKILL


@pytest.mark.timeout(3600)
def test_twenty_faults_change_no_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        chaos(tmp_path, RUN, EVENTS, [2])


@pytest.mark.timeout(3600)
def test_faults_and_another_number_of_workers_after_each_change_no_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        chaos(tmp_path, VIRTUAL, ("SIGTERM",) * 4 + ("SIGKILL",) * 4 + ("link down",), [1, 2, 4])


def chaos(tmp_path: Path, overrides: Sequence[str], events: Sequence[str], numbers: Sequence[int]) -> None:
    """Train undisturbed on the largest number of workers, and again with events, each on one of these `numbers`."""
    rng = np.random.default_rng(SEED)
    exit_seconds = defaultdict[str, list[float]](list)
    starts, hosts = 0, names(max(numbers))

    with Network(hosts) as network:

        def start(folder: Path, count: int = len(hosts)) -> Workers:
            nonlocal starts
            starts += 1
            return start_job(network, tmp_path / f"start-{starts}", *overrides, f"output_dir={folder}", count=count)

        began = time.monotonic()
        undisturbed = tmp_path / "undisturbed"
        assert set(start(undisturbed).wait(900)) == {DONE}
        whole = time.monotonic() - began
        print(f"\nseed {SEED}; undisturbed the run takes {whole:.0f} s on {len(hosts)} workers", flush=True)

        folders = [tmp_path / "run-1"]
        for number, event in enumerate(rng.permutation(events), 1):
            # Most starts resume from a checkpoint, with about half of the run remaining.
            count = int(rng.choice(numbers)) if len(numbers) > 1 else numbers[0]
            victim, moment = int(rng.integers(count)), float(rng.uniform(0.0, 0.5 * whole))
            workers = start(folders[-1], count)
            while not sleep_or_end(moment, workers):  # the run is done: the fault hits another one
                assert set(workers.wait(600)) == {DONE}
                assert_same_run(undisturbed, folders[-1])
                print(f"    {folders[-1].name} is done; its goodput was {goodput(folders[-1:]):.1%}", flush=True)
                folders.append(tmp_path / f"run-{len(folders) + 1}")
                workers = start(folders[-1], count)
            activity = (workers.output(0).strip().splitlines() or [""])[-1].strip()[:60]
            started = bool(workers.output(victim))
            connected = all("workers: all" in workers.output(i) for i in range(count))
            ended = strike(event, victim, workers, network, hosts[:count])
            last = max(seconds for index, (_, seconds) in ended.items() if index != victim or event != "SIGSTOP")
            # Before the rendezvous the other worker waits for the missing one.
            exit_seconds[event if connected else f"{event} before the rendezvous"].append(last)
            codes = [ended[i][0] for i in range(count)]
            print(f"{number:2}. {event} of worker {victim} of {count} after {moment:.1f} s, last line of the chief "
                  f"{activity!r}: exit codes {codes}, the last after {last:.1f} s", flush=True)  # fmt: skip
            for index, code in enumerate(codes):
                possible = {KILLED} if index == victim and event in ("SIGKILL", "SIGSTOP") else {INTERRUPTED}
                if (folders[-1] / "DONE").exists():
                    possible |= {DONE, INTERRUPTED}
                if index == victim and event == "SIGTERM" and not started:  # before a handler was installed
                    possible = {-signal.SIGTERM}
                assert code in possible, f"worker {index} ended with {code}:\n{workers.output(index)[-3000:]}"

        assert set(start(folders[-1]).wait(900)) == {DONE}
        assert_same_run(undisturbed, folders[-1])

    print(f"{len(events)} events, {starts - 1} starts, {len(folders)} runs; goodput {goodput(folders):.1%} "
          f"(undisturbed {goodput([undisturbed]):.1%})", flush=True)  # fmt: skip
    for event, times in sorted(exit_seconds.items()):
        print(f"{event}: the last survivor ended after {min(times):.1f} / {statistics.median(times):.1f} / "
              f"{max(times):.1f} s (min / median / max of {len(times)})", flush=True)  # fmt: skip


def sleep_or_end(seconds: float, workers: Workers) -> bool:
    """Sleep; True if all workers still run then. Returns early when one has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in workers.processes):
            return False
        time.sleep(0.01)
    return True


def strike(
    event: str, victim: int, workers: Workers, network: Network, hosts: Sequence[str]
) -> dict[int, tuple[int, float]]:
    """Cause an event, wait until all have ended, and undo it: exit code and seconds since the event, by worker."""
    everyone, began = range(len(hosts)), time.monotonic()
    if event == "link down":
        network.cut(hosts[victim])
        ended = exits(workers, everyone, began, EXIT_LIMIT)
        network.join(hosts[victim])
        return ended
    workers[victim].send_signal(signal.Signals[event])
    if event != "SIGSTOP":
        return exits(workers, everyone, began, EXIT_LIMIT)
    ended = exits(workers, (i for i in everyone if i != victim), began, EXIT_LIMIT)
    workers[victim].kill()  # as the kubelet does after the grace period
    return ended | exits(workers, [victim], began, EXIT_LIMIT)


def goodput(folders: Iterable[Path]) -> float:
    """Fraction of the time of these runs that was spent on steps that count."""
    breakdowns = [json.loads((folder / "ledger.json").read_text())["seconds"] for folder in folders]
    return sum(seconds["train"] for seconds in breakdowns) / sum(sum(seconds.values()) for seconds in breakdowns)
