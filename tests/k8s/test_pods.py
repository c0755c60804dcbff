"""Every pod satisfies the Pod Security Standard *restricted*, and its volumes, resources and probes are consistent."""

import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainer
from scripts import manifests
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
    parse_bytes,
    render_objects,
)

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def handlers_of(container: Object) -> Iterator[Object]:
    for probe in PROBES:
        yield container.get(probe, {})
    yield from container.get("lifecycle", {}).values()


def breaches(spec: Object, annotations: dict[str, str]) -> list[str]:
    """The controls of *restricted*, which include those of *baseline*, that a pod violates.

    Stricter where the manifests set nothing: AppArmor, SELinux, procMount and sysctls must have their defaults.
    https://kubernetes.io/docs/concepts/security/pod-security-standards
    """
    pod = spec.get("securityContext", {})
    own = [(c, c.get("securityContext", {})) for c in list_containers(spec)]
    contexts = [pod, *(context for _, context in own)]

    def holds(context: Object, name: str, wanted: Any) -> bool:
        """True if the container's setting, by default the pod's, has this value."""
        return context.get(name, pod.get(name)) == wanted

    satisfied = {
        "host namespaces": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "host process": not any(c.get("windowsOptions", {}).get("hostProcess") for c in contexts),
        "privileged": not any(context.get("privileged") for _, context in own),
        "capabilities": all(
            "ALL" in context.get("capabilities", {}).get("drop", [])
            and set(context["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"}
            for _, context in own
        ),
        "volume types": all((v.keys() - {"name"}) <= VOLUMES for v in spec.get("volumes", [])),
        "host ports": not any(port.get("hostPort") for c, _ in own for port in c.get("ports", [])),
        "host probes": not any(
            action.get(kind, {}).get("host")
            for c, _ in own
            for action in handlers_of(c)
            for kind in ("httpGet", "tcpSocket")
        ),
        "AppArmor": not any(c.get("appArmorProfile") for c in contexts)
        and not any(name.startswith("container.apparmor.") for name in annotations),
        "SELinux": not any(c.get("seLinuxOptions") for c in contexts),
        "proc mount": not any(c.get("procMount") for c in contexts),
        "sysctls": not pod.get("sysctls"),
        "privilege escalation": all(context.get("allowPrivilegeEscalation") is False for _, context in own),
        "not root": all(holds(context, "runAsNonRoot", True) for _, context in own),
        "user": all(c.get("runAsUser") != 0 for c in contexts),
        "seccomp": all(
            context.get("seccompProfile", pod.get("seccompProfile", {})).get("type") in ("RuntimeDefault", "Localhost")
            for _, context in own
        ),
    }
    return [control for control, holds_here in satisfied.items() if not holds_here]


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_pod_security_restricted(pods: Pods) -> None:
    assert breaches(pods.spec, pods.template["metadata"].get("annotations", {})) == []


CONTAINER = ("containers", 0, "securityContext")


@pytest.mark.parametrize(
    ("path", "value", "control"),
    [
        (("hostNetwork",), True, "host namespaces"),
        (("securityContext", "windowsOptions"), {"hostProcess": True}, "host process"),
        ((*CONTAINER, "privileged"), True, "privileged"),
        ((*CONTAINER, "capabilities"), {}, "capabilities"),
        ((*CONTAINER, "capabilities"), {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "capabilities"),
        (("volumes", 0), {"name": "cache", "hostPath": {"path": "/"}}, "volume types"),
        (("containers", 0, "ports", 0, "hostPort"), 80, "host ports"),
        (("containers", 0, "livenessProbe", "httpGet", "host"), "10.0.0.1", "host probes"),
        (("securityContext", "appArmorProfile"), {"type": "Unconfined"}, "AppArmor"),
        (("securityContext", "seLinuxOptions"), {"user": "root"}, "SELinux"),
        ((*CONTAINER, "procMount"), "Unmasked", "proc mount"),
        (("securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}], "sysctls"),
        ((*CONTAINER, "allowPrivilegeEscalation"), None, "privilege escalation"),
        (("securityContext", "runAsNonRoot"), None, "not root"),
        ((*CONTAINER, "runAsNonRoot"), False, "not root"),
        ((*CONTAINER, "runAsUser"), 0, "user"),
        (("securityContext", "seccompProfile"), {}, "seccomp"),
        (("initContainers",), [{"name": "more", "securityContext": {}}], "capabilities"),
    ],
)  # fmt: skip
def test_the_check_detects_a_breach(path: tuple[str | int, ...], value: Any, control: str) -> None:
    spec = branch = copy.deepcopy(JOBS[0].spec)
    for key in path[:-1]:
        branch = branch[key]
    branch[path[-1]] = value
    assert control in breaches(spec, {})


def test_the_check_detects_an_old_apparmor_annotation() -> None:
    annotation = {"container.apparmor.security.beta.kubernetes.io/trainer": "unconfined"}
    assert breaches(JOBS[0].spec, annotation) == ["AppArmor"]


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_a_pod_is_unprivileged_and_has_no_token_and_no_variables_of_services(pods: Pods) -> None:
    assert pods.container["securityContext"]["readOnlyRootFilesystem"] is True
    context = pods.spec["securityContext"]
    assert {context["runAsUser"], context["runAsGroup"], context.get("fsGroup", 65532)} == {65532}
    readable = {"emptyDir", "configMap"}  # by every user
    assert "fsGroup" in context or all(readable & volume.keys() for volume in pods.spec["volumes"])
    assert "/tmp" in [mount["mountPath"] for mount in pods.container["volumeMounts"]]
    assert pods.spec["automountServiceAccountToken"] is False
    assert pods.spec["enableServiceLinks"] is False  # they would be variables that the trainer reads


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_every_mount_has_a_volume_and_every_volume_is_mounted(pods: Pods) -> None:
    volumes = [volume["name"] for volume in pods.spec["volumes"]]
    mounts = [mount["name"] for mount in pods.container["volumeMounts"]]
    assert sorted(volumes) == sorted(mounts)
    paths = [mount["mountPath"] for mount in pods.container["volumeMounts"]]
    assert len(set(paths)) == len(paths)
    for volume in pods.spec["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"], volume


def gibibytes(quantity: str) -> float:
    return parse_bytes(quantity) / 2**30


def test_requests_and_limits_of_files() -> None:
    for tree in (tree for path in FILES for tree in load_documents(path) if tree["kind"] == "Job"):
        check_resources(tree["spec"]["template"]["spec"])


def check_resources(spec: Object) -> None:
    for container in list_containers(spec):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert 0 < cores(requests["cpu"]) < cores(limits["cpu"])  # room for the decoding of images
        assert 0 < gibibytes(requests["memory"]) <= gibibytes(limits["memory"])
        assert 0 < gibibytes(requests["ephemeral-storage"]) <= gibibytes(limits["ephemeral-storage"])


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_requests_and_limits(pods: Pods) -> None:
    check_resources(pods.spec)
    limits = pods.container["resources"]["limits"]
    in_memory = [v["emptyDir"]["sizeLimit"] for v in pods.spec["volumes"] if v.get("emptyDir", {}).get("medium")]
    assert sum(map(gibibytes, in_memory)) <= gibibytes(limits["memory"])  # it counts as the container's
    on_disk = [
        v["emptyDir"]["sizeLimit"] for v in pods.spec["volumes"] if not v.get("emptyDir", {"medium": 1}).get("medium")
    ]
    assert sum(map(gibibytes, on_disk)) <= gibibytes(limits["ephemeral-storage"])  # so does this


def cores(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


def quantities_of(tree: Any) -> Iterator[tuple[str, Any]]:
    """The quantities in an object: values of `requests`, `limits` and `sizeLimit`."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("requests", "limits"):
                yield from value.items()
            elif key == "sizeLimit":
                yield key, value
            else:
                yield from quantities_of(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from quantities_of(item)


APPLIED = [*(pytest.param(render_objects(folder), id=folder) for folder in OVERLAYS),
           *(pytest.param(load_documents(path), id=path.name) for path in FILES)]  # fmt: skip


@pytest.mark.parametrize("trees", APPLIED)
def test_a_second_apply_changes_no_quantity(trees: list[Object]) -> None:
    """`kubectl apply` compares with what the API server returns: text in canonical form. It would patch a number."""
    for name, value in quantities_of(trees):
        assert isinstance(value, str), (name, value)
        assert re.fullmatch(r"[1-9]\d{0,2}m?|[1-9]\d{0,2}(Mi|Gi)", value), (name, value)


RECOMMENDED = {"name", "instance", "component", "part-of", "version"}
LABELS = {"app.kubernetes.io/part-of": "kubetune", "app.kubernetes.io/version": trainer.__version__}


@pytest.mark.parametrize("trees", APPLIED)
def test_every_object_has_the_recommended_labels(trees: list[Object]) -> None:
    for tree in trees:
        labels = tree["metadata"]["labels"]
        assert labels.items() >= LABELS.items(), (tree["kind"], tree["metadata"]["name"])
        assert labels.keys() >= {f"app.kubernetes.io/{name}" for name in RECOMMENDED}, tree["kind"]


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_pods_and_their_owner_have_the_recommended_labels(pods: Pods) -> None:
    labels = pods.template["metadata"]["labels"]
    assert labels.keys() == {f"app.kubernetes.io/{name}" for name in RECOMMENDED}
    assert labels["app.kubernetes.io/instance"] == pods.owner["metadata"]["name"]
    assert labels.items() >= LABELS.items()
    assert pods.owner["metadata"]["labels"].items() >= labels.items()


def test_only_the_monitoring_and_workers_of_the_same_run_may_connect_to_the_pods_of_runs() -> None:
    spec = get_only_object("shared", "NetworkPolicy")["spec"]
    (selected,) = spec["podSelector"]["matchExpressions"]
    assert (selected["key"], selected["operator"]) == ("app.kubernetes.io/name", "In")
    assert {pods.labels["app.kubernetes.io/name"] for pods in JOBS} == set(selected["values"])
    others = {pods.labels["app.kubernetes.io/name"] for pods in ALL if pods not in JOBS}
    assert others.isdisjoint(selected["values"])  # clients connect to these
    assert spec["policyTypes"] == ["Ingress"]  # buckets and the registry of weights stay reachable
    (monitoring,) = spec["ingress"]
    for pods in JOBS:
        assert {port["name"]: port["containerPort"] for port in pods.container["ports"]}["http"] == 8080
    assert monitoring["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert [source.keys() for source in monitoring["from"]] == [{"namespaceSelector"}]
    for pods in JOBS:
        policies = render_objects(pods.overlay, "NetworkPolicy")
        assert len(policies) == (pods.workers > 1), pods.overlay
        for policy in policies:
            chosen = policy["spec"]["podSelector"]["matchLabels"]
            assert policy["spec"]["policyTypes"] == ["Ingress"]
            assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": chosen}}]}]  # all ports
            assert chosen.items() <= pods.labels.items()
            assert chosen["app.kubernetes.io/instance"] == policy["metadata"]["name"] == pods.owner["metadata"]["name"]
            # Deleting the policy of a run must not delete that of all runs, which has another name.
            assert policy["metadata"]["name"] != get_only_object("shared", "NetworkPolicy")["metadata"]["name"]


def test_a_renamed_run_has_a_policy_of_its_own() -> None:
    """Each document of the file has its own `&run`: a name that is changed in one of them only would close the ports."""
    text = (K8S / "multiworker.yaml").read_text()
    assert text.count("name: &run kubetune") == 2
    job, policy = yaml.safe_load_all(text.replace("&run kubetune", "&run flowers"))
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert (job["metadata"]["name"], policy["metadata"]["name"]) == ("flowers", "flowers")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["spec"]["ingress"][0]["from"][0]["podSelector"] == policy["spec"]["podSelector"]
    assert labels["app.kubernetes.io/instance"] == "flowers"


@pytest.mark.parametrize("pods", ALL, ids=get_name)
def test_a_gpu_is_requested_together_with_the_toleration_of_its_node(pods: Pods) -> None:
    gpus = pods.container["resources"]["limits"].get("nvidia.com/gpu", 0)
    tolerated = "nvidia.com/gpu" in [toleration["key"] for toleration in pods.spec.get("tolerations", [])]
    assert bool(gpus) == tolerated
    assert bool(gpus) == (pods in JOBS and pods.overlay not in ("overlays/local", "overlays/prepare"))


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_a_job_has_shared_memory_a_grace_period_and_probes(pods: Pods) -> None:
    shared = [mount["name"] for mount in pods.container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in pods.spec["volumes"] if volume["name"] in shared]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert pods.spec["terminationGracePeriodSeconds"] >= 60
    assert pods.container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    for probe in ("startupProbe", "livenessProbe"):
        assert pods.container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert pods.job is not None
    assert pods.owner["spec"].get("ttlSecondsAfterFinished", pods.job.get("ttlSecondsAfterFinished", 0)) >= 86400


def affinity_of(pods: Pods, kind: str) -> tuple[list[Object], list[Object]]:
    """The required and the preferred terms of an affinity."""
    rules = pods.spec.get("affinity", {}).get(kind, {})
    preferred = rules.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return rules.get("requiredDuringSchedulingIgnoredDuringExecution", []), [t["podAffinityTerm"] for t in preferred]


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_workers_of_a_run_are_near_to_each_other_on_different_nodes(pods: Pods) -> None:
    apart, _ = affinity_of(pods, "podAntiAffinity")
    required, near = affinity_of(pods, "podAffinity")
    together = pods.workers > 1
    assert [term["topologyKey"] for term in apart] == ["kubernetes.io/hostname"] * together
    assert required == []  # one zone or block may not have enough nodes
    assert ("topology.kubernetes.io/zone" in [term["topologyKey"] for term in near]) == together
    for term in (*apart, *near):  # of this run only: another one may use the same nodes
        assert term["labelSelector"]["matchLabels"] == {"app.kubernetes.io/instance": pods.owner["metadata"]["name"]}


QUEUE = "kueue.x-k8s.io/queue-name"


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_all_pods_of_several_workers_start_together(pods: Pods) -> None:
    """Kueue admits the pods of a Job together; two Jobs that have some of their pods each would wait for each other."""
    queued = pods.workers > 1 or pods.is_sweep or pods.overlay == "overlays/kueue"
    assert pods.owner["metadata"]["labels"].get(QUEUE) == ("kubetune" if queued else None)
    assert "suspend" not in (pods.job or {})  # Kueue's webhook sets it


def test_a_protected_run_is_not_disturbed() -> None:
    (pods,) = [pods for pods in JOBS if pods.overlay == "overlays/protected"]
    assert pods.template["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    (priority,) = load_documents(K8S / "priorityclass.yaml")
    assert pods.spec["priorityClassName"] == priority["metadata"]["name"]
    assert 0 < priority["value"] < 10**9  # above other pods, below those of the system
    assert priority["preemptionPolicy"] == "Never"
    budget = get_only_object(pods.overlay, "PodDisruptionBudget")
    assert budget["metadata"]["name"] == pods.owner["metadata"]["name"]  # one per run
    assert budget["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/instance": pods.owner["metadata"]["name"]}
    assert budget["spec"]["selector"]["matchLabels"].items() <= pods.labels.items()
    assert budget["spec"]["minAvailable"] > pods.count  # no eviction is allowed
    for other in JOBS:
        if other is not pods:
            assert "annotations" not in other.template["metadata"]
            assert "priorityClassName" not in other.spec


def test_the_budget_of_another_run_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "K8S", shutil.copytree(K8S, tmp_path / "k8s"))
    base = tmp_path / "k8s" / "base" / "job.yaml"
    base.write_text(base.read_text().replace("name: &run kubetune", "name: &run roses"))
    trees = {tree["kind"]: tree for tree in manifests.render("overlays/protected")}
    assert {tree["metadata"]["name"] for tree in trees.values()} == {"roses"}
    selected = trees["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert selected.items() <= trees["Job"]["spec"]["template"]["metadata"]["labels"].items()
