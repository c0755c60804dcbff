"""One container of a pod, run as a confined process of this machine from its manifest.

It has mounts, process ids, a host name and a host of its own (`tests.hosts.network`); its command is process 1, which a
signal without a handler does not end. The image is this checkout, with environment, entry point and folders of the
Dockerfile, on this machine's /usr and Python packages. /etc/passwd lists only root, as for a user id that is not in the
image. Not simulated: limits of CPU, memory and disk, GPUs, and seccomp.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.network import Network

ROOT = Path(__file__).parents[2]
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # default of an image
MESSAGE_LIMIT, LOG_LIMIT, LOG_LINES = 4096, 2048, 80  # bytes of the message; bytes and lines of the log
DEVICES = ("full", "null", "random", "urandom", "zero")
# The first child of the shell is process 1; all others end with it. `unshare --fork` does not report a SIGKILL.
UNSHARED = ("unshare", "--mount", "--pid", "--ipc", "sh", "-c", '(exec "$@" 2>&1); exit $?', "sh")
BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@functools.cache
def image() -> tuple[tuple[str, ...], dict[str, str]]:
    """Entry point and environment, from the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    (entry_point,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    environment = {"PATH": BASE_PATH}
    for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE):
        for name, value in (word.split("=", 1) for word in shlex.split(line)):
            environment[name] = re.sub(r"\$(\w+)", lambda match: environment.get(match[1], ""), value)
    return tuple(json.loads(entry_point)), environment


@dataclass
class Container:
    """A started container."""

    spec: Mapping[str, Any]  # the container's part of the pod template
    process: subprocess.Popen[str]  # its parent on this machine, which has the same exit code
    folder: Path  # of its log, termination message and volumes

    @property
    def pid(self) -> int | None:
        """Process id, on this machine, of the container's process 1; None before it is created."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                if not Path(f"/proc/{child}/status").read_text().partition("Uid:\t")[2].startswith("0\t"):
                    return int(child)  # not root, which sets up the mounts
        return None

    @property
    def exit_code(self) -> int | None:
        """As Kubernetes reports it: 128 + N after signal N."""
        return self.process.poll()  # the shell's, which follows the same rule

    def send(self, number: signal.Signals) -> None:
        while (pid := self.pid) is None and self.process.poll() is None:
            time.sleep(0.01)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def message(self) -> str:
        """The termination message, by the manifest's terminationMessagePolicy."""
        data = (self.folder / "message").read_bytes()[:MESSAGE_LIMIT]
        if not data and self.exit_code and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            data = b"".join(self.log.encode().splitlines(keepends=True)[-LOG_LINES:])[-LOG_LIMIT:]
        return data.decode(errors="replace")


def start(
    network: Network, host: str, hostname: str, folder: Path, pod: Mapping[str, Any], environment: Mapping[str, str],
    arguments: Sequence[str],
) -> Container:  # fmt: skip
    """Start the only container of a pod.

    Args:
        hostname: as seen inside the pod.
        folder: created here for its files.
        pod: the spec of its template.
        environment: from the manifest and Kubernetes, in addition to the image's.
        arguments: with variables expanded.
    """
    (spec,) = pod["containers"]
    folder.mkdir(parents=True)
    entry_point, image_environment = image()
    command = [*spec.get("command", entry_point), *arguments]
    (folder / "mounts.sh").write_text("\n".join(["set -e", *_mounts(folder, pod, spec), _become(folder, pod, spec)]))
    with open(folder / "log", "w") as log:
        process = network.popen(
            host, [*UNSHARED, "sh", str(folder / "mounts.sh"), *command], hostname=hostname,
            env={**image_environment, "HOSTNAME": hostname, **environment}, cwd="/", stdout=log, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return Container(spec, process, folder)


def _mounts(folder: Path, pod: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    """Shell commands that set up the container's root file system, one per line."""
    root = folder / "root"
    (folder / "message").touch()
    (folder / "message").chmod(0o666)
    (folder / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "group").write_text("root:x:0:\n")
    root.mkdir()
    yield f"mount -t tmpfs -o mode=755 image {_q(root)}"
    for name in ("bin", "lib", "lib32", "lib64", "sbin", "usr"):
        if os.path.islink(f"/{name}"):
            yield f"ln -s {_q(os.readlink(f'/{name}'))} {_q(root / name)}"
        elif os.path.isdir(f"/{name}"):
            yield from _bind(Path("/", name), root / name, "ro")
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        yield from _bind(Path(sys.base_prefix), root / sys.base_prefix[1:], "ro")
    yield from _bind(Path(sys.prefix), root / "opt/venv", "ro")
    for name in ("conf", "trainer"):
        yield from _bind(ROOT / name, root / "app" / name, "ro")
    yield f"mkdir -m 1777 {_q(root / 'tmp')}"
    for name in ("passwd", "group"):
        yield from _bind(folder / name, root / "etc" / name, "ro")
    for path in (Path("/etc", name) for name in ("hosts", "resolv.conf", "nsswitch.conf", "ld.so.cache")):
        if path.exists():
            yield from _bind(path, root / "etc" / path.name, "ro")
    for kind, name in (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "dev")):
        options = {"sysfs": "ro", "tmpfs": "mode=755"}.get(kind, "rw")
        yield f"mkdir {_q(root / name)} && mount -t {kind} -o {options} {kind} {_q(root / name)}"
    for name in DEVICES:
        yield from _bind(Path("/dev", name), root / "dev" / name, "rw")
    yield f"ln -s /proc/self/fd {_q(root / 'dev/fd')}"
    yield f"mkdir {_q(root / 'dev/shm')} && mount -t tmpfs -o size=64m shm {_q(root / 'dev/shm')}"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for mount in spec.get("volumeMounts", []):
        yield from _volume(folder, volumes[mount["name"]], root / mount["mountPath"].lstrip("/"), pod, mount)
    message_path = spec.get("terminationMessagePath", "/dev/termination-log").lstrip("/")
    yield from _bind(folder / "message", root / message_path, "rw")
    if spec.get("securityContext", {}).get("readOnlyRootFilesystem"):
        yield f"mount -o remount,ro {_q(root)}"


def _bind(source: Path, target: Path, mode: str) -> Iterator[str]:
    make = f"mkdir -p {_q(target)}" if source.is_dir() else f"mkdir -p {_q(target.parent)} && touch {_q(target)}"
    yield f"{make} && mount -o bind,{mode} {_q(source)} {_q(target)}"


def _volume(
    folder: Path, volume: Mapping[str, Any], target: Path, pod: Mapping[str, Any], mount: Mapping[str, Any]
) -> Iterator[str]:
    """Mount an emptyDir: owned by root and the pod's fsGroup, writable by every user."""
    if volume.keys() != {"name", "emptyDir"} or mount.keys() - {"name", "mountPath"}:
        raise ValueError(f"only whole, writable emptyDir volumes are supported, not {volume} mounted as {mount}")
    group = pod["securityContext"].get("fsGroup")
    if volume["emptyDir"].get("medium") == "Memory":
        number, unit = re.fullmatch(r"(\d+)(\w*)", volume["emptyDir"].get("sizeLimit", "64Mi")).groups()  # type: ignore[union-attr]
        size = int(number) * BYTES.get(unit, 1)
        yield f"mkdir -p {_q(target)} && mount -t tmpfs -o size={size} {volume['name']} {_q(target)}"
    else:
        source = folder / volume["name"]
        source.mkdir()
        yield from _bind(source, target, "rw")
    if group is not None:
        yield f"chown :{group} {_q(target)}"
    yield f"chmod {'2777' if group is not None else '777'} {_q(target)}"


def _become(folder: Path, pod: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """Shell command that changes root and user, drops privileges and executes the container's command."""
    context = {**pod.get("securityContext", {}), **spec.get("securityContext", {})}
    user, group = context["runAsUser"], context["runAsGroup"]
    assert user != 0
    groups = f"--groups={context['fsGroup']}" if "fsGroup" in context else "--clear-groups"
    options = [f"--reuid={user}", f"--regid={group}", groups]
    if context.get("capabilities", {}).get("drop") == ["ALL"]:
        options += ["--inh-caps=-all", "--bounding-set=-all"]
    if context.get("allowPrivilegeEscalation") is False:
        options += ["--no-new-privs"]
    return f'exec env --unset=PWD chroot {_q(folder / "root")} setpriv {" ".join(options)} "$@"'


def _q(path: Path | str) -> str:
    return shlex.quote(str(path))
