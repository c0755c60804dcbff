"""Simulated cluster for one Job: its nodes are network hosts, its bucket is the emulator on another, its pods processes.

It implements the scheduler (every pod has a node), the kubelet (`tests.k8s.container`; probes, grace periods), the
Service's DNS and the Job controller (`tests.k8s.controller`, without the pause before a replacement). Pods of one index
run on the same host, one after the other, and so have the same address, unlike real pods.
"""

import contextlib
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.e2e.running import by_step
from tests.hosts.network import Network
from tests.k8s import controller
from tests.k8s.container import Container, start
from tests.k8s.controller import JobCondition, RunningPod, TerminatedPod
from tests.k8s.rendered import Pods
from tests.storage.emulator import Emulator
from tests.waiting import wait_until

STORAGE, STORAGE_PORT = "storage", 4443  # the first host: 10.77.0.2, as in tests/k8s/overlays/common
PROBE = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3}  # the defaults of Kubernetes
KINDS = ("startupProbe", "livenessProbe")


@dataclass
class ProbeState:
    """Results of the current probe of a container; `due` is a moment of time.monotonic()."""

    due: float
    kind: str = KINDS[0]
    failures: int = 0  # in a row
    successes: int = 0


@dataclass(eq=False)
class Pod:
    name: str
    host: str
    index: int
    container: Container
    probe: ProbeState
    conditions: set[str] = field(default_factory=set)  # those that are true, such as DisruptionTarget
    deleted: bool = False  # by `Cluster.delete`
    sigterm_time: float | None = None  # when SIGTERM was sent, by time.monotonic()
    reason: str = ""  # of SIGTERM

    @property
    def exit_code(self) -> int:
        code = self.container.exit_code
        assert code is not None, f"pod {self.name} still runs"
        return code


class Cluster:
    """Runs a Job inside a `with` block; its processes are killed at the end, and their files remain in `folder`."""

    def __init__(self, job: Pods, folder: Path) -> None:
        assert job.job is not None
        assert job.job.get("completionMode") == "Indexed" or job.count == 1
        self.job, self.spec, self.folder = job, job.job, folder
        subdomain = f".{job.spec['subdomain']}" if "subdomain" in job.spec else ""
        count = job.job["completions"] if job.indexed else job.count
        self.hosts = [job.hostname(index) + subdomain for index in range(count)]
        self.network = Network([STORAGE, *self.hosts])
        self.pods: list[Pod] = []  # all, running and terminated
        self.terminated: list[Pod] = []  # in the order of termination
        self.condition: JobCondition | None = None
        self.storage = Emulator(folder / "objects", self.network.hosts[STORAGE].address, STORAGE_PORT)

    def __enter__(self) -> Self:
        self.network.__enter__()
        for host in self.hosts:
            self.network.forget(host)  # a name is published with its pod
        self.network.inside(STORAGE, self.storage.start)
        self.network.inside(STORAGE, self.storage.make_bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self.network.__exit__()

    # Interface of the tests --------------------------------------------------------------------------------------

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = 500) -> None:
        """Run the cluster until `reached()`. Fails when the Job ends before that."""
        self._run_until(lambda: reached() or self.condition is not None, what, seconds)
        assert reached(), f"{what} not reached; {self.condition}\n{self.describe()}"

    def finish(self, seconds: float = 900) -> JobCondition:
        """Run the cluster until the Job and all its pods have ended."""
        self._run_until(lambda: self.condition is not None and not self.running, "the end of the Job", seconds)
        assert self.condition is not None
        return self.condition

    def _run_until(self, reached: Callable[[], bool], what: str, seconds: float) -> None:
        def step() -> bool:
            if not (is_reached := reached()):
                self._reconcile()
            return is_reached

        wait_until(step, lambda: f"{what}\n{self.describe()}", seconds)

    def preempt(self, index: int) -> Pod:
        """Disrupt a pod as the scheduler, a drain or an eviction does: set the condition, then delete the pod."""
        pod = self.pod(index)
        pod.conditions.add("DisruptionTarget")
        self.delete(pod)
        return pod

    def delete(self, pod: Pod) -> None:
        """As `kubectl delete pod`: SIGTERM, and after the grace period SIGKILL."""
        pod.deleted = True
        self._terminate(pod, "deleted")

    def pod(self, index: int = 0) -> Pod:
        (running,) = [pod for pod in self.running if pod.index == index]
        return running

    def log(self, index: int = 0) -> str:
        """Log of the newest pod of an index."""
        logs = [pod.container.log for pod in self.pods if pod.index == index]
        return logs[-1] if logs else ""

    @property
    def running(self) -> list[Pod]:
        """Pods whose termination has not been observed."""
        return [pod for pod in self.pods if pod not in self.terminated]

    def download(self, address: str, to: Path) -> Path:
        """Copy a folder of the bucket, gs://BUCKET/..., with its checkpoints under the names of a local run."""
        source = self.storage.folder / address.removeprefix("gs://")
        for file in source.rglob("*"):
            if file.is_file():  # folders of deleted objects remain
                (to / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to / file.relative_to(source))
        return by_step(to)

    def describe(self) -> str:
        """State, termination message and end of the log of every pod."""
        return "\n".join(
            f"--- {pod.name}: exit code {pod.container.exit_code} {pod.reason} {sorted(pod.conditions)}; "
            f"{pod.probe}; message {pod.container.message!r}\n{pod.container.log[-2000:]}"
            for pod in self.pods
        )

    # Control loops -----------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        self.terminated += [pod for pod in self.running if pod.container.exit_code is not None]
        for pod in self.running:
            self._run_kubelet(pod)
        for host in {pod.host for pod in self.pods} - {pod.host for pod in self.running}:
            self.network.forget(host)
        name = self.job.container["name"]
        terminated = [
            TerminatedPod(f"default/{pod.name}", pod.index, {name: pod.exit_code}, frozenset(pod.conditions))
            for pod in self.terminated
        ]
        self.condition = self.condition or controller.find_final_condition(self.spec, terminated)
        if self.condition:
            for pod in self.running:
                self.delete(pod)
            return
        running = [RunningPod(pod.index, pod.deleted) for pod in self.running]
        for index in controller.list_indexes_to_start(self.spec, terminated, running):
            self._start(index)

    def _start(self, index: int) -> None:
        name = f"{self.job.job_name}-{index}-{len(self.pods):05}"
        host = self.hosts[index]
        container = start(
            self.network, host, self.job.hostname(index), self.folder / "pods" / name, self.job.spec,
            self.job.environment(index), self.job.arguments(index),
        )  # fmt: skip
        self.pods.append(Pod(name, host, index, container, ProbeState(time.monotonic())))
        if self.job.published:
            self.network.remember(host)

    def _terminate(self, pod: Pod, reason: str) -> None:
        if pod.sigterm_time is None:
            pod.sigterm_time, pod.reason = time.monotonic(), reason
            pod.container.send(signal.SIGTERM)

    def _run_kubelet(self, pod: Pod) -> None:
        now, state = time.monotonic(), pod.probe
        if pod.sigterm_time is not None:
            if now - pod.sigterm_time > self.job.spec["terminationGracePeriodSeconds"]:
                pod.container.send(signal.SIGKILL)
            return
        if state.kind == KINDS[0] and (state.successes or KINDS[0] not in self.job.container):
            state = pod.probe = ProbeState(state.due, KINDS[1])
        if state.kind not in self.job.container or now < state.due:
            return
        probe = PROBE | self.job.container[state.kind]
        state.due = now + probe["periodSeconds"]
        if self._probe_succeeds(pod, probe):
            state.failures, state.successes = 0, state.successes + 1
        else:
            state.failures += 1
            if state.failures >= probe["failureThreshold"]:
                self._terminate(pod, f"failed its {state.kind}")

    def _probe_succeeds(self, pod: Pod, probe: dict[str, Any]) -> bool:
        """Send the request of the kubelet from the node, to the pod's address."""
        (port,) = [p["containerPort"] for p in self.job.container["ports"] if p["name"] == probe["httpGet"]["port"]]
        url = f"http://{self.network.hosts[pod.host].address}:{port}{probe['httpGet']['path']}"

        def request() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]):
                return True  # 4xx and 5xx are errors
            return False

        return self.network.inside(pod.host, request)
