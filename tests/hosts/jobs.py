"""A run as the pods of a Kubernetes Indexed Job: network hosts, host names, and the environment that a Job sets."""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.e2e.running import ROOT, command
from tests.e2e.workers import Workers
from tests.hosts.network import Network

JOB, SERVICE, PORT = "train", "train-workers", 2222


def names(count: int) -> list[str]:
    """The host names of a Job's pods, by index."""
    return [f"{JOB}-{i}.{SERVICE}" for i in range(count)]


def start_job(
    network: Network,
    folder: Path,
    *overrides: str,
    env: Mapping[int, Mapping[str, str]] | None = None,
    only: Iterable[int] | None = None,
    count: int | None = None,
) -> Workers:
    """Start one worker per host of the network, or of `only`, with the same command line and logs in `folder`.

    `env` has additional environment variables by worker. `count` is the number of workers of the Job, on the first
    hosts; by default all hosts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[str]] = []
    count = count or len(network.hosts)
    for index, name in enumerate(names(count)):
        if only is not None and index not in only:
            continue
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TF_CONFIG"},
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "JOB_NAME": JOB, "SERVICE_NAME": SERVICE,
            "WORKER_COUNT": str(count), "JOB_COMPLETION_INDEX": str(index), **(env or {}).get(index, {}),
        }  # fmt: skip
        with open(folder / f"worker-{len(processes)}.log", "w") as log:
            processes.append(
                network.popen(
                    name, command(*overrides), cwd=ROOT, env=environment,
                    stdout=log, stderr=subprocess.STDOUT, hostname=f"{JOB}-{index}",
                )
            )  # fmt: skip
    return Workers(folder, processes, [f"{name}:{PORT}" for name in names(count)])


def exits(workers: Workers, indexes: Iterable[int], since: float, seconds: float) -> dict[int, tuple[int, float]]:
    """Wait until these workers have ended: exit code, and seconds since `since` (of time.monotonic()), by worker.

    Fails, and kills all workers, where one still runs `seconds` after `since`.
    """
    awaited, ends = set(indexes), dict[int, tuple[int, float]]()
    while len(ends) < len(awaited):
        for index in awaited - ends.keys():
            code = workers[index].poll()
            if code is not None:
                ends[index] = code, time.monotonic() - since
        if time.monotonic() - since > seconds:
            logs = "\n".join(f"--- {i}: {workers.output(i)[-1500:]}" for i in range(len(workers.processes)))
            workers.kill()
            raise AssertionError(f"after {seconds:.0f} s only these had ended: {ends}\n{logs}")
        time.sleep(0.01)
    return ends
