"""Rendered manifests, and the pods that they define."""

import copy
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.manifests import K8S, render

OVERLAYS = ["shared", "base", *sorted(f"overlays/{folder.name}" for folder in (K8S / "overlays").iterdir())]
FILES = [*sorted(K8S.glob("*.yaml")), K8S / "overlays" / "local" / "runs.yaml"]  # applied alone
Object = dict[str, Any]


@functools.cache
def _rendered(folder: str) -> list[Object]:
    return render(folder)


def render_objects(folder: str, kind: str | None = None) -> list[Object]:
    """Return the objects that `kubectl apply -k k8s/<folder>` applies, or only those of this kind."""
    return [copy.deepcopy(tree) for tree in _rendered(folder) if kind in (None, tree["kind"])]


def load_documents(path: Path) -> list[Object]:
    """Load the objects that `kubectl apply -f <path>` applies."""
    return list(yaml.safe_load_all(path.read_text()))


def list_containers(spec: Object) -> list[Object]:
    """List all containers of a pod's spec."""
    return [c for kind in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(kind, [])]


def get_only_object(folder: str, kind: str) -> Object:
    (tree,) = render_objects(folder, kind)
    return tree


@dataclass(frozen=True)
class Pods:
    """The pods of one object."""

    overlay: str
    owner: Object
    template: Object  # metadata and spec of each
    job: Object | None  # the spec of their Job; None for a Deployment
    job_name: str  # in the cluster

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        return container

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the manifest, and those that Kubernetes adds."""
        labels = dict(self.template["metadata"].get("labels", {}))
        if self.job is not None:
            labels |= {
                "batch.kubernetes.io/job-name": self.job_name,
                "batch.kubernetes.io/controller-uid": "4f1c3a52-0000-4000-8000-2d5b8a6f0001",
            }
        if self.owner["kind"] == "JobSet":
            (replicated,) = self.owner["spec"]["replicatedJobs"]
            labels |= {
                "jobset.sigs.k8s.io/jobset-name": self.owner["metadata"]["name"],
                "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
                "jobset.sigs.k8s.io/replicatedjob-replicas": str(replicated.get("replicas", 1)),
                "jobset.sigs.k8s.io/job-index": "0",
            }
        return labels

    @property
    def count(self) -> int:
        return (self.job or {}).get("parallelism", 1)

    @property
    def workers(self) -> int:
        """Number of workers of one run."""
        return self.count if any(port["name"] == "workers" for port in self.container["ports"]) else 1

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.container["args"]

    @property
    def indexed(self) -> bool:
        return self.job is not None and self.job.get("completionMode") == "Indexed"

    def hostname(self, index: int = 0) -> str:
        """Host name of a pod: ends in its index, or in a random suffix where the Job is not Indexed."""
        return f"{self.job_name}-{index}" if self.indexed else f"{self.job_name}-x7k2p"

    @property
    def published(self) -> bool:
        """True if a headless Service publishes the names HOSTNAME.SUBDOMAIN, also before the pods are ready."""
        return any(
            service["metadata"]["name"] == self.spec.get("subdomain")
            and service["spec"]["clusterIP"] == "None"
            and service["spec"].get("publishNotReadyAddresses") is True
            and service["spec"]["selector"].items() <= self.labels.items()
            for service in render_objects("shared", "Service")
        )

    def environment(self, index: int = 0) -> dict[str, str]:
        """Environment of the process of pod `index`."""
        environment: dict[str, str] = {}
        labels = self.labels | ({"batch.kubernetes.io/job-completion-index": str(index)} if self.indexed else {})
        for variable in self.container.get("env", []):
            if "value" in variable:
                environment[variable["name"]] = expand_variables(variable["value"], environment)
            elif "resourceFieldRef" in variable["valueFrom"]:
                kind, _, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
                environment[variable["name"]] = str(parse_bytes(self.container["resources"][kind][resource]))
            else:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
                assert match, path
                environment[variable["name"]] = labels[match[1]]
        if self.indexed:
            environment["JOB_COMPLETION_INDEX"] = str(index)
        return environment

    def arguments(self, index: int = 0) -> list[str]:
        return [expand_variables(argument, self.environment(index)) for argument in self.container["args"]]


def parse_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(float(number) * {"Mi": 2**20, "Gi": 2**30}[unit])


def expand_variables(text: str, environment: Mapping[str, str]) -> str:
    """Replace `$(NAME)` as the kubelet does; an unknown name is left as it is."""
    return re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda match: environment.get(match[1], match[0]), text)


def list_pods(folder: str) -> Iterator[Pods]:
    """List the pods of an overlay, one of each pod template."""
    for owner in render_objects(folder):
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


def local_job(name: str) -> Pods:
    """The pods of tests/k8s/overlays/NAME: an overlay of k8s/ with the changes that this machine needs."""
    (pods,) = list_pods(os.path.relpath(Path(__file__).parent / "overlays" / name, K8S))
    return pods


ALL = [pods for folder in OVERLAYS for pods in list_pods(folder)]
JOBS = [pods for pods in ALL if pods.job is not None]  # those that run the trainer


def get_name(pods: Pods) -> str:
    return pods.overlay.removeprefix("overlays/")
