"""The manifests as a cluster would get them, and the pods in them."""

import copy
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.manifests import K8S, rendered

OVERLAYS = ["base", *sorted(f"overlays/{folder.name}" for folder in (K8S / "overlays").iterdir())]
Object = dict[str, Any]


@functools.cache
def _rendered(folder: str) -> list[Object]:
    return rendered(folder)


def objects(folder: str, kind: str | None = None) -> list[Object]:
    """What `kubectl apply -k k8s/<folder>` applies."""
    return [copy.deepcopy(tree) for tree in _rendered(folder) if kind in (None, tree["kind"])]


def the(folder: str, kind: str) -> Object:
    """The only object of a kind."""
    (found,) = objects(folder, kind)
    return found


@dataclass(frozen=True)
class Pods:
    """The pods that one object makes.

    Attributes:
        template: metadata and spec of each.
        job: the spec of the Job that makes them; None for a Deployment.
        named: the name of the Job as the cluster gives it.
    """

    overlay: str
    owner: Object
    template: Object
    job: Object | None
    named: str

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def container(self) -> Object:
        """Each pod here has one."""
        (found,) = self.spec["containers"]
        return found

    @property
    def labels(self) -> dict[str, str]:
        """Those of the manifest and those that Kubernetes adds."""
        found = dict(self.template["metadata"].get("labels", {}))
        if self.job is not None:
            found |= {
                "batch.kubernetes.io/job-name": self.named,
                "batch.kubernetes.io/controller-uid": "4f1c3a52-0000-4000-8000-2d5b8a6f0001",
            }
        if self.owner["kind"] == "JobSet":
            (replicated,) = self.owner["spec"]["replicatedJobs"]
            found |= {
                "jobset.sigs.k8s.io/jobset-name": self.owner["metadata"]["name"],
                "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
                "jobset.sigs.k8s.io/replicatedjob-replicas": str(replicated.get("replicas", 1)),
                "jobset.sigs.k8s.io/job-index": "0",
            }
        return found

    @property
    def count(self) -> int:
        """How many pods run at once."""
        return (self.job or {}).get("parallelism", 1)

    def hostname(self, index: int = 0) -> str:
        """What a pod calls itself; without an index its name, of which a few letters are made up by Kubernetes."""
        indexed = self.job is not None and self.job.get("completionMode") == "Indexed"
        return f"{self.named}-{index}" if indexed else f"{self.named}-x7k2p"

    @property
    def published(self) -> bool:
        """Whether a headless Service gives the pods the names HOSTNAME.SUBDOMAIN, also before they are ready."""
        return any(
            service["metadata"]["name"] == self.spec.get("subdomain")
            and service["spec"]["clusterIP"] == "None"
            and service["spec"].get("publishNotReadyAddresses") is True
            and service["spec"]["selector"].items() <= self.labels.items()
            for service in objects(self.overlay, "Service")
        )

    def environment(self, index: int = 0) -> dict[str, str]:
        """What the process of pod `index` is given."""
        found: dict[str, str] = {}
        for variable in self.container.get("env", []):
            if "value" in variable:
                found[variable["name"]] = expanded(variable["value"], found)
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
                assert match, path
                found[variable["name"]] = self.labels[match[1]]
        if self.job is not None and self.job.get("completionMode") == "Indexed":
            found["JOB_COMPLETION_INDEX"] = str(index)
        return found

    def arguments(self, index: int = 0) -> list[str]:
        """The command line after the entry point."""
        return [expanded(argument, self.environment(index)) for argument in self.container["args"]]


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` is replaced as the kubelet does it; an unknown name stays."""
    return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda match: environment.get(match[1], match[0]), text)


def pods_of(folder: str) -> Iterator[Pods]:
    """Every kind of pod that an overlay makes."""
    for owner in objects(folder):
        name, spec = owner["metadata"]["name"], owner.get("spec", {})
        if owner["kind"] == "Job":
            yield Pods(folder, owner, spec["template"], spec, name)
        elif owner["kind"] == "CronJob":
            job = spec["jobTemplate"]["spec"]
            yield Pods(folder, owner, job["template"], job, f"{name}-29731680")
        elif owner["kind"] == "JobSet":
            for replicated in spec["replicatedJobs"]:
                job = replicated["template"]["spec"]
                yield Pods(folder, owner, job["template"], job, f"{name}-{replicated['name']}-0")
        elif "template" in spec:
            yield Pods(folder, owner, spec["template"], None, name)


def here(name: str) -> Pods:
    """The pods of tests/k8s/overlays/NAME, which changes in one of ours what must differ on this machine."""
    (found,) = pods_of(os.path.relpath(Path(__file__).parent / "overlays" / name, K8S))
    return found


ALL = [pods for folder in OVERLAYS for pods in pods_of(folder)]
JOBS = [pods for pods in ALL if pods.job is not None]  # those that run the trainer


def name_of(pods: Pods) -> str:
    """For the names of tests."""
    return pods.overlay.removeprefix("overlays/")
