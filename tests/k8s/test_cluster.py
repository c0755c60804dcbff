"""The cluster that plays Kubernetes for tests: its containers are what the manifests say, and end as pods end."""

import copy
import dataclasses
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.network import needs_root
from tests.k8s.cluster import Cluster
from tests.k8s.rendered import Pods, here
from trainer.errors import INTERRUPTED

pytestmark = needs_root

LOOK = """
import json, os, pathlib, socket, subprocess
def writable(folder):
    try:
        (pathlib.Path(folder) / "x").write_text("x")
    except OSError as error:
        return error.strerror
    return "writable"
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
places = {line.split()[1]: line.split()[2] for line in open("/proc/mounts")}
service = os.environ.get("SERVICE_NAME")
print(json.dumps({
    "pid": os.getpid(), "ids": [os.getuid(), os.getgid(), os.getgroups()], "environment": dict(os.environ),
    "capabilities": {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0},
    "no_new_privileges": status["NoNewPrivs"].strip(), "hostname": socket.gethostname(), "folder": os.getcwd(),
    "writable": {f: writable(f) for f in ("/", "/app", "/opt/venv", "/usr", "/cache", "/tmp", "/dev/shm", "/dev")},
    "seen": {f: sorted(os.listdir(f)) for f in ("/app", "/home", "/root") if os.path.isdir(f)},
    "in_memory": [place for place, kind in places.items() if kind == "tmpfs"],
    "shared": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "address": socket.gethostbyname(f"{socket.gethostname()}.{service}") if service else None,
}))
open("/dev/termination-log", "w").write("as the manifest says")
"""


def told(overlay: str, program: str, probed: bool = False, **changes: Any) -> Pods:
    """The pods of an overlay with another program, not probed or impatiently; `changes` are of the template's spec."""
    job = here(overlay)
    owner = copy.deepcopy(job.owner)
    spec = owner["spec"]
    spec["template"]["spec"] |= changes
    (container,) = spec["template"]["spec"]["containers"]
    container |= {"command": ["python", "-I", "-c", program], "args": []}
    for probe in ("startupProbe", "livenessProbe"):
        container[probe] |= {"periodSeconds": 1, "failureThreshold": 2}
        if not probed:
            del container[probe]
    return dataclasses.replace(job, owner=owner, template=spec["template"], job=spec)


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the containers of two Jobs saw."""
    found = {}
    for overlay in ("job", "multiworker"):
        with Cluster(told(overlay, LOOK), tmp_path_factory.mktemp(overlay)) as cluster:
            assert cluster.finish(60).type == "Complete", cluster.story()
            assert [pod.container.message for pod in cluster.pods] == ["as the manifest says"] * len(cluster.pods)
            found[overlay] = [json.loads(pod.container.log) for pod in cluster.pods]
    return found


@pytest.mark.parametrize(("overlay", "index"), [("job", 0), ("multiworker", 0), ("multiworker", 1)])
def test_a_container_is_what_the_manifest_and_the_image_say(
    looks: dict[str, list[dict[str, Any]]], overlay: str, index: int
) -> None:
    look, job = looks[overlay][index], here(overlay)
    assert look["pid"] == 1
    assert look["ids"] == [65532, 65532, [65532]]
    assert look["capabilities"] is True
    assert look["no_new_privileges"] == "1"
    assert look["hostname"] == look["environment"]["HOSTNAME"] == job.hostname(index)
    assert look["folder"] == "/"
    assert job.environment(index).items() <= look["environment"].items()
    assert look["environment"]["HOME"] == look["environment"]["KUBETUNE_CACHE"] == "/cache"
    assert look["environment"]["PATH"].startswith("/opt/venv/bin:")
    own = set(job.environment(index)) | {"HOME", "HOSTNAME", "PATH", "LD_LIBRARY_PATH", "LC_CTYPE"}
    assert {name for name in look["environment"].keys() - own if not name.startswith(("PYTHON", "KUBETUNE_"))} == set()
    refused = dict.fromkeys(("/", "/app", "/opt/venv", "/usr"), "Read-only file system")
    assert look["writable"] == refused | dict.fromkeys(("/cache", "/tmp", "/dev/shm"), "writable") | {
        "/dev": "Permission denied"
    }
    assert look["seen"]["/app"] == ["conf", "trainer"]
    assert "/home" not in look["seen"]
    assert "/dev/shm" in look["in_memory"]
    assert "/cache" not in look["in_memory"]
    assert look["shared"] == 4 * 2**30
    if overlay == "multiworker":
        assert look["environment"]["JOB_COMPLETION_INDEX"] == str(index)
        assert look["address"] == f"10.77.0.{3 + index}"
    else:
        assert "JOB_COMPLETION_INDEX" not in look["environment"]


WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: {on_term})
print("ready", flush=True)
time.sleep(60)
"""


def test_deletion_is_sigterm_and_nothing_else_while_the_grace_lasts(tmp_path: Path) -> None:
    ends = WAIT.format(on_term=f"sys.exit({INTERRUPTED})")
    with Cluster(told("job", f"import os\nif os.path.exists('/cache/x'): sys.exit(9)\n{ends}"), tmp_path) as cluster:
        for round_ in range(3):
            cluster.until(lambda: "ready" in cluster.said(), "the pod", 20)
            pod = cluster.preempt(0)
            assert cluster.alive == [pod]
            cluster.until(lambda: len(cluster.pods) == round_ + 2, "a replacement", 20)  # noqa: B023
            assert pod.exit_code == INTERRUPTED
        assert cluster.verdict is None


def test_who_ignores_sigterm_is_killed_when_the_grace_is_over_and_its_log_is_its_message(tmp_path: Path) -> None:
    job = told("multiworker", WAIT.format(on_term="None"), terminationGracePeriodSeconds=1)
    with Cluster(job, tmp_path) as cluster:
        cluster.until(lambda: "ready" in cluster.said(0) and "ready" in cluster.said(1), "the pods", 20)
        began = time.monotonic()
        preempted = cluster.preempt(0)
        cluster.until(lambda: len(cluster.pods) > 2, "a replacement", 20)
        assert 1 <= time.monotonic() - began < 5
        assert preempted.exit_code == 128 + signal.SIGKILL
        assert preempted.container.message == "ready\n"
        assert [pod.index for pod in cluster.alive] == [1, 0]


def test_a_signal_without_a_handler_does_not_end_the_first_process_of_a_container(tmp_path: Path) -> None:
    job = told("job", "import time\nprint('ready', flush=True)\ntime.sleep(60)", terminationGracePeriodSeconds=1)
    with Cluster(job, tmp_path) as cluster:
        cluster.until(lambda: "ready" in cluster.said(), "the pod", 20)
        pod = cluster.preempt(0)
        cluster.until(lambda: len(cluster.pods) > 1, "a replacement", 20)
        assert pod.exit_code == 128 + signal.SIGKILL


def test_crashes_are_counted_until_the_job_fails(tmp_path: Path) -> None:
    program = "import os, sys, time\nif os.environ['JOB_COMPLETION_INDEX'] == '0': time.sleep(60)\nsys.exit(1)"
    with Cluster(told("multiworker", program, terminationGracePeriodSeconds=1), tmp_path) as cluster:
        verdict = cluster.finish(60)
        assert verdict.reason == "MaxFailedIndexesExceeded"
        assert [pod.exit_code for pod in cluster.pods if pod.index == 1] == [1, 1, 1, 1]
        assert [pod.exit_code for pod in cluster.pods if pod.index == 0] == [128 + signal.SIGKILL]


@pytest.mark.parametrize(
    ("served", "ends_with"),
    [("200, 200, 200, 200, 503", "failed its livenessProbe"), ("503", "failed its startupProbe"), ("200", "")],
)
def test_the_kubelet_asks_for_healthz_and_ends_who_is_not_well(served: str, ends_with: str, tmp_path: Path) -> None:
    program = """
import http.server, sys
answers = [ANSWERS]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/healthz"
        self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
        self.end_headers()
    def log_message(self, *_):
        print("asked", flush=True)
http.server.HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
""".replace("ANSWERS", served)
    with Cluster(told("job", program, probed=True, terminationGracePeriodSeconds=1), tmp_path) as cluster:
        cluster.until(lambda: cluster.pods != [], "the pod", 5)
        pod = cluster.pod()
        if ends_with:
            cluster.until(lambda: pod.container.exit_code is not None, "its end", 30)
        else:
            cluster.until(lambda: pod.probing.answers >= 3, "some answers", 30)
            assert pod.told is None
        assert pod.why == ends_with


def test_a_name_is_published_with_its_pod_and_only_by_a_headless_service(tmp_path: Path) -> None:
    program = """
import os, socket, sys, time
if os.environ["JOB_COMPLETION_INDEX"] == "1":
    sys.exit(75)
while True:
    try:
        print(socket.gethostbyname("kubetune-1." + os.environ["SERVICE_NAME"]), flush=True)
    except socket.gaierror:
        print("unknown", flush=True)
    time.sleep(0.005)
"""
    with Cluster(told("multiworker", program), tmp_path / "1") as cluster:
        cluster.until(lambda: "10.77.0.4\nunknown\n" in cluster.said(0), "the name to come and go", 30)
    hidden = dataclasses.replace(told("multiworker", program), overlay="base")  # whose objects have no Service
    with Cluster(hidden, tmp_path / "2") as cluster:
        cluster.until(lambda: len(cluster.pods) > 5, "some replacements", 30)
        assert set(cluster.said(0).split()) <= {"unknown"}
