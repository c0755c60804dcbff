"""The simulated cluster: its containers match manifest and image, and its pods terminate as on Kubernetes."""

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
from tests.k8s.rendered import Pods, local_job
from tests.waiting import PATIENCE
from trainer.errors import INTERRUPTED

pytestmark = needs_root

INSPECT = """
import json, os, pathlib, socket, subprocess
def writable(folder):
    try:
        (pathlib.Path(folder) / "x").write_text("x")
    except OSError as error:
        return error.strerror
    return "writable"
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
mounts = {line.split()[1]: line.split()[2] for line in open("/proc/mounts")}
service = os.environ.get("SERVICE_NAME")
print(json.dumps({
    "pid": os.getpid(), "ids": [os.getuid(), os.getgid(), os.getgroups()], "environment": dict(os.environ),
    "capabilities": {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0},
    "no_new_privileges": status["NoNewPrivs"].strip(), "hostname": socket.gethostname(), "folder": os.getcwd(),
    "writable": {f: writable(f) for f in ("/", "/app", "/opt/venv", "/usr", "/cache", "/tmp", "/dev/shm", "/dev")},
    "files": {f: sorted(os.listdir(f)) for f in ("/app", "/home", "/root") if os.path.isdir(f)},
    "in_memory": [path for path, kind in mounts.items() if kind == "tmpfs"],
    "shared": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "address": socket.gethostbyname(f"{socket.gethostname()}.{service}") if service else None,
}))
open("/dev/termination-log", "w").write("done")
"""


def job_running(overlay: str, program: str, probed: bool = False, fails_to_start: bool = False, **changes: Any) -> Pods:
    """A Job with another program, without probes or with frequent ones; `changes` are of the pod template's spec.

    A pod that has not started yet fails its startup probe: only a program that never succeeds may fail it nine times.
    """
    job = local_job(overlay)
    owner = copy.deepcopy(job.owner)
    spec = owner["spec"]
    spec["template"]["spec"] |= changes
    (container,) = spec["template"]["spec"]["containers"]
    container |= {"command": ["python", "-I", "-c", program], "args": []}
    for probe in ("startupProbe", "livenessProbe"):
        failures = 2 if probe == "livenessProbe" else 9 if fails_to_start else 1000
        container[probe] |= {"periodSeconds": 0.25, "timeoutSeconds": 60, "failureThreshold": failures}
        if not probed:
            del container[probe]
    return dataclasses.replace(job, owner=owner, template=spec["template"], job=spec)


@pytest.fixture(scope="module")
def inspections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Properties of the containers of two Jobs, as seen from inside."""
    inspections = {}
    for overlay in ("job", "multiworker"):
        with Cluster(job_running(overlay, INSPECT), tmp_path_factory.mktemp(overlay)) as cluster:
            assert cluster.finish(PATIENCE).type == "Complete", cluster.describe()
            assert {pod.container.message for pod in cluster.pods} == {"done"}
            inspections[overlay] = [json.loads(pod.container.log) for pod in cluster.pods]
    return inspections


@pytest.mark.parametrize(("overlay", "index"), [("job", 0), ("multiworker", 0), ("multiworker", 1)])
def test_a_container_matches_the_manifest_and_the_image(
    inspections: dict[str, list[dict[str, Any]]], overlay: str, index: int
) -> None:
    inside, job = inspections[overlay][index], local_job(overlay)
    environment = inside["environment"]
    assert inside["pid"] == 1
    assert inside["ids"] == [65532, 65532, [65532]]
    assert inside["capabilities"] is True
    assert inside["no_new_privileges"] == "1"
    assert inside["hostname"] == environment["HOSTNAME"] == job.hostname(index)
    assert inside["folder"] == "/"
    assert job.environment(index).items() <= environment.items()
    assert environment["HOME"] == environment["KUBETUNE_CACHE"] == "/cache"
    assert environment["PATH"].startswith("/opt/venv/bin:")
    own = set(job.environment(index)) | {"HOME", "HOSTNAME", "PATH", "LD_LIBRARY_PATH", "LC_CTYPE"}
    assert {name for name in environment.keys() - own if not name.startswith(("PYTHON", "KUBETUNE_"))} == set()
    assert inside["writable"] == {
        **dict.fromkeys(("/", "/app", "/opt/venv", "/usr"), "Read-only file system"),
        **dict.fromkeys(("/cache", "/tmp", "/dev/shm"), "writable"),
        "/dev": "Permission denied",
    }
    assert inside["files"]["/app"] == ["conf", "trainer"]
    assert "/home" not in inside["files"]
    assert "/dev/shm" in inside["in_memory"]
    assert "/cache" not in inside["in_memory"]
    assert inside["shared"] == 4 * 2**30
    assert environment.get("JOB_COMPLETION_INDEX") == (str(index) if overlay == "multiworker" else None)
    assert inside["address"] == (f"10.77.0.{3 + index}" if overlay == "multiworker" else None)


WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: {on_term})
print("ready", flush=True)
time.sleep(900)
"""


def test_deletion_sends_sigterm_only_while_the_grace_period_lasts(tmp_path: Path) -> None:
    program = (
        f"import os\nif os.path.exists('/cache/x'): sys.exit(9)\n{WAIT.format(on_term=f'sys.exit({INTERRUPTED})')}"
    )
    with Cluster(job_running("job", program), tmp_path) as cluster:
        for number in range(3):
            cluster.wait_until(lambda: "ready" in cluster.log(), "the pod", PATIENCE)
            pod = cluster.preempt(0)
            assert cluster.running == [pod]
            cluster.wait_until(lambda: len(cluster.pods) == number + 2, "a replacement", PATIENCE)  # noqa: B023
            assert pod.exit_code == INTERRUPTED
        assert cluster.condition is None


NO_HANDLER = "import time\nprint('ready', flush=True)\ntime.sleep(900)"


@pytest.mark.parametrize("program", [WAIT.format(on_term="None"), NO_HANDLER], ids=["ignored", "no handler"])
def test_a_pod_that_ignores_sigterm_is_killed_after_the_grace_period(program: str, tmp_path: Path) -> None:
    """A signal without a handler does not end process 1 of a container; the log is the termination message."""
    with Cluster(job_running("multiworker", program, terminationGracePeriodSeconds=1), tmp_path) as cluster:
        cluster.wait_until(lambda: "ready" in cluster.log(0) and "ready" in cluster.log(1), "the pods", PATIENCE)
        began = time.monotonic()
        preempted = cluster.preempt(0)
        cluster.wait_until(lambda: len(cluster.pods) > 2, "a replacement", PATIENCE)
        assert time.monotonic() - began >= 1
        assert preempted.exit_code == 128 + signal.SIGKILL
        assert preempted.container.message == "ready\n"
        assert [pod.index for pod in cluster.running] == [1, 0]


def test_crashes_are_counted_until_the_job_fails(tmp_path: Path) -> None:
    program = "import os, sys, time\nif os.environ['JOB_COMPLETION_INDEX'] == '0': time.sleep(900)\nsys.exit(1)"
    with Cluster(job_running("multiworker", program, terminationGracePeriodSeconds=1), tmp_path) as cluster:
        assert cluster.finish(PATIENCE).reason == "MaxFailedIndexesExceeded"
        assert [pod.exit_code for pod in cluster.pods if pod.index == 1] == [1, 1, 1, 1]
        assert [pod.exit_code for pod in cluster.pods if pod.index == 0] == [128 + signal.SIGKILL]


@pytest.mark.parametrize(
    ("statuses", "reason"),
    [("200, 200, 200, 200, 503", "failed its livenessProbe"), ("503", "failed its startupProbe"), ("200", "")],
)
def test_the_kubelet_probes_healthz_and_terminates_unhealthy_pods(statuses: str, reason: str, tmp_path: Path) -> None:
    program = """
import http.server, sys
statuses = [STATUSES]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path == "/healthz"
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.end_headers()
    def log_message(self, *_):
        print("request", flush=True)
http.server.HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
""".replace("STATUSES", statuses)
    fails_to_start = reason == "failed its startupProbe"
    job = job_running("job", program, True, fails_to_start, terminationGracePeriodSeconds=1)
    with Cluster(job, tmp_path) as cluster:
        cluster.wait_until(lambda: cluster.pods != [], "the pod", PATIENCE)
        pod = cluster.pod()
        if reason:
            cluster.wait_until(lambda: pod.container.exit_code is not None, "its termination", PATIENCE)
        else:
            cluster.wait_until(lambda: pod.probe.successes >= 3, "some successes", PATIENCE)
            assert pod.sigterm_time is None
        assert pod.reason == reason


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
    with Cluster(job_running("multiworker", program), tmp_path / "1") as cluster:
        cluster.wait_until(lambda: "10.77.0.4\nunknown\n" in cluster.log(0), "the name published and removed", PATIENCE)
    hidden = job_running("multiworker", program)
    hidden.template["metadata"]["labels"]["app.kubernetes.io/name"] = "other"  # which no Service selects
    with Cluster(hidden, tmp_path / "2") as cluster:
        cluster.wait_until(lambda: len(cluster.pods) > 5, "some replacements", PATIENCE)
        assert set(cluster.log(0).split()) <= {"unknown"}
