"""A run as the pods of a Kubernetes Indexed Job: real hosts, real names, and the environment that the Job gives."""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
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
    own: Mapping[int, Sequence[str]] | None = None,
    env: Mapping[int, Mapping[str, str]] | None = None,
    only: Iterable[int] | None = None,
) -> Workers:
    """Start one worker on every host of the network, all with the same command line; the logs go to `folder`.

    `own` and `env` are further overrides and environment variables of single workers. With `only` the other hosts
    stay empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[str]] = []
    count = len(network.hosts)
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
                    name, command(*overrides, *(own or {}).get(index, ())), cwd=ROOT, env=environment,
                    stdout=log, stderr=subprocess.STDOUT, hostname=f"{JOB}-{index}",
                )
            )  # fmt: skip
    return Workers(folder, processes)


def exits(workers: Workers, who: Iterable[int], since: float, seconds: float) -> dict[int, tuple[int, float]]:
    """Wait until these workers have ended: their exit codes, and seconds from `since` (of time.monotonic()) till then.

    Fails, and kills all workers, where one still runs `seconds` after `since`.
    """
    awaited, found = set(who), dict[int, tuple[int, float]]()
    while len(found) < len(awaited):
        for index in awaited - found.keys():
            code = workers[index].poll()
            if code is not None:
                found[index] = code, time.monotonic() - since
        if time.monotonic() - since > seconds:
            said = "\n".join(f"--- {i}: {workers.output(i)[-1500:]}" for i in range(len(workers.processes)))
            workers.kill()
            raise AssertionError(f"after {seconds:.0f} s only these had ended: {found}\n{said}")
        time.sleep(0.01)
    return found
