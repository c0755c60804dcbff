"""Build the image and run it as a cluster would, with buildah and podman.

The base is made here of Debian's packages, from wherever this machine takes them: no image is fetched. Its Python is
Debian's, and the bytecode of it is left out as in the official images. Another base, which is fetched:
KUBETUNE_TEST_BASE=docker.io/library/python:3.12-slim

Images, containers and what pip fetched lie in a store of their own. The base and the installed packages stay there for
the next run; `rm -r ~/.cache/kubetune-containers` removes all.
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

ROOT = Path(__file__).parents[2]
BASE = os.environ.get("KUBETUNE_TEST_BASE") or "localhost/kubetune-test-base"
DEPENDENCIES = "localhost/kubetune-test-dependencies"
STORE = Path.home() / ".cache" / "kubetune-containers"
OWN_STORE = (f"--root={STORE}/images", "--runroot=/run/kubetune-containers", "--storage-driver=overlay")
USER = 65532
MEGABYTE = 1e6

# What a pod of the restricted kind has, and no more: podman would add a writable /run, /var/tmp and some capabilities.
CONFINED = (
    "--read-only", "--read-only-tmpfs=false", "--network=none", f"--user={USER}:{USER}", "--cap-drop=all",
    "--security-opt=no-new-privileges", "--log-driver=k8s-file",
    "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096",  # podman's own may be more than this machine allows
)  # fmt: skip


@functools.cache
def why_not() -> str:
    """Why no image can be built and run on this machine; empty where it can."""
    if platform.system() != "Linux":
        return "images are built on Linux only"
    needed = {"buildah": "buildah", "podman": "podman", "runc": "runc"}
    if not os.environ.get("KUBETUNE_TEST_BASE"):
        needed |= {"mmdebstrap": "mmdebstrap", "apt-get": "apt"}
    if shutil.which("cc") is None:
        return "the stand-in of NVIDIA's driver needs a C compiler: apt-get install gcc"
    missing = sorted(package for program, package in needed.items() if shutil.which(program) is None)
    if missing:
        return f"building the image needs {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "building the image needs root: the files that it mounts must belong to another user"
    if "mmdebstrap" in needed and not _debian_sources():
        return "apt names no source of Debian's packages here: run apt-get update, or give KUBETUNE_TEST_BASE"
    return ""


def said(*command: str, text: str | None = None) -> str:
    """What a command prints. Fails, with its complaint, where it does."""
    (STORE / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": f"{STORE}/tmp"}
    answer = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(command)}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
    return answer.stdout


def podman(*arguments: str) -> str:
    return said("podman", *OWN_STORE, "--runtime=runc", *arguments)  # as most clusters; it knows all kinds of cgroups


def _debian_sources() -> str:
    form = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    command = ("apt-get", "indextargets", "--format", form, "Created-By: Packages", "Origin: Debian")
    return "".join(sorted(set(said(*command).splitlines(keepends=True))))


@contextmanager
def store() -> Iterator[None]:
    """Have the store to oneself: to remove what one has built would take from another what he is building on."""
    STORE.mkdir(parents=True, exist_ok=True)
    with open(STORE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_base() -> None:
    """Debian with Python and pip, under the name `BASE`, unless it is there."""
    if os.environ.get("KUBETUNE_TEST_BASE"):
        return
    if BASE in podman("images", "--format={{.Repository}}").split():
        return
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    with tempfile.TemporaryDirectory(prefix="kubetune-base-") as folder:
        archive = f"{folder}/base.tar"
        said(
            "mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-pip,ca-certificates",
            '--customize-hook=ln -s python3 "$1/usr/bin/python"',
            '--customize-hook=find "$1/usr" -name __pycache__ -prune -exec rm -r {} +',
            suite, archive, "-", text=_debian_sources(),
        )  # fmt: skip
        podman("import", "--quiet", archive, BASE)


def build(context: Path, tag: str, *options: str) -> str:
    """Build the Dockerfile of `context` on `BASE`; returns what the build said.

    pip is told what this machine's pip is told, as a secret, and sees its certificates.
    """
    pip = next((p for p in (Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf") if p.exists()), None)
    return said(
        "buildah", *OWN_STORE, "build", "--layers", "--force-rm", "--isolation=chroot", "--network=host",
        f"--build-arg=BASE={BASE}",
        *([] if "KUBETUNE_TEST_BASE" in os.environ else ["--pull-never"]),
        *([f"--secret=id=pip,src={pip}"] if pip else []),
        "--volume=/etc/ssl/certs:/etc/ssl/certs:ro", f"--tag={tag}", *options, str(context),
    )  # fmt: skip


def remove(*images: str) -> None:
    """And what was built on the way to them, but for what is kept for the next run."""
    podman("image", "rm", "--force", *images)
    podman("image", "prune", "--force")


def inspect(image: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(podman("image", "inspect", image))
    return found[0]


def layers(image: str) -> list[tuple[str, int, str]]:
    """Of each layer from the base up: digest, bytes, and the instruction that made it."""
    history = json.loads(podman("history", "--no-trunc", "--format=json", image))[::-1]
    made = [(step["size"], step["CreatedBy"]) for step in history if step["size"]]
    digests = inspect(image)["RootFS"]["Layers"]
    assert len(made) == len(digests), history
    return [(digest, size, by) for digest, (size, by) in zip(digests, made, strict=True)]


@contextmanager
def tree_of(image: str) -> Iterator[Path]:
    """The files of an image."""
    path = podman("image", "mount", image).strip()
    try:
        yield Path(path)
    finally:
        podman("image", "unmount", image)


@dataclass(frozen=True)
class Container:
    """A container that was started."""

    name: str

    @property
    def pid(self) -> int:
        """Of its first process, seen from here."""
        return int(podman("inspect", "--format={{.State.Pid}}", self.name))

    def logs(self) -> str:
        command = ["podman", *OWN_STORE, "logs", self.name]
        return subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True, check=True).stdout

    def wait_for(self, text: str, seconds: float) -> None:
        """Until it has said something."""
        end = time.monotonic() + seconds
        while text not in self.logs():
            assert time.monotonic() < end, self.logs()
            assert self.running(), self.logs()
            time.sleep(0.1)

    def running(self) -> bool:
        return podman("inspect", "--format={{.State.Running}}", self.name).strip() == "true"

    def stop(self) -> tuple[int, float]:
        """Send SIGTERM: the exit code, and the seconds until then. Nothing but the process itself ends it."""
        began = time.monotonic()
        podman("kill", "--signal=TERM", self.name)
        return self.exit_code(120), time.monotonic() - began

    def exit_code(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < end, f"still running after {seconds:.0f} s:\n{self.logs()}"
            time.sleep(0.1)
        return int(podman("inspect", "--format={{.State.ExitCode}}", self.name))


@contextmanager
def started(
    image: str, *arguments: str, volumes: Mapping[Path, str] | None = None, options: Sequence[str] = ()
) -> Iterator[Container]:
    """A container, confined like a pod, with writable /tmp, /cache and what of this machine is mounted; removed after."""
    name = f"kubetune-test-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="kubetune-") as folder:
        places = dict(volumes or {})
        for there in ("tmp", "cache"):
            empty = Path(folder) / there
            empty.mkdir()
            empty.chmod(0o777)  # as an emptyDir is
            places[empty] = f"/{there}"
        mounts = [f"--volume={path}:{there}:rw" for path, there in places.items()]
        podman("run", "--detach", f"--name={name}", *CONFINED, *mounts, *options, image, *arguments)
        try:
            yield Container(name)
        finally:
            podman("rm", "--force", "--time=0", name)


def run(image: str, *arguments: str, seconds: float, **more: Any) -> tuple[int, str]:
    """A container to its end: exit code and all that it said."""
    with started(image, *arguments, **more) as container:
        code = container.exit_code(seconds)
        return code, container.logs()
