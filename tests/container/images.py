"""Build the image with buildah, and run it with podman as a cluster would.

The base image is built from Debian's packages, from this machine's apt sources: no image is pulled. Its Python is
Debian's, without bytecode as in the official images. Another base, which is pulled:
KUBETUNE_TEST_BASE=docker.io/library/python:3.12-slim

Images, containers and the cache of pip have a store of their own, in which the base and the installed packages stay for
the next run; `rm -r ~/.cache/kubetune-containers` removes it.
"""

import fcntl
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
BASE = os.environ.get("KUBETUNE_TEST_BASE") or "localhost/kubetune-test-base"
DEPENDENCIES = "localhost/kubetune-test-dependencies"
STORE = Path.home() / ".cache" / "kubetune-containers"
OWN_STORE = (f"--root={STORE}/images", "--runroot=/run/kubetune-containers", "--storage-driver=overlay")
USER = 65532
MEGABYTE = 1e6

# A pod under the restricted standard: podman's defaults add a writable /run, /var/tmp and some capabilities.
CONFINED = (
    "--read-only", "--read-only-tmpfs=false", "--network=none", f"--user={USER}:{USER}", "--cap-drop=all",
    "--security-opt=no-new-privileges", "--log-driver=k8s-file",
    "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096",  # podman's defaults may exceed this machine's limits
)  # fmt: skip


@functools.cache
def unsupported() -> str:
    """The reason why this machine cannot build and run images; empty where it can."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        return "building the image needs Linux and root: the files that it mounts must belong to another user"
    needed = {"buildah": "buildah", "podman": "podman", "runc": "runc", "cc": "gcc"}
    if not os.environ.get("KUBETUNE_TEST_BASE"):
        needed |= {"mmdebstrap": "mmdebstrap", "apt-get": "apt"}
    missing = sorted(package for program, package in needed.items() if shutil.which(program) is None)
    if missing:
        return f"building the image needs {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    if "mmdebstrap" in needed and not _debian_sources():
        return "apt has no sources of Debian's packages: run apt-get update, or set KUBETUNE_TEST_BASE"
    return ""


def run_command(*command: str, text: str | None = None) -> str:
    """Standard output of a command that must succeed."""
    (STORE / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": f"{STORE}/tmp"}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def podman(*arguments: str) -> str:
    return run_command("podman", *OWN_STORE, "--runtime=runc", *arguments)  # runc supports all versions of cgroups


def _debian_sources() -> str:
    form = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    command = ("apt-get", "indextargets", "--format", form, "Created-By: Packages", "Origin: Debian")
    return "".join(sorted(set(run_command(*command).splitlines(keepends=True))))


@contextmanager
def store() -> Iterator[None]:
    """Lock the store: removing images while another process builds on them would fail."""
    STORE.mkdir(parents=True, exist_ok=True)
    with open(STORE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_base() -> None:
    """Build Debian with Python and pip as the image `BASE`, unless it exists."""
    if os.environ.get("KUBETUNE_TEST_BASE") or BASE in podman("images", "--format={{.Repository}}").split():
        return
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    with tempfile.TemporaryDirectory(prefix="kubetune-base-") as folder:
        archive = f"{folder}/base.tar"
        run_command(
            "mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-pip,ca-certificates",
            '--customize-hook=ln -s python3 "$1/usr/bin/python"',
            '--customize-hook=find "$1/usr" -name __pycache__ -prune -exec rm -r {} +',
            suite, archive, "-", text=_debian_sources(),
        )  # fmt: skip
        podman("import", "--quiet", archive, BASE)


def build(context: Path, tag: str, *options: str) -> str:
    """Build the Dockerfile of `context` on `BASE`, with this machine's pip.conf as a secret, and its certificates.

    Returns:
        the output of the build.
    """
    pip = next((p for p in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf") if p.exists()), None)
    return run_command(
        "buildah", *OWN_STORE, "build", "--layers", "--force-rm", "--isolation=chroot", "--network=host",
        f"--build-arg=BASE={BASE}",
        *([] if "KUBETUNE_TEST_BASE" in os.environ else ["--pull-never"]),
        *([f"--secret=id=pip,src={pip}"] if pip else []),
        "--volume=/etc/ssl/certs:/etc/ssl/certs:ro", f"--tag={tag}", *options, str(context),
    )  # fmt: skip


def remove(*images: str) -> None:
    """Remove images and their intermediate ones, except those that are reused."""
    podman("image", "rm", "--force", *images)
    podman("image", "prune", "--force")


def inspect(image: str) -> dict[str, Any]:
    return dict(json.loads(podman("image", "inspect", image))[0])


def layers(image: str) -> list[tuple[str, int, str]]:
    """Digest, bytes and instruction of each layer, the base first."""
    history = json.loads(podman("history", "--no-trunc", "--format=json", image))[::-1]
    steps = [(step["size"], step["CreatedBy"]) for step in history if step["size"]]
    return [(digest, *step) for digest, step in zip(inspect(image)["RootFS"]["Layers"], steps, strict=True)]


@contextmanager
def tree_of(image: str) -> Iterator[Path]:
    path = podman("image", "mount", image).strip()
    try:
        yield Path(path)
    finally:
        podman("image", "unmount", image)


@dataclass(frozen=True)
class Container:
    name: str

    def state(self, field: str) -> str:
        """One field of `podman inspect`'s state, such as Pid, the id of process 1 on this machine."""
        return podman("inspect", f"--format={{{{.State.{field}}}}}", self.name).strip()

    def logs(self) -> str:
        command = ["podman", *OWN_STORE, "logs", self.name]
        return subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, check=True).stdout

    def wait_for(self, text: str, seconds: float) -> None:
        def is_logged() -> bool:
            is_running = self.running()
            has_text = text in self.logs()
            assert has_text or is_running, self.logs()
            return has_text

        wait_until(is_logged, lambda: f"{text!r} in {self.logs()}", seconds)

    def running(self) -> bool:
        return self.state("Running") == "true"

    def stop(self) -> tuple[int, float]:
        """Send SIGTERM only: exit code, and seconds until the exit."""
        began = time.monotonic()
        podman("kill", "--signal=TERM", self.name)
        return self.exit_code(120), time.monotonic() - began

    def exit_code(self, seconds: float) -> int:
        wait_until(lambda: not self.running(), lambda: f"the end; its log is\n{self.logs()}", seconds)
        return int(self.state("ExitCode"))


@contextmanager
def started(
    image: str, *arguments: str, volumes: Mapping[Path, str] | None = None, options: Sequence[str] = ()
) -> Iterator[Container]:
    """A container confined like a pod, with writable /tmp, /cache and `volumes`; removed afterwards."""
    name = f"kubetune-test-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="kubetune-") as folder:
        mounted = dict(volumes or {})
        for name_inside in ("tmp", "cache"):
            empty = Path(folder) / name_inside
            empty.mkdir()
            empty.chmod(0o777)  # as an emptyDir is
            mounted[empty] = f"/{name_inside}"
        mounts = [f"--volume={path}:{inside}:rw" for path, inside in mounted.items()]
        podman("run", "--detach", f"--name={name}", *CONFINED, *mounts, *options, image, *arguments)
        try:
            yield Container(name)
        finally:
            podman("rm", "--force", "--time=0", name)


def run(image: str, *arguments: str, seconds: float, **more: Any) -> tuple[int, str]:
    with started(image, *arguments, **more) as container:
        return container.exit_code(seconds), container.logs()
