"""Every object is valid for Kubernetes, from the oldest supported version to the newest known."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from scripts.manifests import K8S
from tests.k8s.rendered import (
    ALL,
    FILES,
    JOBS,
    OVERLAYS,
    Object,
    Pods,
    get_name,
    get_only_object,
    list_containers,
    load_documents,
    render_objects,
)

VERSIONS = ("1.30", "1.32", "1.34", utils.latest_version())
# Custom resources, which their own controllers validate.
CUSTOM = {"JobSet", "PodMonitor", "PrometheusRule"}


@pytest.fixture(autouse=True)
def _cached_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "schema_contents", _contents)


_contents = functools.cache(utils.schema_contents)


def faults(tree: Object, version: str) -> str | None:
    """The API server's error, also for unknown fields; None where the object is valid."""
    try:
        kubernetes_validate.validate(tree, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", OVERLAYS)
def test_every_object_is_valid(folder: str, version: str) -> None:
    trees = render_objects(folder)
    assert trees
    for tree in trees:
        if tree["kind"] not in CUSTOM:
            assert faults(tree, version) is None, tree["kind"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_valid(path: Path, version: str) -> None:
    for tree in load_documents(path):
        assert faults(tree, version) is None, tree["kind"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_jobs_of_a_jobset_are_valid(version: str) -> None:
    (replicated,) = get_only_object("overlays/jobset", "JobSet")["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any"}, **replicated["template"]}
    assert faults(job, version) is None


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "backofLimit"), 3, "'backofLimit' was unexpected"),
        (("spec", "backoffLimit"), "3", "'3' is not of type 'integer', 'null'"),
        (("spec", "template", "spec", "containers", 0, "env", 0, "value"), 2, "2 is not of type 'string', 'null'"),
    ],
)  # fmt: skip
def test_the_check_detects_an_error(path: tuple[str | int, ...], value: Any, fault: str) -> None:
    tree = branch = get_only_object("base", "Job")
    for key in path[:-1]:
        branch = branch[key]
    branch[path[-1]] = value
    for version in VERSIONS:
        assert fault in (faults(tree, version) or ""), version


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_the_rules_of_the_api_server_beyond_its_schema(pods: Pods) -> None:
    """https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy"""
    job, spec = pods.job, pods.spec
    assert job is not None
    assert spec["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"  # the only one allowed with a podFailurePolicy
    indexed = job.get("completionMode") == "Indexed"
    assert indexed == ("backoffLimitPerIndex" in job) == ("backoffLimit" not in job)
    if indexed:
        assert job["completions"] >= job["parallelism"] >= 2
        assert pods.is_sweep == ("maxFailedIndexes" not in job) == (job["completions"] > job["parallelism"])
    longest = pods.job_name + (f"-{job['completions'] - 1}" if indexed else "")
    assert len(longest) <= 63  # a host name and a label


def test_names_ports_and_selectors_match() -> None:
    for pods in ALL:
        names = {port["name"] for port in pods.container["ports"]}
        numbers = [port["containerPort"] for port in pods.container["ports"]]
        assert len(names) == len(set(numbers)) == len(numbers)
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            action = pods.container.get(probe, {})
            target = action.get("httpGet") or action.get("tcpSocket")
            assert target is None or target["port"] in names, (pods.overlay, probe)
        shared = "shared" if pods in JOBS else pods.overlay
        accounts = [account["metadata"]["name"] for account in render_objects(shared, "ServiceAccount")]
        assert pods.spec["serviceAccountName"] in accounts
    for folder in set(OVERLAYS) - {"shared"}:
        for service in render_objects(folder, "Service"):
            selector = service["spec"]["selector"].items()
            (chosen,) = [p for p in ALL if p.overlay == folder and selector <= p.labels.items()]
            for port in service["spec"].get("ports", []):
                assert port["targetPort"] in {p["name"] for c in list_containers(chosen.spec) for p in c["ports"]}
        for deployment in render_objects(folder, "Deployment"):
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    claim = yaml.safe_load((K8S / "overlays" / "local" / "runs.yaml").read_text())
    used = [v["persistentVolumeClaim"]["claimName"] for p in ALL for v in p.spec["volumes"]
            if "persistentVolumeClaim" in v]  # fmt: skip
    assert used == [claim["metadata"]["name"]]


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_deleting_a_run_deletes_nothing_that_its_pods_or_another_run_need(pods: Pods) -> None:
    """Pods that end after the deletion of their Job still save: account, names and volumes must outlive it.

    Pods that end need no disruption budget. The policy of several workers is deleted only with its file: the commands
    of the file delete the Job alone.
    """
    kinds = {tree["kind"] for tree in render_objects(pods.overlay)} - {"PodDisruptionBudget"}
    assert kinds - ({"NetworkPolicy"} if pods.workers > 1 else set()) == {pods.owner["kind"]}


def test_the_api_server_rejects_a_job_whose_image_is_not_edited() -> None:
    """An empty image is `Required value` at `kubectl apply`; any other text waits as InvalidImageName or ErrImagePull."""
    for pods in ALL:
        if pods.overlay not in ("overlays/serving", "overlays/local"):
            images = [container["image"].partition("@")[0] for container in list_containers(pods.spec)]
            assert images == [""] + ["tensorflow/serving:2.21.0"] * (pods.overlay == "overlays/serving-log")
    for file, count in (("job.yaml", 1), ("multiworker.yaml", 1), ("tensorrt.yaml", 2)):
        assert (K8S / file).read_text().count('image: "" # EDIT: ') == count


def test_no_image_of_another_project_is_without_a_version() -> None:
    """`latest`, or a tag that moves, would change what runs without a change of the manifest.

    `make pin` adds the digest, which only the registry knows (tests/container/test_pin.py).
    """
    trees = [tree for folder in OVERLAYS for tree in render_objects(folder)] + [
        t for path in FILES for t in load_documents(path)
    ]
    images = {image for tree in trees for image in images_of(tree)} - {"", "kubetune:local"}
    assert {image.partition("@")[0] for image in images} == {
        "tensorflow/serving:2.21.0",
        "nvcr.io/nvidia/tensorrt:25.06-py3",
    }
    for image in images:
        tag = re.fullmatch(r"[\w./-]+:([\w.-]+)(@sha256:[0-9a-f]{64})?", image)
        assert tag, image
        assert re.match(r"v?\d+[.]\d+", tag[1]), image  # a version, not latest, stable or nightly


def images_of(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        yield from [tree["image"]] if isinstance(tree.get("image"), str) and "volumeMounts" in tree else []
        for value in tree.values():
            yield from images_of(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from images_of(item)


@pytest.mark.parametrize("folder", ["overlays/serving", "overlays/serve"])
def test_autoscaler_and_disruption_budget_of_serving_are_consistent(folder: str) -> None:
    deployment, scaler = (
        get_only_object(folder, "Deployment"),
        get_only_object(folder, "HorizontalPodAutoscaler")["spec"],
    )
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    name = deployment["metadata"]["name"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert "replicas" not in deployment["spec"]  # `apply` would undo what the autoscaler did
    assert scaler["minReplicas"] > get_only_object(folder, "PodDisruptionBudget")["spec"]["maxUnavailable"]
    assert get_only_object(folder, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (pods,) = [pods for pods in ALL if pods.overlay == folder]
    assert "cpu" in pods.container["resources"]["requests"]  # utilization is relative to it


def test_the_headless_service_and_the_podmonitor_select_the_pods_of_the_trainer_only() -> None:
    wanted = get_only_object("overlays/monitoring", "PodMonitor")["spec"]["selector"]["matchLabels"]
    trains = {pods.overlay for pods in ALL if wanted.items() <= pods.labels.items()}
    assert trains == {pods.overlay for pods in JOBS} - {"overlays/prepare", "overlays/backbones"}
    assert get_only_object("shared", "Service")["spec"]["selector"] == wanted
