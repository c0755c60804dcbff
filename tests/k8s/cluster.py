"""A cluster for one Job: its nodes are hosts of a network, its bucket is the emulator on another, its pods processes.

It plays the scheduler (every pod has a node), the kubelet (`tests.k8s.container`; probes, grace periods), the Service's
DNS and the Job controller (`tests.k8s.controller`, though it starts replacements at once). Pods of one index run on the
same host, one after the other, and so have the same address, which real ones have not.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e.running import by_step
from tests.hosts.network import Network
from tests.k8s import controller
from tests.k8s.container import Container, start
from tests.k8s.controller import Alive, Ended, Verdict
from tests.k8s.rendered import Pods
from tests.storage.emulator import Emulator

STORAGE, STORAGE_PORT = "storage", 4443  # the first host: 10.77.0.2, as the overlays in tests/k8s/overlays say
PROBE = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3}  # what Kubernetes takes where nothing is said
KINDS = ("startupProbe", "livenessProbe")


@dataclass
class Probing:
    """How the probes of a container went so far."""

    due: float
    kind: str = KINDS[0]
    failures: int = 0
    answers: int = 0
    missed: int = 0  # in all


@dataclass(eq=False)
class Pod:
    """One pod; `told` and `deleted` are moments of time.monotonic()."""

    name: str
    host: str
    index: int
    container: Container
    probing: Probing
    conditions: set[str] = field(default_factory=set)
    deleted: float | None = None
    told: float | None = None  # to end, whoever wanted it
    why: str = ""

    @property
    def exit_code(self) -> int:
        code = self.container.exit_code
        assert code is not None, f"pod {self.name} still runs"
        return code


class Cluster:
    """Runs a Job inside a `with` block; afterwards all its processes are gone, and what they left is in `folder`."""

    def __init__(self, job: Pods, folder: Path) -> None:
        assert job.job is not None
        assert job.job.get("completionMode") == "Indexed" or job.count == 1
        self.job, self.spec, self.folder = job, job.job, folder
        self.hosts = [self._host(index) for index in range(job.count)]
        self.network = Network([STORAGE, *self.hosts])
        self.pods: list[Pod] = []  # all that there ever were
        self.ended: list[Pod] = []  # in the order in which that was seen
        self.verdict: Verdict | None = None
        address = self.network.hosts[STORAGE].address
        self.storage = Emulator(folder / "objects", address, STORAGE_PORT)

    def _host(self, index: int) -> str:
        """The name that DNS has for a pod, if any Service publishes it."""
        name = self.job.hostname(index)
        return f"{name}.{self.job.spec['subdomain']}" if "subdomain" in self.job.spec else name

    def __enter__(self) -> Cluster:
        self.network.__enter__()
        for host in self.hosts:
            self.network.forget(host)  # a name is published with its pod
        self.network.inside(STORAGE, self.storage.start)
        self.network.inside(STORAGE, self.storage.make_bucket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.network.__exit__(kind, error, trace)

    # What a test does --------------------------------------------------------------------------------------------

    def until(self, true: Callable[[], bool], what: str, seconds: float = 500) -> None:
        """Let the cluster work until something is true. Fails when the Job ends before that."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline or self.verdict:
                raise AssertionError(f"waited in vain for {what}; {self.verdict}\n{self.story()}")
            self._work()
            time.sleep(0.02)

    def finish(self, seconds: float = 900) -> Verdict:
        """Let it work until the Job has ended, and its pods with it."""
        deadline = time.monotonic() + seconds
        while self.verdict is None or self.alive:
            assert time.monotonic() < deadline, f"the Job does not end\n{self.story()}"
            self._work()
            time.sleep(0.02)
        return self.verdict

    def preempt(self, index: int) -> Pod:
        """What the scheduler, a drain or an eviction does: say so in a condition, and delete the pod."""
        pod = self.pod(index)
        pod.conditions.add("DisruptionTarget")
        self.delete(pod)
        return pod

    def delete(self, pod: Pod) -> None:
        """As `kubectl delete pod`: SIGTERM, and after the grace period SIGKILL."""
        pod.deleted = pod.deleted or time.monotonic()
        self._end(pod, "deleted")

    def pod(self, index: int = 0) -> Pod:
        """The one of this index that runs."""
        (found,) = [pod for pod in self.alive if pod.index == index]
        return found

    def said(self, index: int = 0) -> str:
        """What the newest pod of an index printed."""
        logs = [pod.container.log for pod in self.pods if pod.index == index]
        return logs[-1] if logs else ""

    @property
    def alive(self) -> list[Pod]:
        """Those whose end has not been seen."""
        return [pod for pod in self.pods if pod not in self.ended]

    def fetched(self, address: str, to: Path) -> Path:
        """A folder of the bucket, gs://BUCKET/..., the checkpoints under the names of a local run."""
        source = self.storage.folder / address.removeprefix("gs://")
        for file in source.rglob("*"):
            if file.is_file():  # folders of deleted objects stay
                (to / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to / file.relative_to(source))
        return by_step(to)

    def story(self) -> str:
        """What became of all pods."""
        return "\n".join(
            f"--- {pod.name}: exit code {pod.container.exit_code} {pod.why} {sorted(pod.conditions)}; "
            f"{pod.probing}; message {pod.container.message!r}\n{pod.container.log[-2000:]}"
            for pod in self.pods
        )

    # What the cluster does ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        self.ended += [pod for pod in self.alive if pod.container.exit_code is not None]
        for pod in self.alive:
            self._watch(pod)
        there = {pod.host for pod in self.alive}
        for pod in self.pods:
            if pod.host not in there:
                self.network.forget(pod.host)
        ended = [
            Ended(f"default/{pod.name}", pod.index, {self.job.container["name"]: pod.exit_code}, frozenset(pod.conditions))
            for pod in self.ended
        ]  # fmt: skip
        self.verdict = self.verdict or controller.verdict(self.spec, ended)
        if self.verdict:
            for pod in self.alive:
                self.delete(pod)
            return
        alive = [Alive(pod.index, pod.deleted is not None) for pod in self.alive]
        for index in controller.to_start(self.spec, ended, alive):
            self._start(index)

    def _start(self, index: int) -> None:
        name = f"{self.job.named}-{index}-{len(self.pods):05}"
        host = self.hosts[index]
        container = start(
            self.network, host, self.job.hostname(index), self.folder / "pods" / name, self.job.spec,
            self.job.environment(index), self.job.arguments(index),
        )  # fmt: skip
        self.pods.append(Pod(name, host, index, container, Probing(time.monotonic())))
        if self.job.published:
            self.network.remember(host)

    def _end(self, pod: Pod, why: str) -> None:
        if pod.told is None:
            pod.told, pod.why = time.monotonic(), why
            pod.container.send(signal.SIGTERM)

    def _watch(self, pod: Pod) -> None:
        now = time.monotonic()
        if pod.told is not None:
            if now - pod.told > self.job.spec["terminationGracePeriodSeconds"]:
                pod.container.send(signal.SIGKILL)
            return
        probe: dict[str, Any] | None = self.job.container.get(pod.probing.kind)
        if probe is None:
            if pod.probing.kind == KINDS[0]:
                pod.probing = Probing(now, KINDS[1])
            return
        probe = PROBE | probe
        if now < pod.probing.due:
            return
        pod.probing.due = now + probe["periodSeconds"]
        if self._answers(pod, probe):
            pod.probing.failures, pod.probing.answers = 0, pod.probing.answers + 1
            if pod.probing.kind == KINDS[0]:
                pod.probing = Probing(now, KINDS[1], missed=pod.probing.missed)
        else:
            pod.probing.failures += 1
            pod.probing.missed += 1
            if pod.probing.failures >= probe["failureThreshold"]:
                self._end(pod, f"failed its {pod.probing.kind}")

    def _answers(self, pod: Pod, probe: dict[str, Any]) -> bool:
        """The kubelet asks from the node, by the pod's address."""
        (port,) = [p["containerPort"] for p in self.job.container["ports"] if p["name"] == probe["httpGet"]["port"]]
        url = f"http://{self.network.hosts[pod.host].address}:{port}{probe['httpGet']['path']}"

        def ask() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]):
                return True  # 4xx and 5xx are errors
            return False

        return self.network.inside(pod.host, ask)
