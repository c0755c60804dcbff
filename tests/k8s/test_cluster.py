"""The cluster that plays Kubernetes for tests: its containers are what the manifests say, and end as pods end."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
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


def told(overlay: str, program: str, *arguments: str, **changes: Any) -> Pods:
    """The pods of an overlay with another program; `changes` are of the template's spec."""
    job = here(overlay)
    owner = copy.deepcopy(job.owner)
    spec = owner["spec"]
    spec["template"]["spec"] |= changes
    (container,) = spec["template"]["spec"]["containers"]
    container |= {"command": ["python", "-I", "-c", program], "args": list(arguments)}
    for probe in ("startupProbe", "livenessProbe"):
        container[probe] = container.get(probe, {}) | {"periodSeconds": 1, "failureThreshold": 2}
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
