"""`kubectl` itself runs the commands of the manifests' heads, against the API server of `tests.k8s.api_server`."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scripts import manifests
from tests.k8s.api_server import ApiServer
from tests.k8s.rendered import FILES, OVERLAYS
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


def command(file: str, name: str) -> str:
    """A command of the head of k8s/FILE."""
    head = (manifests.K8S / file).read_text().partition("---")[0]
    match = re.search(rf"^#   {name} +((?:.*\\\n# +)?.*)", head, re.M)
    assert match, name
    return re.sub(r"\\\n# +", "", match[1]).partition("    (")[0]


def run(server: ApiServer, line: str, folder: Path) -> str:
    """The output of a shell line in which `kubectl` is the locked one, with this server."""
    config = folder / "config"
    config.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [{"name": "x", "user": {}}],
        "clusters": [{"name": "x", "cluster": {"server": server.address}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": "default"}}],
    }))  # fmt: skip
    path = f"{Path(manifests.find_kubectl()).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBECONFIG": str(config), "HOME": str(folder)}
    done = subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("file", sorted(manifests.FOLDERS))
def test_the_log_command_shows_the_newest_pod(file: str, server: ApiServer, tmp_path: Path) -> None:
    """After seven interruptions; `kubectl logs -l` refuses to follow more than five pods."""
    for number in (3, 7, 1, 0, 6, 2, 5, 4):
        for index in ("0", "1") if file == "multiworker.yaml" else ("",):
            name = f"kubetune-{index}{number}"
            labels = {"batch.kubernetes.io/job-name": "kubetune", "batch.kubernetes.io/job-completion-index": index}
            created = f"2026-01-01T0{number}:00:0{index or 0}Z"
            server.add("pods", {
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "labels": labels, "creationTimestamp": created},
                "spec": {"containers": [{"name": "trainer", "image": "x"}]}, "status": {"phase": "Failed"},
            })  # fmt: skip
            server.logs[name] = f"log of worker {index} pod {number}\n"
    line = command(file, "log")
    worker = "0" if file == "multiworker.yaml" else ""
    assert run(server, line, tmp_path) == f"log of worker {worker} pod 7\n"


SOURCES = [f"-k k8s/{folder}" for folder in OVERLAYS] + [f"-f {path.relative_to(ROOT)}" for path in FILES]


@pytest.mark.parametrize("source", SOURCES)
def test_a_second_apply_changes_nothing(source: str, server: ApiServer, tmp_path: Path) -> None:
    """The API server adds defaults, Kueue's webhook suspends, an autoscaler scales, and quantities become text."""
    apply = f"kubectl apply --validate=false {source}"
    assert " created\n" in run(server, apply, tmp_path)
    for (plural, _), tree in server.objects.items():
        if plural == "jobs":
            tree["spec"]["suspend"] = "kueue.x-k8s.io/queue-name" in tree["metadata"]["labels"]
            tree["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
            for container in tree["spec"]["template"]["spec"]["containers"]:
                for kind in ("requests", "limits"):
                    quantities = container["resources"].get(kind, {})
                    container["resources"][kind] = {name: str(value) for name, value in quantities.items()}
        if plural == "deployments" and any(kind == "horizontalpodautoscalers" for kind, _ in server.objects):
            tree["spec"]["replicas"] = 7
    before = list(server.changes)
    output = run(server, apply, tmp_path)
    assert server.changes == before, output
    lines = [line for line in output.splitlines() if not line.startswith("poddisruptionbudget.")]  # always "configured"
    assert set(re.findall(r" (\w+)$", "\n".join(lines), re.M)) == {"unchanged"}


def test_again_replaces_an_ended_job_and_waits_for_its_pods(server: ApiServer, tmp_path: Path) -> None:
    line = command("job.yaml", "again").replace("replace ", "replace --validate=false ")
    run(server, line, tmp_path)  # there is none
    first = server.objects["jobs", "kubetune"]["metadata"]["uid"]
    run(server, line, tmp_path)
    assert server.objects["jobs", "kubetune"]["metadata"]["uid"] != first
    assert server.changes == ["POST jobs/kubetune", "DELETE jobs/kubetune", "POST jobs/kubetune"]
    (options,) = server.queries
    assert '"propagationPolicy":"Foreground"' in options
    assert "gracePeriodSeconds" not in options  # the pods have theirs to save


def test_again_keeps_the_policy_of_the_workers_until_they_have_ended(server: ApiServer, tmp_path: Path) -> None:
    line = command("multiworker.yaml", "again").replace("apply ", "apply --validate=false ")
    run(server, line, tmp_path)  # there is none
    first = server.objects["jobs", "kubetune"]["metadata"]["uid"]
    run(server, line, tmp_path)
    assert server.objects["jobs", "kubetune"]["metadata"]["uid"] != first
    created = {"POST jobs/kubetune", "POST networkpolicies/kubetune"}
    assert set(server.changes[:2]) == created
    assert server.changes[2:] == ["DELETE jobs/kubetune", "POST jobs/kubetune"]
    assert '"propagationPolicy":"Foreground"' in server.queries[-1]


def test_deleting_a_run_leaves_the_account_and_the_volume(server: ApiServer, tmp_path: Path) -> None:
    for source in (
        "-k k8s/shared",
        "-f k8s/overlays/local/runs.yaml",
        "-k k8s/overlays/local",
        "-k k8s/overlays/nightly",
    ):
        run(server, f"kubectl apply --validate=false {source}", tmp_path)
    for overlay in ("local", "nightly"):
        run(server, f"kubectl delete --wait=false -k k8s/overlays/{overlay}", tmp_path)
    for file in manifests.FOLDERS:
        run(server, f"kubectl apply --validate=false -f k8s/{file}", tmp_path)
        run(server, f"kubectl delete --wait=false -f k8s/{file}", tmp_path)
    deleted = {change for change in server.changes if change.startswith("DELETE")}
    policy = "DELETE networkpolicies/kubetune"  # of the workers; that of all runs remains
    assert deleted == {"DELETE jobs/kubetune", "DELETE cronjobs/kubetune-nightly", policy}
