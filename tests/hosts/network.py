"""Network hosts on one machine: Linux network namespaces, connected by a bridge, with names.

A host behaves like a pod of a Kubernetes Indexed Job (`<job>-<i>.<service>`): it has one interface and its own
`/etc/hosts`, an unknown name fails immediately, and a peer can disappear without closing its connections. No link is
created in the machine's own namespace; the bridge has its own.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

from tests.waiting import PATIENCE, wait_until

T = TypeVar("T")

FILES = Path("/etc/netns")  # `ip netns exec` mounts the files of <FILES>/<namespace> over /etc
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of sched.h
IP, UNSHARE, SHELL = (shutil.which(name) or name for name in ("ip", "unshare", "sh"))  # of iproute2 and util-linux
_numbers = itertools.count()


def _ip(*arguments: str, text: str = "") -> str:
    done = subprocess.run([IP, *arguments], input=text, capture_output=True, text=True, check=False, timeout=PATIENCE)
    if done.returncode != 0:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in _ip("netns", "pids", namespace).split()]


@functools.cache
def unsupported() -> str:
    """The reason why this machine cannot create hosts, determined by creating one; empty where it can."""
    if not Path("/proc/self/ns/net").exists() or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    namespace = f"kubetune-{os.getpid()}-probe"
    try:
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "add", "br0", "type", "bridge")
        _ip("-n", namespace, "link", "add", "h0", "type", "veth", "peer", "name", "eth0")
        _ip("netns", "exec", namespace, "true")
        FILES.mkdir(exist_ok=True)
    except (RuntimeError, OSError) as error:
        return f"network namespaces cannot be created: {error}"
    finally:
        with contextlib.suppress(RuntimeError):
            _ip("netns", "delete", namespace)
    return ""


needs_root = pytest.mark.skipif(unsupported() != "", reason=unsupported())


@dataclass(frozen=True)
class Host:
    """One host: namespace, IP and hardware address, and the bridge port that it is connected to."""

    namespace: str
    address: str
    hardware_address: str
    port: str


class Network:
    """Hosts with these names inside a `with` block; afterwards their processes are killed and everything is removed.

    Host *i* of *names* has the address 10.77.0.<i+2>. Networks are isolated from each other.
    """

    def __init__(self, names: Sequence[str]) -> None:
        prefix = f"kubetune-{os.getpid()}-{next(_numbers)}"
        self._hub = f"{prefix}-hub"
        self.hosts: dict[str, Host] = {
            name: Host(f"{prefix}-{i}", f"10.77.0.{i + 2}", f"02:00:0a:4d:00:{i + 2:02x}", f"h{i}")
            for i, name in enumerate(names)
        }
        self._forgotten: set[str] = set()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def popen(
        self, name: str, command: Sequence[str], *, hostname: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start *command* on host *name*, as the child process itself, so that signals and exit codes are the command's.

        Pipes carry text; stdin is empty. *hostname* is the machine name that the process sees, *options* are of `Popen`.
        """
        # Every program of this chain replaces itself by the next one, with the same process id.
        chain = [IP, "netns", "exec", self.hosts[name].namespace]
        if hostname is not None:
            script = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
            chain += [UNSHARE, "--uts", SHELL, "-c", script, hostname]
        process = subprocess.Popen([*chain, *command], stdin=subprocess.DEVNULL, text=True, **options)
        self._started.append(process)
        return process

    def inside(self, name: str, function: Callable[[], T]) -> T:
        """Call a function in the network namespace of host *name*; its connections and child processes use that host.

        Names are not resolved there, so it connects to addresses.
        """
        path = Path("/run/netns", self.hosts[name].namespace)

        def call() -> T:
            with path.open() as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NETWORK_NAMESPACE) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {path}")
            return function()

        with ThreadPoolExecutor(1) as thread:  # only this thread enters the namespace
            return thread.submit(call).result()

    def pids(self, name: str) -> list[int]:
        return _pids(self.hosts[name].namespace)

    def forget(self, name: str) -> None:
        """Remove *name* from every other host's `/etc/hosts`: a peer whose DNS record is not published yet."""
        self._forgotten.add(name)
        self._write_hosts_files()

    def remember(self, name: str) -> None:
        self._forgotten.discard(name)
        self._write_hosts_files()

    def cut(self, name: str) -> None:
        """Take the link of host *name* down at the bridge: packets from and to it are lost."""
        _ip("-n", self._hub, "link", "set", self.hosts[name].port, "down")

    def join(self, name: str) -> None:
        _ip("-n", self._hub, "link", "set", self.hosts[name].port, "up")

    def _build(self) -> None:
        hosts = self.hosts.values()
        for namespace in [self._hub, *(host.namespace for host in hosts)]:
            _ip("netns", "add", namespace)
        at_the_hub = ["link add br0 type bridge", "link set br0 up"]
        for host in hosts:
            own_end = f"eth0 address {host.hardware_address} netns {host.namespace}"
            at_the_hub += [f"link add {host.port} type veth peer name {own_end}"]
            at_the_hub += [f"link set {host.port} master br0 up"]
        _ip("-n", self._hub, "-batch", "-", text="\n".join(at_the_hub))
        for host in hosts:
            at_the_host = ["link set lo up", f"addr add {host.address}/24 dev eth0", "link set eth0 up"]
            # With ARP, a peer that was cut would give "no route to host" after three seconds; pods are mostly reached
            # through a router, and packets to a failed one are lost.
            at_the_host += [
                f"neigh replace {peer.address} lladdr {peer.hardware_address} dev eth0 nud permanent"
                for peer in hosts
                if peer is not host
            ]
            _ip("-n", host.namespace, "-batch", "-", text="\n".join(at_the_host))
        for host in hosts:
            folder = FILES / host.namespace
            folder.mkdir(parents=True)
            # Port 53 is closed, so that a DNS query is refused immediately, and not after 30 s. With "files" alone the result for an
            # unknown name is "not known", as with cluster DNS, and not "try again".
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:1\n")
            if Path("/etc/nsswitch.conf").exists():
                (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self._write_hosts_files()

    def _write_hosts_files(self) -> None:
        for reader, host in self.hosts.items():
            # Overwritten without truncation, with the same length: running processes have this file mounted, and must never
            # read it empty.
            file = os.open(FILES / host.namespace / "hosts", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, self._hosts_text(reader).encode())
            finally:
                os.close(file)

    def _hosts_text(self, reader: str) -> str:
        lines = ["127.0.0.1 localhost"]
        for name, host in self.hosts.items():
            line = f"{host.address} {name}"
            if name == reader:  # a pod resolves its own short name too
                lines.append(f"{line} {name.partition('.')[0]}")
            else:
                lines.append(f"#{line[1:]}" if name in self._forgotten else line)
        return "\n".join(lines) + "\n"

    def _remove(self) -> None:
        namespaces = [*(host.namespace for host in self.hosts.values()), self._hub]
        try:
            self._kill([name for name in namespaces if Path("/run/netns", name).exists()])
        finally:
            for namespace in namespaces:
                with contextlib.suppress(RuntimeError):  # it does not exist
                    _ip("netns", "delete", namespace)
                shutil.rmtree(FILES / namespace, ignore_errors=True)

    def _kill(self, namespaces: list[str]) -> None:
        for process in self._started:  # it may not have entered its namespace yet
            process.kill()

        def have_ended() -> bool:
            left = [pid for namespace in namespaces for pid in _pids(namespace)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        wait_until(have_ended, "the end of the hosts' processes after SIGKILL")
        for process in self._started:
            process.wait(timeout=PATIENCE)
