"""Twenty random calamities on two hosts: the run that goes on ends with the bits of the run that was left alone."""

import json
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
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
HOSTS = names(2)
# Frozen workers and lost links cost the others twenty seconds of silence each: there are fewer of them.
EVENTS = ("SIGTERM",) * 7 + ("SIGKILL",) * 7 + ("SIGSTOP",) * 3 + ("link down",) * 3
RUN = (
    *SHARED, "phases.fine_tune.epochs=80", "runtime.max_restarts_without_progress=50", "runtime.start_timeout=30",
)  # fmt: skip
EXIT_LIMIT = 150.0  # seconds: the longest wait is that for a worker which never comes
KILLED = -signal.SIGKILL


@pytest.mark.timeout(3600)
def test_twenty_calamities_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(SEED)
    exit_seconds = defaultdict[str, list[float]](list)
    attempts = 0

    def tell(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    with Network(HOSTS) as network:

        def start(folder: Path) -> Workers:
            nonlocal attempts
            attempts += 1
            return start_job(network, tmp_path / f"start-{attempts}", *RUN, f"output_dir={folder}")

        began = time.monotonic()
        calm = tmp_path / "calm"
        assert start(calm).wait(600) == [DONE, DONE]
        whole = time.monotonic() - began
        tell(f"\nseed {SEED}; undisturbed the run takes {whole:.0f} s")

        folders = [tmp_path / "run-1"]
        for number, place in enumerate(rng.permutation(len(EVENTS)), 1):
            event = EVENTS[place]
            # Most attempts go on from a checkpoint: half of the whole is what they have before them, more or less.
            victim, moment = int(rng.integers(len(HOSTS))), float(rng.uniform(0.0, 0.5 * whole))
            workers = start(folders[-1])
            while not sleep_or_end(moment, workers):  # the run got to its end: begin another one, to hit something
                assert workers.wait(600) == [DONE, DONE]
                assert_same_run(calm, folders[-1])
                tell(f"    {folders[-1].name} ended well in spite of it; its goodput was {goodput(folders[-1:]):.1%}")
                folders.append(tmp_path / f"run-{len(folders) + 1}")
                workers = start(folders[-1])
            where = last_words(workers, 0)
            silent = not workers.said(victim)
            met = all("workers: all" in workers.said(i) for i in range(len(HOSTS)))
            ended = strike(event, victim, workers, network)
            last = max(seconds for index, (_, seconds) in ended.items() if index != victim or event != "SIGSTOP")
            # Before they have met, the others just go on waiting for the one that is gone.
            exit_seconds[event if met else f"{event} before all had met"].append(last)
            codes = [ended[i][0] for i in range(len(HOSTS))]
            tell(f"{number:2}. {event} of worker {victim} after {moment:.1f} s, while the chief says {where!r}: "
                 f"exit codes {codes}, the last after {last:.1f} s")  # fmt: skip
            for index, code in enumerate(codes):
                possible = {KILLED} if index == victim and event in ("SIGKILL", "SIGSTOP") else {INTERRUPTED}
                if (folders[-1] / "DONE").exists():
                    possible |= {DONE, INTERRUPTED}
                if index == victim and event == "SIGTERM" and silent:  # before the program could ask for signals
                    possible = {-signal.SIGTERM}
                assert code in possible, f"worker {index} ended with {code}:\n{workers.said(index)[-3000:]}"

        assert start(folders[-1]).wait(600) == [DONE, DONE]
        assert_same_run(calm, folders[-1])

    tell(f"{len(EVENTS)} events, {attempts - 1} starts, {len(folders)} runs; goodput {goodput(folders):.1%} "
         f"(undisturbed {goodput([calm]):.1%})")  # fmt: skip
    for event, found in sorted(exit_seconds.items()):
        tell(f"{event}: the last survivor ended after {min(found):.1f} / {statistics.median(found):.1f} / "
             f"{max(found):.1f} s (min / median / max of {len(found)})")  # fmt: skip


def sleep_or_end(seconds: float, workers: Workers) -> bool:
    """Sleep; whether all workers still run then. Returns early when one has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in workers.processes):
            return False
        time.sleep(0.01)
    return True


def strike(event: str, victim: int, workers: Workers, network: Network) -> dict[int, tuple[int, float]]:
    """Let it happen, wait until all have ended, and undo it: exit code, and seconds from the event to it, by worker."""
    everyone, began = range(len(HOSTS)), time.monotonic()
    if event == "link down":
        network.cut(HOSTS[victim])
        ended = exits(workers, everyone, began, EXIT_LIMIT)
        network.join(HOSTS[victim])
        return ended
    workers[victim].send_signal(signal.Signals[event])
    if event != "SIGSTOP":
        return exits(workers, everyone, began, EXIT_LIMIT)
    ended = exits(workers, (i for i in everyone if i != victim), began, EXIT_LIMIT)
    workers[victim].kill()  # as the kubelet does in the end
    return ended | exits(workers, [victim], began, EXIT_LIMIT)


def last_words(workers: Workers, index: int) -> str:
    """What a worker printed last, empty where nothing yet."""
    return (workers.said(index).strip().splitlines() or [""])[-1].strip()[:60]


def goodput(folders: Iterable[Path]) -> float:
    """Share of the time of these runs in which steps were taken that are kept."""
    accounts = [json.loads((folder / "ledger.json").read_text())["seconds"] for folder in folders]
    return sum(account["train"] for account in accounts) / sum(sum(account.values()) for account in accounts)
